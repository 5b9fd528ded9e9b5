"""The command line: what each command prints, and that an error is one line and exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import se_fused
from se_fused import __main__ as cli
from se_fused import verify

MODEL = """
import torch
from torch import nn

class SELayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(8, 2, bias=False), nn.ReLU(), nn.Linear(2, 8, bias=False), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), SELayer(), nn.ReLU())

def broken():
    raise RuntimeError("no such weights\\nsecond line")
"""


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def test_plan_prints_launches_and_bytes_for_a_gpu_that_is_not_here():
    done = run("plan", "32x256x56x56", "--hidden", "16", "--device", "A100")
    assert done.exit_code == 0
    assert re.search(r"squeeze: \d+ blocks", done.stdout)
    assert f"maps: {2 * 32 * 256 * 56 * 56 * 2} bytes read, {32 * 256 * 56 * 56 * 2} written" in done.stdout
    assert "weight_gradients" in run("plan", "32x256x56x56", "--hidden", "16", "--backward").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("32xa",), "SHAPE is '32xa'; wanted three to five sizes"),
        (("32x256",), "SHAPE is '32x256'; wanted three to five sizes"),
        (("1x8x7x7", "--device", "V100"), "device is 'V100'; wanted one of T4"),
        (("1x8x7x7", "--dtype", "int8"), "dtype is 'int8'; wanted float32"),
        (("1x8x7x7", "--forced", "width=16"), "width=16 with elements of 2 bytes, spans of 98 bytes"),
        (("0x8x7x7",), "n is 0; wanted 1 or more"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(arguments, message):
    done = run("plan", *arguments, "--hidden", "2")
    assert done.exit_code == 2
    assert message in done.stderr


def run_process(*arguments, cwd=None):
    command = [sys.executable, "-m", "se_fused", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def assert_refused(result, text):
    assert result.exit_code == 2
    assert re.fullmatch(r"error: .+\n", result.stderr)
    assert text in result.stderr


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module of models that can be imported by the name it returns."""
    name = f"models_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.fixture
def few_cases(monkeypatch):
    calls = [{"options": {"act": "silu"}}, {"shape": (2, 10, 3, 5, 4), "r": 3}]
    monkeypatch.setattr(verify, "_CALLS", calls)


def test_info(native, monkeypatch, tmp_path):
    monkeypatch.setenv("SE_FUSED_CACHE", str(tmp_path))
    facts = json.loads(run("info", "--json").stdout)
    assert facts["torch"] == torch.__version__
    assert facts["environment"]["SE_FUSED_CACHE"] == str(tmp_path)
    assert facts["build"]["compiler"]
    assert "baseline" in facts["cpu_features"]
    assert facts["backends"]["cpu"].keys() == set(se_fused.backends.BACKENDS)
    assert facts["backends"]["cpu"]["cpu"] is None
    assert facts["backends"]["cpu"]["cuda"]
    shown = run("info").stdout
    assert torch.__version__ in shown
    assert re.search(r"cpu on cpu\W+usable", shown)


def test_info_says_why_there_is_no_compiled_part(monkeypatch):
    monkeypatch.setitem(se_fused.backends._unusable, "cpu", "no C++ compiler")
    facts = json.loads(run("info", "--json").stdout)
    assert facts["build"] == facts["backends"]["cpu"]["cpu"] == "no C++ compiler"
    assert facts["cpu_features"] is None


def test_verify_passes_on_the_grid(native, monkeypatch):
    monkeypatch.setattr(verify, "LAYOUTS", ("strided",))
    result = run("verify")
    assert result.exit_code == 0, result.output
    assert "served by the cpu backend" in result.stdout
    assert "wrong" not in result.output


@pytest.mark.parametrize("change", [lambda y: y * (1 + 1e-4), lambda y: y * float("nan")])
def test_verify_fails_on_wrong_numbers(few_cases, monkeypatch, change):
    right = verify.squeeze_excite
    monkeypatch.setattr(verify, "squeeze_excite", lambda *args, **options: change(right(*args, **options)))
    result = run("verify")
    assert result.exit_code == 1
    assert "3 wrong" in result.stdout or "6 wrong" in result.stdout
    assert re.search(r"wrong: .* in float64: \[", result.stderr)


