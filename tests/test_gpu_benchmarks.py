"""The GPU's benchmark, as far as it goes without a GPU: what it would time, and what it makes of the times."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import se_fused
from benchmarks import gpu_calls, gpu_check, gpu_plans
from benchmarks.shapes import Shape
from se_fused import backends, verify

GPU_CHECK = typer.Typer()
GPU_CHECK.command()(gpu_check.main)


def test_the_gpu_benchmark_times_latency_and_batches_in_both_layouts():
    rows = list(gpu_calls.rows())
    assert rows[0].dtype is torch.float16
    assert {(row.shape.n, row.layout, row.direction) for row in rows} >= set(
        itertools.product((1, 32, 256), ("contiguous", "channels_last"), ("forward", "both"))
    )
    forward, both = (next(row for row in rows if row.direction == direction) for direction in ("forward", "both"))
    shape = forward.shape
    maps, weights = 2 * shape.c * shape.h * shape.w, 2 * (2 * shape.c * shape.r + shape.c + shape.r)
    assert forward.bytes() == 2 * maps + weights
    assert both.bytes() == 5 * maps + 2 * weights


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_variants_of_a_row_compute_the_same(direction: str, layout: str) -> None:
    row = gpu_calls.Row(Shape(2, 12, 5, 7, r=3), torch.float32, layout, direction)
    with se_fused.use_backend("cpu"):
        fused, eager = (gpu_calls.calls(row, variant, 3, "cpu") for variant in ("cpu", "eager"))
        results = [(tree_leaves(mine()), tree_leaves(theirs())) for mine, theirs in zip(fused, eager, strict=True)]
    for mine, theirs in results:
        assert len(mine) == (1 if direction == "forward" else 6)
        torch.testing.assert_close(mine, theirs)
    assert len({float(mine[0].detach().sum()) for mine, _ in results}) == 3


def test_calls_rotate_over_maps_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(gpu_calls, "eager", lambda *inputs: used.extend(t.data_ptr() for t in inputs))
    for call in gpu_calls.calls(next(gpu_calls.rows()), "eager", 3, "cpu"):
        call()
    assert len(set(used)) == 3 * 5


def test_the_sanitizers_watch_every_case_by_some_plan_and_most_by_each() -> None:
    def kind(case: verify.Case) -> str:
        return str(dataclasses.replace(case, precision="float32", layout="contiguous"))

    everything = {kind(case) for case in verify.cases()}
    by_plan = {plan: {kind(case) for case in gpu_check.watched(plan)} for plan in gpu_check.WATCHED}
    assert set.union(*by_plan.values()) == everything
    assert all(len(kinds) > 0.75 * len(everything) for kinds in by_plan.values())


def test_what_the_sanitizers_watch_must_be_right_and_only_clusters_may_be_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans = []

    def use_backend(name: str, plan: str) -> AbstractContextManager[None]:
        plans.append(plan)
        return nullcontext()

    def error(case: verify.Case, device: str, seed: int) -> tuple[float, str]:
        if plans[-1] == refused and seed >= served:
            raise ValueError("no plan")
        return wrong, "y"

    monkeypatch.setattr(backends, "cuda_limits", lambda _: (0, 0, 0, 0, *clusters))
    monkeypatch.setattr(se_fused, "use_backend", use_backend)
    monkeypatch.setattr(verify, "error", error)
    clusters, wrong, refused, served = (132, 66), 0.0, "cluster samples=4", 1
    gpu_check.small_calls()
    assert set(plans) == set(gpu_check.WATCHED)
    served = 0
    with pytest.raises(AssertionError, match="'cluster samples=4' serves none"):
        gpu_check.small_calls()
    plans.clear()
    clusters = (0, 0)
    gpu_check.small_calls()
    assert set(plans) == {"", "two_pass"}
    refused = "two_pass"
    with pytest.raises(ValueError, match="no plan"):
        gpu_check.small_calls()
    wrong, refused = 1.0, None
    with pytest.raises(AssertionError, match="float32"):
        gpu_check.small_calls()


@pytest.mark.parametrize(
    ("variant", "error", "passes"),
    [
        ("compile", RuntimeError("a peer's own"), True),
        ("cuda", torch.OutOfMemoryError("too large"), True),
        ("cuda", RuntimeError("an illegal memory access"), False),
    ],
)
def test_only_the_memory_may_stop_the_cuda_kernels_in_the_benchmark(
    variant: str, error: Exception, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calls(row: gpu_calls.Row, name: str, sets: int) -> list[object]:
        if name == variant:
            raise error
        return [None]

    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="1"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="a GPU"))
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    monkeypatch.setattr(se_fused, "use_backend", lambda _: nullcontext())
    monkeypatch.setattr(gpu_check, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(gpu_check, "rows", lambda: itertools.islice(gpu_calls.rows(), 1))
    monkeypatch.setattr(gpu_check, "cold_sets", lambda row: 1)
    monkeypatch.setattr(gpu_check, "calls", calls)
    monkeypatch.setattr(gpu_check, "graph_times", lambda functions: [1.0] * 7)
    monkeypatch.setattr(gpu_check, "eager_times", lambda function: [1.0] * 7)
    assert gpu_check.bench(tmp_path, 60) is passes
    written = {line["variant"] for line in csv.DictReader((tmp_path / "layer_gpu.csv").open(newline=""))}
    assert written == set(gpu_check.VARIANTS) - {variant}


def test_a_part_that_breaks_fails_the_check_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def breaks(out: Path) -> bool:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    monkeypatch.setattr(gpu_check, "tests", breaks)
    monkeypatch.setattr(gpu_plans, "probes", lambda out: False)
    monkeypatch.setattr(gpu_check, "bench", lambda out, budget: ran.append("bench"))
    monkeypatch.setattr(gpu_plans, "sweep", lambda out, budget: ran.append("sweep"))
    done = CliRunner().invoke(GPU_CHECK, ["--out", str(tmp_path), "--parts", "tests,probes,bench,sweep"])
    assert done.exit_code == 1
    assert "an illegal memory access" in done.stdout
    assert "failed: tests, probes" in done.stdout
    assert ran == ["bench", "sweep"]
    assert CliRunner().invoke(GPU_CHECK, ["--out", str(tmp_path), "--parts", "bench"]).exit_code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_without_a_gpu_says_so():
    done = CliRunner().invoke(GPU_CHECK, ["--parts", "bench"])
    assert done.exit_code == 2
    assert "the CUDA kernels cannot run here: there is no NVIDIA GPU" in done.stderr
    assert CliRunner().invoke(GPU_CHECK, ["--parts", "everything"]).exit_code == 2


def test_the_sweep_tries_both_ways_to_split_channels_last() -> None:
    row = next(gpu_calls.rows())
    assert len(gpu_plans.plans_of(row)) == 7
    both = gpu_plans.plans_of(dataclasses.replace(row, layout="channels_last"))
    assert both[0] == ""
    assert {"cluster size=8 by_channels=0", "cluster size=8 by_channels=1"} < set(both)


def test_the_sweep_tries_several_samples_where_there_are() -> None:
    row = next(row for row in gpu_calls.rows() if row.shape.n > 1 and row.direction == "forward")
    assert "cluster samples=4" in gpu_plans.plans_of(row)
    assert "cluster samples=4" not in gpu_plans.plans_of(dataclasses.replace(row, direction="both"))
    assert "cluster samples=4" not in gpu_plans.plans_of(next(gpu_calls.rows()))


def test_the_sweep_says_where_the_planner_is_beaten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"": 10.0, "two_pass": 9.0, "cluster size=1": 9.8, "cluster size=2": 10.0}
    first = next(gpu_calls.rows())
    monkeypatch.setattr(gpu_plans, "rows", lambda: iter([first, dataclasses.replace(first, dtype=torch.float32)]))
    monkeypatch.setattr(gpu_plans, "median_of", lambda row, plan, sets: times.get(plan))
    monkeypatch.setattr(gpu_plans, "cold_sets", lambda row: 1)
    gpu_plans.sweep(tmp_path, 60)
    lines = list(csv.DictReader((tmp_path / "plans_gpu.csv").open(newline="")))
    assert [(line["plan"], line["ratio_to_planner"]) for line in lines] == [
        ("", "1.000"), ("two_pass", "0.900"), ("cluster size=1", "0.980"), ("cluster size=2", "1.000")
    ]  # fmt: skip
    assert "faster than the planner's at 1 rows" in capsys.readouterr().out
    monkeypatch.setattr(gpu_plans, "median_of", lambda row, plan, sets: 10.0)
    gpu_plans.sweep(tmp_path, 60)
    assert "faster than the planner's at 0 rows" in capsys.readouterr().out
