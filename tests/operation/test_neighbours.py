"""The CPU kernels with a batch norm before the activation, and with the gates as the result."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from se_fused import reference
from se_fused.backends import CPU
from se_fused.cases import TOLERANCE
from se_fused.options import ACTIVATIONS, FUNCTIONS, SQUEEZES, Options

_MAP_ACTS = [None, *list(ACTIVATIONS)[1:]]


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    n=st.integers(1, 7), c=st.integers(1, 70), sides=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    pre_act=st.sampled_from(_MAP_ACTS), post_act=st.sampled_from(_MAP_ACTS), squeeze=st.sampled_from(SQUEEZES),
    residual=st.sampled_from([None, "x", "own"]), inplace=st.booleans(), channels_last=st.booleans(),
    norm=st.booleans(), gates=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_formula(
    dtype, n, c, sides, pre_act, post_act, squeeze, residual, inplace, channels_last, norm, gates, seed
) -> None:
    """u = pre_act(scale * x + shift), and y = post_act(u * s + residual) or, with `gates`, u and s."""
    torch.manual_seed(seed)
    accumulated = torch.promote_types(dtype, torch.float32)
    x = torch.randn(n, c, *sides).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weights = [t.to(dtype) for t in (torch.randn(8, c) / c**0.5, torch.randn(8), torch.randn(c, 8) / 3, torch.randn(c))]
    scale, shift = (torch.randn(c).to(accumulated) if norm else None for _ in range(2))
    options = Options.of(squeeze=squeeze, pre_act=pre_act, post_act=None if gates else post_act)
    added = None if residual is None or gates else x if residual == "x" else torch.randn_like(x)
    before, exact_residual = x.clone(), None if added is None else added.double().clone()
    s = torch.full((n, c), torch.nan, dtype=accumulated) if gates else None
    y = CPU.fast_path(x, *weights, added, *options, inplace=inplace, scale=scale, shift=shift, s=s)
    assert y is not None
    assert (y is x) == inplace
    assert inplace or torch.equal(x, before)

    v = before.double()
    if norm:
        v = v * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    u = FUNCTIONS[options.pre_act](v)
    exact_s = options.apply_gate(reference.before_gate(u, *(t.double() for t in weights), options)[2])
    wanted = u * exact_s[..., None, None] + (0 if exact_residual is None else exact_residual)
    wanted = u if gates else FUNCTIONS[options.post_act](wanted)
    bound = 4 * TOLERANCE[dtype]
    assert float((y.double() - wanted).abs().max()) <= bound * max(1.0, float(wanted.abs().max()), float(v.abs().max()))
    if gates:
        assert float((s.double() - exact_s).abs().max()) <= bound


def test_what_the_kernels_refuse() -> None:
    """Vectors of another length or dtype, or one without the other."""
    x, w1, w2 = torch.randn(2, 8, 3, 3), torch.randn(4, 8), torch.randn(8, 4)
    one = torch.ones(8)
    options = Options.of()
    for scale, shift, s in (
        (one, None, None),
        (None, one, None),
        (one[:7], one, None),
        (one, one.double(), None),
        (one, one, torch.empty(8, 2)),
        (one, one, torch.empty(2, 8, dtype=torch.float64)),
    ):
        assert (
            CPU.fast_path(x, w1, None, w2, None, None, *options, inplace=False, scale=scale, shift=shift, s=s) is None
        )
