"""Is it right? Each algorithm, layout and dtype, forward, in place and backward, against the formula in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

import se_fused
from se_fused import backends, verify

from .part import Part, Rows

FIELDS = ("plan", "case", "error", "of", "tolerance", "outcome")
PLANS = (
    "", "two_pass", *(f"cluster size={size}" for size in (1, 2, 4, 8, 16)), "cluster samples=4",
    "cluster size=2 by_channels=0", "cluster size=2 by_channels=1",
)  # fmt: skip
# Whole vectors; rows of odd length with every option; rows of 49; three dimensions; the one-FC form; a large map.
CALLS = (
    {"shape": (5, 64, 14, 14), "r": 16},
    {"shape": (3, 20, 7, 9), "r": 5, "residual": "other",
     "options": {"squeeze": "mean_max", "pre_act": "silu", "post_act": "relu"}},
    {"shape": (9, 192, 7, 7), "r": 48, "residual": "x", "options": {"gate": "hard_sigmoid", "act": "silu"}},
    {"shape": (2, 16, 3, 5, 4), "r": 3, "options": {"squeeze": "max", "pre_act": "hardswish"}},
    {"shape": (2, 40, 6, 5), "r": None, "bias": False, "options": {"pre_act": "relu", "gate": "tanh"}},
    {"shape": (2, 96, 56, 56), "r": 4, "options": {"act": "gelu"}},
)  # fmt: skip


def cases(plans: tuple[str, ...]) -> Iterator[tuple[str, verify.Case]]:
    """What is likeliest to fail first: every plan in one precision, then the next."""
    for precision, plan, layout, call in itertools.product(verify.PRECISIONS, plans, verify.LAYOUTS, CALLS):
        if layout != "strided" or not plan:  # a strided map is copied before any plan is made
            yield plan, verify.Case(precision, layout, **call)


def main() -> None:
    part = Part("Every algorithm against float64.")
    clusters = part.backend == "cuda" and any(backends.cuda_limits(torch.cuda.current_device())[4:])
    plans = PLANS if clusters else PLANS[:2]
    if part.backend == "cpu":
        plans = ("",)  # the CPU has no plans
    rows = Rows(part.out / "smoke.csv", FIELDS)
    served = set()
    for number, (plan, case) in part.each(cases(plans), lambda one: f"plan {one[0]!r}, {one[1]}"):
        row = {"plan": plan or "planner's", "case": str(case), "tolerance": f"{verify.tolerance(case.precision):.1e}"}
        try:
            with se_fused.use_backend(part.backend, plan):
                error, worst = verify.error(case, part.device.type, number)
        except ValueError as refusal:
            if not plan.startswith("cluster"):
                raise
            rows.write({**row, "outcome": f"no such plan: {refusal}"})
            continue
        right = error <= verify.tolerance(case.precision)
        if not right:
            part.wrong(f"plan {plan!r}, {case}: {worst} is off by {error:.1e}")
        rows.write({**row, "error": f"{error:.1e}", "of": worst, "outcome": "right" if right else "wrong"})
        served.add(plan)
    if part.all_ran():
        for plan in set(plans) - served:
            part.wrong(f"plan {plan!r} served none of the cases")
    part.finish()


if __name__ == "__main__":
    main()
