"""The builder: what a build is named by, what it compiles for, how it fails, and that one library serves every CPU."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension

from se_fused import build, native

FACTS = native.load_facts()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_key_names_what_went_in(monkeypatch, tmp_path):
    before = build.key()
    assert build.key() == before
    monkeypatch.setenv("SE_FUSED_CXXFLAGS", "-DOTHER")
    assert build.key() != before
    monkeypatch.delenv("SE_FUSED_CXXFLAGS")
    copy = tmp_path / "csrc"
    copy.mkdir()
    for path in build.SOURCES.rglob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", copy)
    same = build.key()
    (copy / "se.h").write_text("// changed")
    assert build.key() != same


def test_a_finished_build_is_used_as_it_is(tmp_path):
    (tmp_path / build.key()).mkdir()
    assert build.build(tmp_path) == tmp_path / build.key()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "no C\\+\\+ compiler: no-such-compiler is not on the PATH"),
        ({"MAX_JOBS": "2; rm"}, "MAX_JOBS is '2; rm'; wanted a number"),
        ({"SE_FUSED_CXXFLAGS": "-fno-such-flag"}, "compilation failed:(.|\\n)*fno-such-flag"),
    ],
)
def test_what_cannot_be_built_says_why(monkeypatch, tmp_path, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "a folder with 'quotes' and $dollars"
    folder.mkdir()
    with pytest.raises(build.BuildError, match=message):
        build.build(folder)
    assert not any(path.is_dir() for path in folder.iterdir())


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("9.0", ["90"]),
        ("8.0;9.0+PTX", ["80", "90+PTX"]),
        ("7.5, 8.6  9.0a", ["75", "86", "90a"]),
        ("Ampere", ["80", "86+PTX"]),
        ("Volta;Turing Hopper", ["75+PTX", "90+PTX"]),
        ("6.0 7.0+PTX 7.5", ["75"]),
        ("All", [*build.ARCHITECTURES[:-1], "120+PTX"]),
        ("native", ["89"]),
        ("", ["89"]),
    ],
)
def test_architectures_are_spelled_as_torch_spells_them(monkeypatch, asked, names):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(build, "gpus", lambda: [70, 89])
    assert build.architectures() == names


def test_every_name_that_torch_knows_is_known():
    names = inspect.getsource(torch.utils.cpp_extension._get_cuda_arch_flags)
    known = re.findall(r"\('([A-Z][\w+]+)', '([\d.;]+(?:\+PTX)?)'\)", names)
    assert len(known) > 10
    for name, value in known:
        modern = [word for word in value.split(";") if float(word.removesuffix("+PTX")) >= 7.5]
        assert build._NAMED[name].split() == modern, name


def test_without_a_gpu_all_architectures_are_compiled(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(build, "gpus", list)
    assert build.architectures() == [*build.ARCHITECTURES[:-1], "120+PTX"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [("sm_90", "has 'sm_90'; wanted such as"), ("9.0 Lovelace", "has 'Lovelace'"), ("6.0;Volta", "need 7.5 or later")],
)
def test_an_architecture_that_nobody_knows(monkeypatch, asked, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(build.BuildError, match=message):
        build.architectures()


def test_gpus_are_found_without_nvml(monkeypatch):
    monkeypatch.setattr(build, "gpus", list)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    answer = subprocess.CompletedProcess([], 0, "(9, 0) (8, 6)\n", "")
    monkeypatch.setattr(build.subprocess, "run", lambda command, **_: answer)
    assert build.architectures() == ["86", "90"]


def test_for_gpus_that_are_too_old_nothing_is_compiled(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(build, "gpus", lambda: [70])
    with pytest.raises(build.BuildError, match=r"need compute capability 7\.5"):
        build.architectures()


def test_without_a_library_the_reference_serves_and_says_why(tmp_path):
    code = (
        "import torch, se_fused; m = se_fused.SqueezeExcite(8); x = torch.randn(1, 8, 3, 3);"
        "print(se_fused.explain(x, m.w1, m.b1, m.w2, m.b2)); m(x).sum().backward()"
    )
    done = run(code, SE_FUSED_CXXFLAGS="-DNOT_BUILT", CXX="no-such-compiler", SE_FUSED_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference")
    assert "no-such-compiler is not on the PATH" in done.stdout
    assert "reference PyTorch serves cpu tensors" in done.stderr


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
    assert FACTS.build_info()["target_torch"] == "2.10"
    assert FACTS.cpu_features()[0] == "baseline"
    assert "libtorch_cuda" not in Path(native.library("cpu")).read_bytes().decode("latin-1")