def test_verify_sees_a_wrong_gradient(few_cases, monkeypatch):
    right = verify.squeeze_excite

    def wrong(x, *weights, **options):
        if x.requires_grad:
            x.register_hook(lambda dx: dx * 1.001)
        return right(x, *weights, **options)

    monkeypatch.setattr(verify, "squeeze_excite", wrong)
    case = verify.Case("float32", "contiguous")
    assert verify.error(case)[1] == "dx"
    assert run("verify").exit_code == 1


def test_verify_refuses_what_is_not_there(few_cases):
    assert_refused(run("verify", "--device", "nonsense"), "nonsense")
    with se_fused.use_backend("cuda"):
        assert_refused(run("verify"), "cuda")


def test_strided_layout_is_neither_contiguous_nor_channels_last():
    t = torch.arange(120.0).reshape(2, 3, 4, 5)
    strided, last = verify._laid_out(t, "strided"), verify._laid_out(t, "channels_last")
    assert torch.equal(strided, t)
    assert torch.equal(last, t)
    assert strided.stride() == (120, 40, 10, 2)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_replace_shows_layers_difference_and_times(models):
    result = run("replace", f"{models}:net", "--input", "2x3x9x9", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert "1 replaced" in result.stdout
    difference = re.search(r"largest absolute difference of the output: (\S+), of values up to (\S+)", result.stdout)
    assert float(difference[1]) < 1e-6
    assert float(difference[2]) > 1e-2
    assert re.search(r"[\d.]+ ms before, [\d.]+ ms after", result.stdout)


@pytest.mark.parametrize(
    ("options", "reason"), [(["--exclude", "1"], "excluded by '1'"), (["--include", "x*"], "no pattern of include")]
)
def test_replace_passes_patterns_on(models, options, reason):
    result = run("replace", f"{models}:net", *options)
    assert result.exit_code == 0, result.output
    assert reason in result.stdout
    assert "1 skipped" in result.stdout
    assert "ms before" not in result.stdout


@pytest.mark.parametrize(
    ("spec", "shape", "text"),
    [
        ("net", "1x3x9x9", "wanted module:callable"),
        ("no_such_module:net", "1x3x9x9", "No module named 'no_such_module'"),
        ("math:no_such_name", "1x3x9x9", "no_such_name"),
        ("builtins:dict", "1x3x9x9", "gave a dict"),
        ("{models}:broken", "1x3x9x9", "RuntimeError: no such weights"),
        ("{models}:net", "1x3xmany", "--input is '1x3xmany'"),
        ("{models}:net", "1x3x-9x9", "--input is '1x3x-9x9'"),
        ("{models}:net", "1x4x9x9", "on a random input of 1x4x9x9"),
    ],
)
def test_replace_refuses_in_one_line(models, spec, shape, text):
    assert_refused(run("replace", spec.format(models=models), "--input", shape), text)


@pytest.mark.parametrize(("command", "module"), [("bench", "benchmarks.layer_cpu"), ("demo", "examples.demo")])
def test_bench_and_demo_need_the_checkout(command, module, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "se_fused" / "__main__.py"))
    assert_refused(run(command), f"{module} comes with the source checkout")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cli.runpy, "run_module", lambda *_, **__: exec("import no_such_package"))
    assert_refused(run("demo"), "examples.demo needs no_such_package")


def test_bench_passes_options_on():
    result = run_process("bench", "--shapes", "nonsense")
    assert result.returncode == 2
    assert "nonsense" in result.stderr
    assert "Traceback" not in result.stderr


def test_demo_starts_from_anywhere(tmp_path):
    root = Path(se_fused.__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from se_fused.__main__ import app; app()"
    command = [sys.executable, "-c", code, "demo", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "--epochs" in result.stdout
