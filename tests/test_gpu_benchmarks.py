"""The GPU's benchmark, as far as it goes without a GPU: what it would time, and what it makes of the times."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import gpu_calls, gpu_check, gpu_plans

GPU_CHECK = typer.Typer()
GPU_CHECK.command()(gpu_check.main)


def test_the_gpu_benchmark_times_latency_and_batches_in_both_layouts():
    rows = list(gpu_calls.rows())
    assert rows[0].dtype is torch.float16
    assert {(row.shape.n, row.layout, row.direction) for row in rows} >= set(
        itertools.product((1, 32, 256), ("contiguous", "channels_last"), ("forward", "both"))
    )
    forward, both = (next(row for row in rows if row.direction == direction) for direction in ("forward", "both"))
    map_bytes = forward.shape.c * forward.shape.h * forward.shape.w * 2
    assert forward.bytes() == 2 * map_bytes
    assert both.bytes() == 5 * map_bytes


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
