"""Eval-mode batch norms for tests, and the kernels for them held against float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from se_fused.blocks.operators import Operators
from se_fused.cases import TOLERANCE
from se_fused.options import ACTIVATIONS

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def norm_of(c: int, dtype: torch.dtype, affine: bool = True, device: str = "cpu") -> tuple:
    """Weight, bias, mean, variance and epsilon."""
    weight, bias, mean, variance = (torch.randn(c).to(device, dtype) for _ in range(4))
    variance = variance.abs() + 0.5
    return (weight, bias, mean, variance, 1e-3) if affine else (None, None, mean, variance, 1e-3)


def exact(x: Tensor, norm: tuple) -> Tensor:
    weight, bias, mean, variance = (t if t is None else t.double() for t in norm[:4])
    return F.batch_norm(x.double(), mean, variance, weight, bias, eps=norm[4])


def map_of(
    n: int, c: int, sides: tuple[int, ...], dtype: torch.dtype, channels_last: bool, offset: int = 0,
    device: str = "cpu",
) -> Tensor:  # fmt: skip
    """A dense map, `offset` elements after the start of its memory."""
    shape = (n, *sides, c) if channels_last else (n, c, *sides)
    x = torch.randn(offset + n * c * torch.Size(sides).numel()).to(device, dtype)[offset:].view(shape)
    return x.movedim(-1, 1) if channels_last else x


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype, *sizes: Tensor) -> None:
    largest = max([1.0, *(float(t.abs().max()) for t in (wanted, *sizes))])
    assert float((got.double() - wanted).abs().max()) <= 4 * TOLERANCE[dtype] * largest


@contextmanager
def counting_operators() -> Iterator[Counter[str]]:
    """Counts the calls that `Operators` computes, by name: a block that computes as at level "layer" makes none."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> Any:
        function = getattr(Operators, name)

        def run(*args: Any) -> Tensor | None:
            y: Tensor | None = function(*args)
            counts[name] += y is not None
            return y

        return mock.patch.object(Operators, name, run)

    with counted("forward"), counted("batch_norm"):
        yield counts


@dataclass(frozen=True)
class NormCase:
    """act(norm(x) + residual). single: the batch norm is of float32 beside a half-precision map. affine: it has weight
    and bias. residual: None, "own" or "x". offset: of x, in elements."""

    n: int
    c: int
    sides: tuple[int, ...]
    dtype: torch.dtype
    act: str
    residual: str | None
    single: bool
    affine: bool
    inplace: bool
    channels_last: bool
    offset: int
    seed: int


def norm_cases(channels: int, side: int) -> st.SearchStrategy[NormCase]:
    sides = st.one_of(
        *(st.tuples(*[st.integers(1, side)] * dims) for dims in (1, 2)), st.tuples(*[st.integers(1, 3)] * 3)
    )
    return st.builds(
        NormCase, n=st.integers(1, 3), c=st.integers(1, channels), sides=sides, dtype=st.sampled_from(DTYPES),
        act=st.sampled_from(list(ACTIVATIONS)), residual=st.sampled_from([None, "own", "x"]), single=st.booleans(),
        affine=st.booleans(), inplace=st.booleans(), channels_last=st.booleans(), offset=st.sampled_from([0, 0, 1, 4]),
        seed=st.integers(0, 999),
    )  # fmt: skip


def check_norm(kernels: Operators, case: NormCase, device: str = "cpu") -> Tensor:
    """Compare y with float64, and scale and shift too; return y."""
    torch.manual_seed(case.seed)
    x = map_of(case.n, case.c, case.sides, case.dtype, case.channels_last, case.offset, device)
    single = case.single and case.dtype.itemsize == 2
    norm = norm_of(case.c, torch.float32 if single else case.dtype, case.affine, device)
    residual = {None: None, "own": torch.randn_like(x), "x": x}[case.residual]
    before, added = x.clone(), None if residual is None else residual.double().clone()
    y = kernels.batch_norm(x, residual, case.inplace, list(ACTIVATIONS).index(case.act), norm)
    assert y is not None
    assert (y is x) == case.inplace
    assert case.inplace or torch.equal(x, before)
    assert y.stride() == before.stride()
    v = exact(before, norm) + (0 if added is None else added)
    assert_near(y, ACTIVATIONS[case.act](v), case.dtype, v)

    wide = torch.promote_types(case.dtype, torch.float32)
    scale, shift = (torch.empty(case.c, dtype=wide, device=device) for _ in range(2))
    kernels.backend.scale_shift_out(*norm, scale, shift)
    zero, one = torch.zeros(1, case.c, 1).to(before), torch.ones(1, case.c, 1).to(before)
    assert_near(shift, exact(zero, norm).flatten(), scale.dtype)
    assert_near(scale, (exact(one, norm) - exact(zero, norm)).flatten(), scale.dtype)
    return y
