"""Compares each algorithm, layout and dtype with the formula in float64: forward, in place and backward."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import torch

import se_fused
from se_fused import backends, verify
from se_fused.cases import GRID_LAYOUTS, PRECISIONS, TOLERANCE, Case

from .calls import SIZES
from .worker import Rows, Worker, run_part

FIELDS = ("plan", "case", "error", "of", "tolerance", "outcome")
PLANS = (
    "", "two_pass", *(f"cluster size={size}" for size in SIZES),
    "cluster size=2 threads=512",
)  # fmt: skip
# Whole vectors; rows of odd length with every option; rows of 49; three dimensions; the one-FC form; a large map.
CALLS = (
    {"n": 5, "c": 64, "spatial": (14, 14), "r": 16},
    {"n": 3, "c": 20, "spatial": (7, 9), "r": 5, "residual": "map",
     "options": {"squeeze": "mean_max", "pre_act": "silu", "post_act": "relu"}},
    {"n": 9, "c": 192, "spatial": (7, 7), "r": 48, "residual": "x", "options": {"gate": "hard_sigmoid", "act": "silu"}},
    {"n": 2, "c": 160, "spatial": (3, 5, 4), "r": 3, "options": {"squeeze": "max", "pre_act": "hardswish"}},
    {"n": 2, "c": 264, "spatial": (6, 5), "r": None, "bias": False, "options": {"pre_act": "relu", "gate": "tanh"}},
    {"n": 2, "c": 256, "spatial": (28, 28), "r": 4, "options": {"act": "gelu"}},
)  # fmt: skip
# How the planner begins a refusal of a cluster (csrc/plan/cluster.cpp).
REFUSAL = "se_fused: no plan: cluster: "


def cases(plans: tuple[str, ...]) -> Iterator[tuple[str, Case]]:
    """Every plan in one precision, then in the next. There are no cluster kernels in float64."""
    for precision, plan, layout, call in itertools.product(PRECISIONS, plans, GRID_LAYOUTS, CALLS):
        if layout == "every_second" and plan:  # such a map is copied before a plan is made
            continue
        if plan.startswith("cluster") and precision == "float64":
            continue
        yield plan, Case(**PRECISIONS[precision] | {"layout": layout} | call)


def main() -> None:
    worker = Worker("Every algorithm against float64.")
    clusters = worker.backend == "cuda" and any(backends.CUDA.limits(torch.cuda.current_device())[4:9])
    plans = PLANS if clusters else PLANS[:2]
    if worker.backend == "cpu":
        plans = ("",)  # the CPU has no plans
    rows = Rows(worker.out / "smoke.csv", FIELDS)
    ran: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for number, (plan, case) in worker.each(cases(plans), lambda one: f"plan {one[0]!r}, {one[1]}"):
        row = {"plan": plan or "planner's", "case": str(case), "tolerance": f"{TOLERANCE[case.dtype]:.1e}"}
        try:
            with se_fused.use_backend(worker.backend, plan):
                error, worst = verify.error(case, worker.device.type, number)
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            if not (plan.startswith("cluster") and reason.startswith(REFUSAL)):
                raise
            refused[plan] += 1
            rows.write({**row, "outcome": f"refused: {reason.removeprefix(REFUSAL)}"})
            continue
        right = error <= TOLERANCE[case.dtype]
        if not right:
            worker.wrong(f"plan {plan!r}, {case}: {worst} is off by {error:.1e}")
        rows.write({**row, "error": f"{error:.1e}", "of": worst, "outcome": "right" if right else "wrong"})
        ran[plan] += 1
    worker.say(f"{ran.total()} compared, {refused.total()} refused: too large for the cluster, or not to be divided")
    for plan in plans if worker.all_ran() else ():
        if ran[plan] <= refused[plan]:
            worker.wrong(f"plan {plan!r} ran {ran[plan]} cases and refused {refused[plan]}")
    worker.finish()


if __name__ == "__main__":
    run_part(main)
