"""The builder: the key of a build, its targets, its failures, and one library that runs on every CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from se_fused import native
from se_fused.native import BuildError, build, recipe

FACTS = native.load_extension()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_key_names_what_went_in(monkeypatch, tmp_path):
    before = recipe.key()
    assert recipe.key() == before
    monkeypatch.setenv("SE_FUSED_CXXFLAGS", "-DOTHER")
    assert recipe.key() != before
    monkeypatch.delenv("SE_FUSED_CXXFLAGS")
    copy = tmp_path / "csrc"
    copy.mkdir()
    for path in recipe.SOURCES.rglob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(recipe, "SOURCES", copy)
    same = recipe.key()
    (copy / "se.h").write_text("// changed")
    assert recipe.key() != same


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "no C\\+\\+ compiler: no-such-compiler is not on the PATH; install one"),
        ({"CXX": "'c++"}, 'CXX is "\'c\\+\\+": No closing quotation'),
        ({"MAX_JOBS": "2; rm"}, "MAX_JOBS is '2; rm'; wanted a number"),
        ({"SE_FUSED_CXXFLAGS": "-fno-such-flag"}, "compilation failed:(.|\\n)*fno-such-flag"),
    ],
)
def test_what_cannot_be_built_says_why(monkeypatch, tmp_path, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "a folder with 'quotes' and $dollars"
    folder.mkdir()
    with pytest.raises(BuildError, match=message):
        build.build(folder)
    assert {path.name for path in folder.iterdir()} <= {".lock"}


def test_without_a_library_the_reference_serves_and_says_why(tmp_path):
    code = (
        "import torch, se_fused; m = se_fused.SqueezeExcite(8); x = torch.randn(1, 8, 3, 3);"
        "print(se_fused.explain(x, m.w1, m.b1, m.w2, m.b2)); m(x).sum().backward()"
    )
    done = run(code, SE_FUSED_CXXFLAGS="-DNOT_BUILT", CXX="no-such-compiler", SE_FUSED_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference")
    assert "no-such-compiler is not on the PATH" in done.stdout
    assert "cpu tensors run on reference PyTorch" in done.stderr


NUMBERS = """
import torch, se_fused
torch.manual_seed(0)
m, x = se_fused.SqueezeExcite(33, 4).double(), torch.randn(3, 33, 7, 7, dtype=torch.float64, requires_grad=True)
(g,) = torch.autograd.grad(m(x).square().sum(), x)
print(m(x).sum().item(), g.sum().item())
"""


@pytest.mark.parametrize("name", FACTS.cpu_features())
def test_every_instruction_set_of_this_cpu_gives_the_same_numbers(name):
    best, asked = run(NUMBERS), run(NUMBERS, SE_FUSED_CPU=name)
    assert asked.returncode == 0, asked.stderr
    a, b = (torch.tensor([float(v) for v in done.stdout.split()]) for done in (best, asked))
    torch.testing.assert_close(a, b)


def test_an_instruction_set_that_is_not_there_is_an_error():
    done = run("import torch, se_fused; se_fused.SqueezeExcite(8)(torch.randn(1, 8, 3, 3))", SE_FUSED_CPU="sse9")
    assert done.returncode != 0
    assert "SE_FUSED_CPU is sse9; wanted baseline, x86-64-v3 or x86-64-v4" in done.stderr


def test_the_facts_of_the_build():
    assert FACTS.cpu_features()[0] == "baseline"
    assert "libtorch_cuda" not in Path(native.library("cpu")).read_bytes().decode("latin-1")
