"""`make gpu-check` without a GPU: on the CPU as its device, its arguments, its document and its requirements."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks import gpu_check
from se_fused import native

ROOT = Path(__file__).resolve().parents[2]
# Packages that a machine with a GPU may lack, or that only some commands need.
OPTIONAL = (
    "filelock", "hypothesis", "ninja", "numpy", "platformdirs", "pybind11", "pynvml", "pytest", "rich", "timm",
    "torchvision", "triton", "typer",
)  # fmt: skip


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a run on the CPU: two cases of every part that the CPU can stand in for."""
    out = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--cases", "2", "--minutes", "30"]
    command += ["--out", str(out), "--parts", "library,smoke,layer,models,sweep,memcheck"]
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) < 50, "the summary fits one screen"
    return out


@pytest.mark.long
def test_a_rehearsal_leaves_at_most_six_files_and_says_what_ran(rehearsal: Path) -> None:
    assert {file.name for file in rehearsal.iterdir()} == {
        "run.json", "smoke.csv", "layer_gpu.csv", "models_gpu.csv", "plans_gpu.csv", "log.txt"
    }  # fmt: skip
    run = json.loads((rehearsal / "run.json").read_text())
    assert run["torch"]
    assert isinstance(run["dirty"], bool)
    outcomes = {part["part"]: (part["outcome"], part["reason"]) for part in run["parts"]}
    assert outcomes["memcheck"] == ("not run", "compute-sanitizer is not on the PATH")
    assert outcomes["library"] == ("passed", "1 of 1 cases")
    assert all(outcomes[part] == ("passed", "2 of 2 cases") for part in ("smoke", "layer", "models", "sweep"))


@pytest.mark.long
def test_every_row_of_a_rehearsal_is_checked_and_interleaved(rehearsal: Path) -> None:
    assert [row["outcome"] for row in rows_of(rehearsal / "smoke.csv")] == ["right", "right"]
    layer = rows_of(rehearsal / "layer_gpu.csv")
    for mode, variants in (("graph", {"fused", "eager", "copy"}), ("calls", {"fused", "eager"})):
        assert {row["variant"] for row in layer if row["mode"] == mode} == variants
    for row in layer:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        if row["variant"] == "fused":
            assert float(row["error"]) <= float(row["tolerance"])
    models = rows_of(rehearsal / "models_gpu.csv")
    assert {row["variant"] for row in models} == {"original", "fused", "block"}
    assert all(int(row["se_layers"]) > 0 and float(row["error"]) < 1e-4 for row in models)
    assert [row["ratio_to_planner"] for row in rows_of(rehearsal / "plans_gpu.csv")] == ["1.000", "1.000"]


def test_without_pytest_its_part_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(gpu_check.Missing, match="pytest and hypothesis not installed"):
        gpu_check.gpu_tests(gpu_check.Task(tmp_path, tmp_path, "cuda", 0, 0, None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "smoke,everything"], "--parts has everything; wanted some of library, smoke"),
        (["--minutes", "0"], "--minutes is 0.0; wanted more than 0"),
    ],
)
def test_arguments_that_are_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        gpu_check.main(arguments)
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


def test_parts_that_time_something_run_alone() -> None:
    timed = {"layer", "models", "microbenchmarks", "sweep", "triton"}
    stages = gpu_check.stages(part for part in gpu_check.PARTS if part.default)
    assert [stage[0].name for stage in stages][:4] == ["library", "smoke", "layer", "models"]
    assert all(len(stage) == 1 for stage in stages if stage[0].name in timed)
    assert sum(max(part.seconds for part in stage) for stage in stages) == 360


def test_the_document_has_the_parts_and_their_times() -> None:
    text = (ROOT / "docs" / "gpu-run.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| (\d+) \|", text, re.MULTILINE))
    stages = gpu_check.stages(part for part in gpu_check.PARTS if part.default)
    assert rows == {stage[0].name: str(stage[0].seconds) for stage in stages}


def test_a_part_without_a_gpu_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_check.main(["--out", str(tmp_path), "--parts", "smoke", "--minutes", "30"]) == 1
    (smoke,) = json.loads((tmp_path / "run.json").read_text())["parts"]
    assert smoke["outcome"] == "failed"
    assert smoke["wrong"] == ["wrong: the cuda kernels cannot run here: there is no NVIDIA GPU"]


def test_nothing_optional_is_imported_before_it_is_needed() -> None:
    program = f"""
        import sys
        for name in {OPTIONAL}:
            sys.modules[name] = None  # importing it raises ImportError
        import torch, se_fused
        from torch import nn
        layer = se_fused.SqueezeExcite(8)
        y = layer(torch.randn(2, 8, 3, 3, requires_grad=True))
        y.sum().backward()
        report = se_fused.replace(nn.Sequential(nn.Conv2d(3, 8, 3), layer))
        print(report, se_fused.explain(y.detach(), layer.w1, layer.b1, layer.w2, layer.b2).backend)
        assert not torch.cuda.is_initialized()
        sys.argv = ["gpu-check", "--help"]
        from benchmarks import gpu_check
        gpu_check.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = {
        **os.environ,
        "SE_FUSED_CACHE": str(native.library("cpu").parent.parent),
    }  # where it is built
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cpu\nusage: gpu-check" in done.stdout
