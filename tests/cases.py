"""Calls to test, as hypothesis strategies; their truths; and the comparison of a result with its truth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from se_fused import HardSigmoid, reference
from se_fused import cases as shared
from se_fused.cases import HALF, LAYOUTS, call, in_float64
from se_fused.options import ACTIVATIONS, GATES, SQUEEZES

DTYPES = tuple(shared.TOLERANCE)
GATE_CHOICES = (*GATES, HardSigmoid(0.2, 0.5), HardSigmoid(0.5, 0.5))
# In units of (1 + the largest true value): the 1 is for results near 0, which are differences of numbers near 1.
# It is larger than the unit of the shared tolerance, so float64 needs half of that; in half precision one rounding is
# enough, because a result is rounded once, and a gradient has a factor of its own.
TOLERANCE = shared.TOLERANCE | {torch.float64: shared.TOLERANCE[torch.float64] / 2}
TOLERANCE |= {dtype: shared.rounding(dtype) for dtype in HALF}


@dataclass
class Case(shared.Case):
    seed: int = 0

    def tensors(self, device: torch.device | str = "cpu") -> dict[str, Tensor | None]:
        """`draw` by PyTorch's own generator, so that the seed also fixes what a test draws afterwards."""
        # torch.manual_seed takes 2 ms, for GPUs.
        return self.draw(torch.default_generator.manual_seed(self.seed), device)


def cases(
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    pre_acts: tuple[str | None, ...] = (None, *ACTIVATIONS),
    layouts: tuple[str, ...] = tuple(LAYOUTS),
    affines: tuple[bool, ...] = (False, True),
) -> st.SearchStrategy[Case]:
    """Every option, dtype and layout; sizes around each vector width, tail and block border."""
    channels = st.one_of(st.integers(1, 40), st.sampled_from([54, 64, 72, 520]))
    spatial = st.one_of(
        st.tuples(st.integers(1, 600)),
        st.tuples(st.integers(1, 17), st.integers(1, 17)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    )
    acts = st.sampled_from(list(ACTIVATIONS))
    maybe_act = st.sampled_from([None, None, *ACTIVATIONS])
    return st.builds(
        Case,
        n=st.integers(1, 9),
        c=channels,
        r=st.one_of(st.none(), st.integers(1, 40)),
        spatial=spatial,
        dtype=st.sampled_from(dtypes),
        float_weights=st.booleans(),
        kernel_dims=st.integers(0, 3),
        bias=st.booleans(),
        layout=st.sampled_from(layouts),
        residual=st.sampled_from(["none", "map", "x"]),
        affine=st.sampled_from(affines),
        seed=st.integers(0, 2**31),
        options=st.fixed_dictionaries(
            {
                "act": acts,
                "gate": st.sampled_from(GATE_CHOICES),
                "squeeze": st.sampled_from(SQUEEZES),
                "pre_act": st.sampled_from(pre_acts),
                "post_act": maybe_act,
            }
        ),
    )


def truth(tensors: dict[str, Tensor | None], options: dict) -> Tensor:
    return call(reference.squeeze_excite, in_float64(tensors), options)


def in_pytorch(tensors: dict[str, Tensor | None], options: dict) -> Tensor:
    """What eager PyTorch computes in the tensors' own precision, without oneDNN: where there is AVX-512, its gelu of
    infinity is NaN."""
    with torch.backends.mkldnn.flags(enabled=False):
        return call(reference.squeeze_excite, tensors, options)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "y", factor: float = 1) -> None:
    """`actual` of `dtype` against a float64 truth; on failure the worst position and the fraction of wrong elements."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    actual = actual.double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0, (actual - expected).abs())
    finite = expected[expected.isfinite()]
    bound = factor * TOLERANCE[dtype] * (1 + (finite.abs().max().item() if finite.numel() else 0))
    wrong = ~(error <= bound)
    if wrong.any():
        worst = error.nan_to_num(math.inf).argmax()
        position = [int(i) for i in torch.unravel_index(worst, error.shape)]
        raise AssertionError(
            f"{what}: {wrong.double().mean():.1%} of elements differ by more than {bound:.2e}; worst at {position}: "
            f"{actual.flatten()[worst]:.9g}, wanted {expected.flatten()[worst]:.9g}"
        )
