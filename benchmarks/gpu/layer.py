"""Times the layer, eager, and a copy of the same bytes, in CUDA graphs and as separate calls: layer_gpu.csv."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch

import se_fused
from se_fused.timing import ratio, spread

from ..shapes import HEADLINE, Shape
from . import calls
from .calls import Row
from .worker import Rows, Worker, run_part

FIELDS = (
    "case", "shape", "r", "dtype", "layout", "direction", "mode", "variant", "rounds", "p20_us", "p50_us", "p80_us",
    "ratio_to_fused", "bytes", "gb_s", "error", "tolerance", "mhz_before", "mhz_after", "plan",
)  # fmt: skip
BATCHES = (1, 32, 128)
LAYOUTS = ("contiguous", "channels_last")
WALL_CLOCK_ROUNDS = 5
BASE = ("fused", "eager")


def shapes(batches: tuple[int, ...]) -> Iterator[Shape]:
    for n, (c, side, r) in itertools.product(batches, HEADLINE):
        yield Shape(n, c, side, side, r)


def rows(batches: tuple[int, ...] = BATCHES) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """Each row with its variants. The most important rows come first, because time may run out."""
    half, single = torch.float16, torch.float32
    for direction, layout in itertools.product(("forward", "both"), LAYOUTS):
        for shape in shapes(batches):
            yield Row(shape, half, layout, direction), BASE
    for direction in ("forward", "both"):
        for shape in shapes((32,)):
            yield Row(shape, single, "contiguous", direction), BASE
    # A compilation takes 2 s, so training is compiled for one batch size only.
    for direction, some in (("forward", batches), ("both", (32,))):
        for layout, shape in itertools.product(LAYOUTS, shapes(some)):
            yield Row(shape, half, layout, direction), (*BASE, "compile")


def triton_rows() -> Iterator[tuple[Row, tuple[str, ...]]]:
    for direction, layout in itertools.product(("forward", "both"), LAYOUTS):
        for shape in shapes((32,)):
            yield Row(shape, torch.float16, layout, direction), ("fused", "eager", "triton")


def measure(number: int, row: Row, variants: tuple[str, ...], worker: Worker) -> list[dict[str, object]]:
    """Time one row and return its lines. Reports our wrong results; raises the errors of the layers."""
    device = worker.device
    sets = calls.cold_sets(row, device)
    inputs = calls.draw(row, sets, device)
    backend_of = {"fused": worker.backend, "triton": "triton"}
    layers = {variant: calls.layer(variant) for variant in variants}
    functions = {variant: [partial(each.call, layer) for each in inputs] for variant, layer in layers.items()}
    functions["copy"] = [calls.copier(row.bytes(), device) for _ in range(sets)]
    count = calls.replay_calls(row, sets)
    lines: list[dict[str, object]] = []
    with torch.set_grad_enabled(row.direction == "both"):
        before = calls.clock_mhz()
        replays = {}
        for variant, each in functions.items():
            with se_fused.use_backend(backend_of.get(variant, "auto")):
                replays[variant] = calls.Replay(each, count, device)
        times = calls.interleaved({variant: replay.time for variant, replay in replays.items()})
        after = calls.clock_mhz()
        errors = {v: f"{error_of(replay, inputs):.1e}" for v, replay in replays.items() if v != "copy"}
        replays.clear()
        loops = {
            variant: in_backend(backend_of.get(variant, "auto"), calls.loop_timer(functions[variant], device))
            for variant in variants
        }
        loop_times = calls.interleaved(loops, WALL_CLOCK_ROUNDS)
        plan = plan_of(row, inputs[0]) if worker.backend == "cuda" else ""
    for mode, found in (("graph", times), ("calls", loop_times)):
        for variant, values in found.items():
            p20, p50, p80 = spread(values)
            lines.append({
                "case": number, "shape": row.shape, "r": row.shape.r, "dtype": str(row.dtype)[6:], "layout": row.layout,
                "direction": row.direction, "mode": mode, "variant": variant, "rounds": len(values),
                "p20_us": f"{p20:.2f}", "p50_us": f"{p50:.2f}", "p80_us": f"{p80:.2f}",
                "ratio_to_fused": f"{ratio(found, variant, 'fused'):.3f}", "bytes": row.bytes(),
                "gb_s": f"{row.bytes() / p50 / 1e3:.0f}", "error": errors.get(variant, ""),
                "tolerance": f"{calls.tolerance(row):.1e}", "mhz_before": before, "mhz_after": after,
                "plan": plan if variant == "fused" else "",
            })  # fmt: skip
    for variant in set(errors) & set(backend_of):
        if not float(errors[variant]) <= calls.tolerance(row):
            worker.wrong(f"{row}: {variant} is off by {errors[variant]}")
    return lines


def in_backend(name: str, timer: Callable[[], float]) -> Callable[[], float]:
    """A `timer` that forces the backend while it runs. A graph does not need it, because its launches are recorded."""

    def once() -> float:
        with se_fused.use_backend(name):
            return timer()

    return once


def error_of(replay: calls.Replay, inputs: list[calls.Inputs]) -> float:
    """The larger error of the first and the last buffers that were timed."""
    return max(calls.error(replay.results[i], inputs[i]) for i in {0, len(inputs) - 1})


def plan_of(row: Row, inputs: calls.Inputs) -> str:
    """The launches of the forward call, in one line."""
    text = se_fused.explain(*inputs.tensors).plan or ""
    return "; ".join(line.strip() for line in text.splitlines() if "blocks" in line)


def run(worker: Worker, wanted: list[tuple[Row, tuple[str, ...]]]) -> None:
    """Measure rows and write them to layer_gpu.csv."""
    csv = Rows(worker.out / "layer_gpu.csv", FIELDS)
    for number, (row, variants) in worker.each(wanted, lambda one: f"{one[0]}, {', '.join(one[1])}"):
        try:
            lines = measure(number, row, variants, worker)
        except torch.OutOfMemoryError as error:
            worker.skip(error)
            continue
        csv.write(*lines)
        worker.say("  " + ", ".join(f"{x['variant']} {x['p50_us']} us" for x in lines if x["mode"] == "graph"))
        calls.free(worker.device)


def main() -> None:
    worker = Worker(__doc__ or "")
    run(worker, list(rows() if worker.device.type == "cuda" else rows((1,))))
    worker.finish()


if __name__ == "__main__":
    run_part(main)
