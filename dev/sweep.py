"""Times every plan that can run a call, interleaved, to see if the planner's choice is the fastest: plans_gpu.csv."""

from __future__ import annotations

import itertools
from functools import partial

import torch

import se_fused
from benchmarks.gpu import calls
from benchmarks.gpu.calls import SIZES, Row
from benchmarks.gpu.layer import BATCHES, LAYOUTS, shapes
from benchmarks.gpu.worker import Rows, Worker, run_part
from se_fused.timing import Times, ratio, spread

FIELDS = ("shape", "r", "dtype", "layout", "direction", "plan", "p20_us", "p50_us", "p80_us", "ratio_to_planner")
THREADS = (256, 512)
PLANNERS = "planner's"


def rows() -> list[Row]:
    batches = [n for n in BATCHES if n > 1] + [n for n in BATCHES if n == 1]
    return [
        Row(shape, torch.float16, layout, direction)
        for direction, n, layout in itertools.product(("forward", "both"), batches, LAYOUTS)
        for shape in shapes((n,))
    ]


# The plans that are timed besides the planner's choice.
PLANS = ["two_pass", *(f"cluster size={size} threads={threads}" for size in SIZES for threads in THREADS)]


def measure(row: Row, worker: Worker) -> Times:
    """Microseconds per call, by plan. Plans that cannot run the call are left out."""
    device = worker.device
    sets = calls.cold_sets(row, device)
    inputs = calls.draw(row, sets, device)
    functions = [partial(each.call, se_fused.squeeze_excite) for each in inputs]
    count = calls.replay_calls(row, sets)
    replays = {}
    with torch.set_grad_enabled(row.direction == "both"):
        for plan in ["", *(PLANS if worker.backend == "cuda" else [])]:
            try:
                with se_fused.use_backend(worker.backend, plan):
                    replay = calls.Replay(functions, count, device)
            except ValueError:
                assert plan, "the planner's own choice cannot run the call"
                continue
            replays[plan or PLANNERS] = replay
            error = calls.error(replay.results[0], inputs[0])
            if not error <= calls.tolerance(row):
                worker.wrong(f"{row}: plan {plan!r} is off by {error:.1e}")
        return calls.interleaved({plan: replay.time for plan, replay in replays.items()})


def main() -> None:
    worker = Worker(__doc__ or "")
    csv = Rows(worker.out / "plans_gpu.csv", FIELDS)
    ran, slower = 0, 0
    for _, row in worker.each(rows()):
        times = measure(row, worker)
        ratios = {plan: ratio(times, plan, PLANNERS) for plan in times}
        for plan, values in times.items():
            p20, p50, p80 = (f"{value:.2f}" for value in spread(values))
            line = (row.shape, row.shape.r, str(row.dtype)[6:], row.layout, row.direction, plan, p20, p50, p80)
            csv.write(dict(zip(FIELDS, (*line, f"{ratios[plan]:.3f}"), strict=True)))
        best = min(ratios, key=lambda plan: ratios[plan])
        if ratios[best] < 0.95:
            slower += 1
            worker.say(f"  {best} takes {ratios[best]:.2f} of the planner's time")
        ran += 1
        calls.free(worker.device)
    worker.say(f"another plan is 5 % faster than the planner's at {slower} of {ran} rows")
    worker.finish()


if __name__ == "__main__":
    run_part(main)
