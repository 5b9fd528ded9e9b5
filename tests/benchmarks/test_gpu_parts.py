"""The parts of gpu-check measure the right things, as far as that shows without a GPU, and fit into six minutes."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton_targets
from torch.utils._pytree import tree_leaves

import se_fused
from benchmarks import gpu_check
from benchmarks.gpu import calls, layer, models, smoke, triton_sample
from benchmarks.shapes import Shape
from dev import sweep
from se_fused import native
from se_fused.cases import PRECISIONS

CPU = torch.device("cpu")


def test_the_headline_comes_first_and_everything_that_was_asked_for_comes() -> None:
    rows = [row for row, _ in layer.rows()]
    assert all(row.dtype is torch.float16 and row.direction == "forward" for row in rows[:36])
    measured = {(row.shape.n, row.layout, row.direction) for row in rows if row.dtype is torch.float16}
    assert measured == set(itertools.product((1, 32, 128), ("contiguous", "channels_last"), ("forward", "both")))
    variants = [variants for _, variants in layer.rows()]
    assert variants.index(("fused", "eager", "compile")) >= 72


def test_the_bytes_of_a_call() -> None:
    shape = Shape(2, 8, 3, 5, r=4)
    maps, weights = 2 * 8 * 15, 2 * 8 * 4 + 8 + 4
    assert calls.Row(shape, torch.float16, "contiguous", "forward").bytes() == 2 * (2 * maps + weights)
    assert calls.Row(shape, torch.float32, "contiguous", "both").bytes() == 4 * (5 * maps + 2 * weights)


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_variants_compute_the_same_on_buffers_of_their_own(direction: str, layout: str) -> None:
    row = calls.Row(Shape(2, 12, 5, 7, r=3), torch.float32, layout, direction)
    inputs = calls.draw(row, 3, CPU)
    assert len({t.data_ptr() for each in inputs for t in (*each.tensors, each.g) if t is not None}) == 3 * (
        5 if direction == "forward" else 6
    )
    with se_fused.use_backend("cpu"):
        found = {variant: inputs[1].call(calls.layer(variant)) for variant in ("fused", "eager")}
    assert len(tree_leaves(found["fused"])) == (1 if direction == "forward" else 6)
    torch.testing.assert_close(tree_leaves(found["fused"]), tree_leaves(found["eager"]))
    assert calls.error(found["fused"], inputs[1]) < 1e-5
    assert calls.error(found["fused"], inputs[0]) > 0.1, "the inputs of another set are other inputs"


def test_a_nan_is_an_infinite_error() -> None:
    row = calls.Row(Shape(1, 4, 3, 3, r=2), torch.float32, "contiguous", "forward")
    (inputs,) = calls.draw(row, 1, CPU)
    y = inputs.call(calls.eager).detach()
    y[0, 1, 2, 0] = math.nan
    assert calls.error(y, inputs) == math.inf


def test_a_replay_keeps_the_results_of_its_last_turn() -> None:
    ran: list[int] = []
    replay = calls.Replay([lambda i=i: ran.append(i) or i for i in range(3)], 9, CPU)
    assert list(replay.results) == [0, 1, 2]
    assert replay.time() > 0
    assert list(replay.results) == [0, 1, 2]
    assert Counter(ran) == {0: 6, 1: 6, 2: 6}


def test_a_replay_is_whole_turns_over_its_buffers_and_not_too_short() -> None:
    for row, _ in layer.rows():
        sets = int(calls.COLD_L2 * 60_000_000 / row.bytes()) + 2
        count = calls.replay_calls(row, min(sets, calls.MOST_SETS))
        assert count % min(sets, calls.MOST_SETS) == 0
        assert count >= calls.LEAST_CALLS
        assert count * row.bytes() / 4.5e6 > 30, "microseconds, at a speed that no GPU here has"


def test_within_a_round_every_variant_runs_once() -> None:
    order: list[str] = []
    times = calls.interleaved({name: lambda name=name: order.append(name) or 1.0 for name in "abc"}, rounds=20)
    assert all(set(order[i : i + 3]) == set("abc") for i in range(0, len(order), 3))
    assert len({tuple(order[i : i + 3]) for i in range(0, len(order), 3)}) > 2, "in an order of its own"
    assert all(len(values) == 20 for values in times.values()), "the first round does not count"


def test_the_smoke_calls_have_every_plan_layout_and_precision() -> None:
    cases = list(smoke.cases(smoke.PLANS))
    kinds = {(plan, case.precision, case.layout) for plan, case in cases}
    layouts = ("contiguous", "channels_last")
    assert kinds >= set(itertools.product(smoke.PLANS, [p for p in PRECISIONS if p != "float64"], layouts))
    assert kinds >= set(itertools.product(["", "two_pass"], ["float64"], layouts))
    assert {case.precision for _, case in cases if case.layout == "every_second"} == set(PRECISIONS)
    watched = {(plan, case.precision) for plan, case in cases[:: gpu_check.SANITIZED_STEP]}
    assert watched == {(plan, case.precision) for plan, case in cases}, "the sanitizer sees each plan and type"


def test_every_plan_serves_most_of_its_smoke_calls() -> None:
    """The planner decides, for an H200. A refused call compares nothing."""
    facts = native.load_extension()
    served: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for plan, case in smoke.cases(smoke.PLANS):
        call = {"n": case.n, "c": case.c, "r": case.r or 0, "l": math.prod(case.spatial), "forced": plan}
        call["dtype"] = str(case.dtype).removeprefix("torch.")
        try:
            for backward in (False, True):
                facts.plan(facts.preset("H200"), **call, channels_last=case.layout != "contiguous", backward=backward)
            served[plan] += 1
        except ValueError as refusal:
            if not str(refusal).startswith(smoke.REFUSAL):
                raise
            refused[plan] += 1
    assert all(served[plan] > refused[plan] for plan in smoke.PLANS), (served, refused)


def test_the_smoke_plans_have_clusters_of_every_size_and_blocks_of_both_lengths() -> None:
    assert {"", "two_pass"} < set(smoke.PLANS)
    assert {f"cluster size={size}" for size in (1, 2, 4, 8, 16)} < set(smoke.PLANS)
    assert "cluster size=2 threads=512" in smoke.PLANS
    rows = [math.prod(call["spatial"]) for call in smoke.CALLS]
    assert any(row % 2 for row in rows), "rows that go through shared memory in pieces of one element"
    assert any(row % 8 == 4 for row in rows), "and of 8 bytes"


def test_the_sweep_tries_clusters_of_every_size_with_blocks_of_both_lengths() -> None:
    kinds = itertools.product((1, 2, 4, 8, 16), (256, 512))
    assert ["two_pass", *(f"cluster size={size} threads={threads}" for size, threads in kinds)] == sweep.PLANS
    facts = native.load_extension()
    for plan, row in itertools.product(sweep.PLANS, sweep.rows()):
        shape, forward = row.shape, row.direction == "forward"
        call = {"n": shape.n, "c": shape.c, "r": shape.r, "l": shape.h * shape.w, "backward": not forward}
        try:
            planned = facts.plan(
                facts.preset("H200"), **call, dtype="float16", channels_last=row.layout == "channels_last", forced=plan
            )
        except ValueError as refusal:
            if not str(refusal).startswith(smoke.REFUSAL):
                raise
        else:
            _, _, _, size, threads = planned.launches[0]
            assert plan == (f"cluster size={size} threads={threads}" if size else "two_pass")


def test_rows_that_do_not_fit_into_memory_are_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> list[dict[str, object]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(layer, "measure", out_of_memory)
    monkeypatch.setattr(sys, "argv", ["layer", "--out", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        layer.main()
    assert end.value.code == 1


# Seconds, measured on an H200 machine of 16 cores with a prebuilt library, except where a comment says otherwise.
START = 7  # of a process, to import torch and create a context
SMOKE_CASE = 0.02
LAYER_ROW, COMPILED_ROW, TRAINING_CASE = 0.4, 1.8, 8
INFERENCE_CASE = 2.7  # 1.8 were measured with two variants; there are three now
SWEEP_ROW, MICROBENCHMARKS, GPU_TESTS, MEMCHECK, INSTRUCTION_SETS = 0.7, 15, 48, 17, 22
TRITON_KERNEL = 1.0  # on one core of an EPYC
CORES = 12  # of 16, used by Triton's processes


def test_what_is_compiled_and_measured_fits_into_six_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [variants for _, variants in layer.rows()]
    compiled = sum("compile" in variants for variants in rows)
    cases = len(models.MODELS) * len(models.BATCHES)
    kernels = triton_kernels()
    wanted = {
        "library": START,  # prebuilt
        "smoke": START + SMOKE_CASE * len(list(smoke.cases(smoke.PLANS))),
        "layer": START + LAYER_ROW * (len(rows) - compiled) + COMPILED_ROW * compiled,
        "models": START + INFERENCE_CASE * 2 * cases + TRAINING_CASE * cases,
        "tests": max(GPU_TESTS, MEMCHECK, INSTRUCTION_SETS),
        "microbenchmarks": MICROBENCHMARKS,
        "sweep": START + SWEEP_ROW * len(sweep.rows()),
        "triton": 2 * START + kernels * TRITON_KERNEL / CORES,  # without timing
    }
    stages = gpu_check.stages(part for part in gpu_check.PARTS if part.default)
    given = {stage[0].name: max(part.seconds for part in stage) for stage in stages}
    with capsys.disabled():
        print(f"\n{kernels} Triton kernels, {compiled} compilations by torch.compile; seconds wanted / given:")
        for name, seconds in wanted.items():
            print(f"  {name}: {seconds:.0f} / {given[name]:.0f}")
    assert given.keys() == wanted.keys()
    assert sum(given.values()) == 360
    # A part that measures until its time is over may want more time, but its first rows must fit.
    assert given["layer"] >= START + 72 * LAYER_ROW, "the headline"
    assert START + INFERENCE_CASE * 2 * cases + TRAINING_CASE * len(models.MODELS) <= given["models"]
    assert given["sweep"] >= START + SWEEP_ROW * 24, "each shape and layout at two batches"
    assert all(wanted[name] <= given[name] for name in ("library", "smoke", "tests", "microbenchmarks"))
    assert wanted["triton"] <= given["triton"] + 5, "parts before it leave some of theirs"


def triton_kernels() -> int:
    """How many kernels the sample of Triton cases compiles: one per combination of kinds of arguments."""
    found = set()
    for case in triton_sample.sample():
        options = {"act": "relu", "gate": "sigmoid", "squeeze": "mean", "pre_act": None, "post_act": None}
        last = case.layout == "channels_last"
        for kernel, args, kwargs in triton_targets.record(
            case.n,
            case.c,
            case.r,
            case.spatial,
            case.dtype,
            last,
            options | case.options,
            case.residual != "none",
            case.affine,
        ):
            key = (kernel.__name__, *map(specialised, args), *sorted((name, str(v)) for name, v in kwargs.items()))
            # Inference launches the forward kernels again, compiled without the outputs that training saves.
            found |= {(*key, saves) for saves in ((True, False) if "forward" in kernel.fn.__module__ else (True,))}
    return len(found)


def specialised(argument: object) -> str:
    """The property of an argument that Triton compiles for: a dtype, None, 1, or whether 16 divides a number."""
    if isinstance(argument, torch.Tensor):
        return str(argument.dtype)
    if type(argument) is int and argument != 1:
        return "int of 16" if argument % 16 == 0 else "int"
    return str(argument)
