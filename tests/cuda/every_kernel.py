"""A few calls of a library of kernels that between them take every kernel; what is wrong ends them."""

import itertools
from dataclasses import replace
from pathlib import Path

import torch
from cases import Case, assert_close, call, truth
from gradients import compare
from norms import NormCase, check_norm

import se_fused
from dev import emulator
from se_fused.blocks.operators import operators_of

PLANS = ("splits=2", "rows=3", "cluster size=2 threads=256", "cluster size=2 threads=512", "cluster size=1")
CASES = (
    Case(n=2, c=27, r=6, spatial=(7, 7), dtype=torch.float16),
    Case(n=1, c=2, r=1, spatial=(64, 80)),
    Case(n=5, c=40, r=9, spatial=(5, 5), layout="channels_last", options={"squeeze": "max"}),
    Case(n=2, c=16, r=None, spatial=(8, 8), layout="offset"),
    Case(n=1, c=24, r=5, spatial=(4, 4), options={"pre_act": "relu"}),
    Case(n=2, c=24, r=5, spatial=(5, 4), layout="channels_last", affine=True),
    # Rows of half a vector more than whole ones, and shorter than one.
    Case(n=3, c=24, r=5, spatial=(2, 6), dtype=torch.float16),
    Case(n=2, c=19, r=4, spatial=(3,), dtype=torch.float16, residual="map", options={"post_act": "silu"}),
)
# (n, c, sides, dtype, act, residual, single, affine, inplace, channels_last, offset)
NORMS = [
    NormCase(2, 27, (12, 9), torch.float16, "silu", None, True, True, False, False, 0, 0),
    NormCase(2, 40, (9, 8), torch.float32, "relu", "own", False, True, True, True, 0, 0),
    NormCase(1, 19, (5, 5, 3), torch.bfloat16, "gelu", "own", False, False, False, False, 1, 0),
    NormCase(1, 70, (40, 3), torch.float64, "identity", None, False, True, False, True, 0, 0),
]


def can_run(plan: str, case: Case) -> bool:
    """Whether a plan has something of its own for a case, and can serve it."""
    if "rows" in plan:
        return case.layout == "contiguous" and case.spatial[0] < 64
    return "512" not in plan or case.n > 1


def apart(t: torch.Tensor) -> torch.Tensor:
    """A copy of a dense tensor with its strides and alignment, far from all other memory, so that the buffer named for
    an access out of its bounds does not depend on the allocator."""
    margin = 1 << 16
    memory = t.new_zeros(t.numel() + t.storage_offset() + 2 * margin)
    return memory.as_strided(t.shape, t.stride(), margin + t.storage_offset()).copy_(t)


def main(path: Path, fault: int | None = None) -> None:
    library = emulator.Library(path)
    library.choose_fault(fault)
    with library.forced():
        for plan, seed, case in itertools.product(PLANS, range(3), CASES):
            if not can_run(plan, case):
                continue
            library.setup("H200", plan, seed)
            tensors = case.tensors()
            tensors["x"] = apart(tensors["x"])
            with torch.no_grad():
                y = call(se_fused.squeeze_excite, tensors, case.options)
            assert_close(y, truth(tensors, case.options), case.dtype)
            compare(replace(case, affine=False))  # training applies scale and shift before the call
        for seed, case in itertools.product(range(3), NORMS):
            library.setup("H200", seed=seed)
            check_norm(operators_of(library), case)
