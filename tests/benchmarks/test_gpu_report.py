"""The tables that are made from the files of a GPU run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.gpu import layer, models, smoke
from benchmarks.gpu.worker import Rows
from dev import sweep


@pytest.fixture
def gpu_run(tmp_path: Path) -> Path:
    """The files of a run in which fused takes 2 us, eager 3, torch.compile 1, a copy 1, and Triton 1.5 where it ran."""
    rows = Rows(tmp_path / "layer_gpu.csv", layer.FIELDS)
    for case, ratios in ((0, {"eager": 1.5}), (5, {"eager": 2.0, "compile": 0.5}), (0, {"eager": 2.0, "triton": 0.75})):
        for mode, (name, value) in itertools.product(("graph", "calls"), {"fused": 1.0, "copy": 0.5, **ratios}.items()):
            line = {"case": case, "shape": "32x8x7x7", "dtype": "float16", "layout": "contiguous"}
            line |= {
                "direction": "forward",
                "mode": mode,
                "variant": name,
                "p50_us": f"{2 * value:.2f}",
                "ratio_to_fused": f"{value:.3f}",
            }
            rows.write(line)
    networks = Rows(tmp_path / "models_gpu.csv", models.FIELDS)
    line = {"model": "a", "n": 1, "mode": "graph", "se_layers": 3}
    for variant, value, ms in (("original", "0.900", "3.0"), ("fused", "1.000", "3.3"), ("block", "0.800", "2.5")):
        networks.write(line | {"variant": variant, "ratio_to_fused": value, "p50_ms": ms})
    tried = Rows(tmp_path / "plans_gpu.csv", sweep.FIELDS)
    for shape, plan, value in (
        ("1", "planner's", 1.0),
        ("1", "two_pass", 0.9),
        ("2", "planner's", 1.0),
        ("2", "x", 0.96),
    ):
        tried.write({"shape": shape, "plan": plan, "ratio_to_planner": value})
    run = {"gpu": "a GPU", "driver": "1", "torch": "2", "commit": "abc", "dirty": False, "date": "2026-01-02T03:04"}
    run["parts"] = [{"part": "sweep", "outcome": "passed", "reason": "7 of 9 cases"}]
    run["parts"].append({"part": "tests", "outcome": "passed", "reason": "9 passed in 3 s"})
    smoke_rows = Rows(tmp_path / "smoke.csv", smoke.FIELDS)
    for outcome in ("right", "right", "refused: too large"):
        smoke_rows.write({"outcome": outcome})
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path


def test_the_tables_of_a_gpu_run_are_a_function_of_its_files(gpu_run: Path) -> None:
    results = gpu_report.read(gpu_run)
    text = gpu_report.summary(results)
    mean = "1.50 (1.50 to 1.50)"  # of the first measurement, before torch.compile has run
    half = "**0.50** (0.50 to 0.50)"
    row = ["float16 contiguous, forward (1 of 6)", "32", mean, mean, half, half, half.replace("**", "")]
    assert f"| {' | '.join(row)} |" in text
    assert "| training step | original / block, in a CUDA graph, of medians |\n" in text
    assert "| a (3 SE layers) | 1 | **0.90** |  |  | 1.20 |" in text
    assert "5 % faster at 1 of 2 calls" in text
    assert "took 0.75 to 0.75 of the CUDA kernels' time, at the 1 calls" in text
    assert "a GPU, driver 1, PyTorch 2, commit abc, 2026-01-02. 2 calls right and none wrong" in text
    assert "GPU tests: 9 passed; in part: sweep 7 of 9 cases. An empty cell" in text
    assert "| 32x8x7x7 | 2.00 ( to ) |  | 0.50 | 1.50 | **0.50** | **0.75** | 2.00 | 1.50 |  |" in gpu_report.layers(
        results
    )


@pytest.mark.parametrize("change", [{"dirty": True}, {"commit": "unknown"}])
def test_a_gpu_run_of_no_commit_is_no_record(gpu_run: Path, change: dict[str, object]) -> None:
    run = json.loads((gpu_run / "run.json").read_text()) | change
    (gpu_run / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="the run is of commit"):
        gpu_report.read(gpu_run)


def fail(gpu_run: Path, part: str, tail: Sequence[str] = ()) -> None:
    run = json.loads((gpu_run / "run.json").read_text())
    run["parts"].append({"part": part, "outcome": "failed", "reason": "1 wrong", "tail": list(tail)})
    (gpu_run / "run.json").write_text(json.dumps(run))


@pytest.mark.parametrize("part", ["smoke", "models"])
def test_a_gpu_run_that_failed_is_no_record(gpu_run: Path, part: str) -> None:
    fail(gpu_run, part)
    with pytest.raises(ValueError, match=rf"{part} failed; failures\.json explains nothing"):
        gpu_report.read(gpu_run)


def test_a_failure_that_is_explained_stands_under_the_table(gpu_run: Path) -> None:
    (gpu_run / "failures.json").write_text(json.dumps({"models": "a bad seed"}))
    with pytest.raises(ValueError, match=r"nothing failed; failures\.json explains models"):
        gpu_report.read(gpu_run)
    fail(gpu_run, "models")
    assert "Failed in this run, models: a bad seed\n" in gpu_report.summary(gpu_report.read(gpu_run))


def test_nothing_excuses_a_wrong_result(gpu_run: Path) -> None:
    (gpu_run / "failures.json").write_text(json.dumps({"smoke": "aborted at its end"}))
    smoke = gpu_run / "smoke.csv"
    right = smoke.read_text()
    cases = len(right.splitlines()) - 1
    fail(gpu_run, "smoke", tail=[f"{cases} of {cases} cases", "terminate called"])
    assert "smoke: aborted at its end" in gpu_report.summary(gpu_report.read(gpu_run))
    smoke.write_text("".join(right.splitlines(keepends=True)[:-1]))  # and one case is missing
    with pytest.raises(ValueError, match="smoke failed"):
        gpu_report.read(gpu_run)
    smoke.write_text(right.replace("right", "WRONG", 1))
    with pytest.raises(ValueError, match="smoke failed"):
        gpu_report.read(gpu_run)
    smoke.unlink()
    with pytest.raises(ValueError, match="smoke failed"):
        gpu_report.read(gpu_run)


def test_parts_that_have_not_run_leave_their_tables_out(gpu_run: Path) -> None:
    for name in ("models_gpu.csv", "plans_gpu.csv", "smoke.csv"):
        (gpu_run / name).unlink()
    assert "| 32 |" in gpu_report.summary(gpu_report.read(gpu_run))
