"""Calls to test: shapes, dtypes, strides and options as hypothesis strategies, and the tolerance of each dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from se_fused import HardSigmoid, reference
from se_fused.options import ACTIVATIONS, GATES, SQUEEZES

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
GATE_CHOICES = (*GATES, HardSigmoid(0.2, 0.5), HardSigmoid(0.5, 0.5))

# Error against float64, in units of (1 + the largest true value). Half precision: the result's rounding, half a unit in
# the last place of at most the largest value, 2^-9 and 2^-12, doubled. float32: 100 roundings of 2^-24 (sums of some
# hundred terms). float64: the same 100, of 2^-53.
TOLERANCE = {
    torch.float32: 100 * 2**-24,
    torch.float64: 100 * 2**-53,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
}


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _every_second(t: Tensor) -> Tensor:
    wide = t.new_empty(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def _some_channels(t: Tensor, order: Callable[[Tensor], Tensor] = torch.Tensor.contiguous) -> Tensor:
    n, c, *spatial = t.shape
    wide = order(t.new_empty(n, c + 3, *spatial))
    wide[:, 2 : c + 2] = t
    return wide[:, 2 : c + 2]


def _offset(t: Tensor) -> Tensor:
    flat = t.new_empty(t.numel() + 1)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": _channels_last,
    "channels_last_slice": lambda t: _some_channels(t, _channels_last),
    "every_second": _every_second,
    "some_channels": _some_channels,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": _offset,
    "expanded": lambda t: t[..., :1].expand(t.shape),
}


@dataclass
class Case:
    n: int = 2
    c: int = 16
    r: int | None = 4  # None: the one-FC form
    spatial: tuple[int, ...] = (5, 7)
    dtype: torch.dtype = torch.float32
    float_weights: bool = False
    kernel_dims: int = 0
    bias: bool = True
    layout: str = "contiguous"
    residual: str = "none"  # none, map, x
    seed: int = 0
    options: dict = field(default_factory=dict)

    def tensors(self, device: torch.device | str = "cpu") -> dict[str, Tensor | None]:
        """x, w1, b1, w2, b2, residual: the same numbers on every device, laid out there."""
        torch.manual_seed(self.seed)
        shape = (self.n, self.c, *self.spatial)
        x = LAYOUTS[self.layout](contiguous(shape, self.dtype).to(device))
        weight_dtype = (
            torch.float32 if self.float_weights and self.dtype in (torch.float16, torch.bfloat16) else self.dtype
        )

        def weight(rows: int, columns: int) -> Tensor:
            w = contiguous((rows, columns, *(1,) * self.kernel_dims), torch.float64) / math.sqrt(columns)
            return w.to(device, weight_dtype)

        def bias(length: int) -> Tensor | None:
            return contiguous((length,), weight_dtype).to(device) if self.bias else None

        residual = {"none": None, "map": contiguous(shape, self.dtype).to(device), "x": x}[self.residual]
        w1, b1 = (None, None) if self.r is None else (weight(self.r, self.c), bias(self.r))
        w2, b2 = weight(self.c, self.c if self.r is None else self.r), bias(self.c)
        return {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "residual": residual}


def cases(
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    pre_acts: tuple[str | None, ...] = (None, *ACTIVATIONS),
    layouts: tuple[str, ...] = tuple(LAYOUTS),
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


def call(function, tensors: dict[str, Tensor | None], options: dict, **more) -> Tensor:
    positional = [tensors[name] for name in ("x", "w1", "b1", "w2", "b2")]
    return function(*positional, residual=tensors["residual"], **options, **more)


def in_float64(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values; where residual is x, it stays so."""
    wide = {name: t if t is None else t.detach().double() for name, t in tensors.items()}
    if tensors["residual"] is tensors["x"]:
        wide["residual"] = wide["x"]
    return wide


def truth(tensors: dict[str, Tensor | None], options: dict) -> Tensor:
    return call(reference.squeeze_excite, in_float64(tensors), options)


def in_pytorch(tensors: dict[str, Tensor | None], options: dict) -> Tensor:
    """What eager PyTorch computes in the tensors' own precision, without oneDNN: where there is AVX-512, its gelu of
    infinity is NaN."""
    with torch.backends.mkldnn.flags(enabled=False):
        return call(reference.squeeze_excite, tensors, options)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "y", factor: float = 1) -> None:
    """`actual` of `dtype` against a float64 truth; on failure the worst position and the share of wrong elements."""
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
