"""The CPU kernels for what stands around an SE layer: a batch norm before it, the gates as a result, and batch norms
by themselves or in the weights of a convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from norms import DTYPES, assert_near, exact, map_of, norm_of

from se_fused import reference
from se_fused.backends import CPU
from se_fused.options import ACTIVATIONS, FUNCTIONS, SQUEEZES, Options

_MAP_ACTS = [None, *list(ACTIVATIONS)[1:]]


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES), n=st.integers(1, 7), c=st.integers(1, 70),
    sides=st.tuples(st.integers(1, 40), st.integers(1, 40)), pre_act=st.sampled_from(_MAP_ACTS),
    post_act=st.sampled_from(_MAP_ACTS), squeeze=st.sampled_from(SQUEEZES),
    residual=st.sampled_from([None, "x", "own"]), inplace=st.booleans(), channels_last=st.booleans(),
    has_norm=st.booleans(), gates=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_layer(
    dtype, n, c, sides, pre_act, post_act, squeeze, residual, inplace, channels_last, has_norm, gates, seed
) -> None:
    """u = pre_act(norm(x)), and y = post_act(u * s + residual) or, with `gates`, u and s."""
    torch.manual_seed(seed)
    x = map_of(n, c, sides, dtype, channels_last)
    weights = [t.to(dtype) for t in (torch.randn(8, c) / c**0.5, torch.randn(8), torch.randn(c, 8) / 3, torch.randn(c))]
    norm = norm_of(c, dtype) if has_norm else None
    options = Options.of(squeeze=squeeze, pre_act=pre_act, post_act=None if gates else post_act)
    added = None if residual is None or gates else x if residual == "x" else torch.randn_like(x)
    before, exact_residual = x.clone(), None if added is None else added.double().clone()
    s = torch.full((n, c), torch.nan, dtype=torch.promote_types(dtype, torch.float32)) if gates else None
    y = CPU.unchecked.forward(x, *weights, added, x if inplace else None, *options, None, None, norm, s)
    assert y is not None
    assert (y is x) == inplace
    assert inplace or torch.equal(x, before)

    v = before.double() if norm is None else exact(before, norm)
    u = FUNCTIONS[options.pre_act](v)
    exact_s = options.apply_gate(reference.before_gate(u, *(t.double() for t in weights), options)[2])
    wanted = u * exact_s[..., None, None] + (0 if exact_residual is None else exact_residual)
    assert_near(y, u if gates else FUNCTIONS[options.post_act](wanted), dtype, v)
    if gates:
        assert_near(s, exact_s, dtype)


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES), single=st.booleans(), n=st.integers(1, 7), c=st.integers(1, 70),
    sides=st.tuples(st.integers(1, 40), st.integers(1, 40)), act=st.sampled_from(list(ACTIVATIONS)),
    residual=st.booleans(), affine=st.booleans(), inplace=st.booleans(), channels_last=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_batch_norm(dtype, single, n, c, sides, act, residual, affine, inplace, channels_last, seed) -> None:
    """act(norm(x) + residual). single: the batch norm is of float32 beside a half-precision map."""
    torch.manual_seed(seed)
    x = map_of(n, c, sides, dtype, channels_last)
    norm = norm_of(c, torch.float32 if single and dtype.itemsize == 2 else dtype, affine)
    added, before = torch.randn_like(x) if residual else None, x.clone()
    y = CPU.unchecked.batch_norm(x, added, inplace, list(ACTIVATIONS).index(act), norm)
    assert y is not None
    assert (y is x) == inplace
    assert inplace or torch.equal(x, before)
    assert y.stride() == before.stride()
    v = exact(before, norm) + (0 if added is None else added.double())
    assert_near(y, ACTIVATIONS[act](v), dtype, v)


def test_special_values() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0]).view(1, 1, 4).repeat(2, 3, 1)
    for act, function in ACTIVATIONS.items():
        norm = norm_of(3, torch.float32)
        y = CPU.unchecked.batch_norm(x, None, False, list(ACTIVATIONS).index(act), norm)
        torch.testing.assert_close(y.double(), function(exact(x, norm)), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_fold() -> None:
    for dtype in (torch.float32, torch.float64):
        for bias in (None, torch.randn(5).to(dtype)):
            norm = norm_of(5, dtype, affine=bias is None)
            weight, x = torch.randn(5, 7, 1, 3).to(dtype), torch.randn(2, 7, 4, 6).to(dtype)
            folded = CPU.unchecked.fold(weight, bias, norm)
            assert folded is not None
            wanted = exact(F.conv2d(x.double(), weight.double(), None if bias is None else bias.double()), norm)
            assert_near(F.conv2d(x, *folded), wanted, dtype)


def test_what_the_kernels_refuse() -> None:
    """Vectors of another length or dtype, statistics that are missing, maps that are not dense."""
    x, w1, w2 = torch.randn(2, 8, 3, 3), torch.randn(4, 8), torch.randn(8, 4)
    one, options = torch.ones(8), Options.of()
    norms = [
        (one[:7], one, one, one, 1e-5), (one, one.double(), one, one, 1e-5), (one, one, None, None, 1e-5),
        (one, one, one.double(), one.double(), 1e-5), (one.half(), one.half(), one.half(), one.half(), 1e-5),
        (one, one, torch.ones(16)[::2], one, 1e-5), (one, one, one, one.to("meta"), 1e-5),
    ]  # fmt: skip
    for norm in norms:
        assert CPU.unchecked.forward(x, w1, None, w2, None, None, None, *options, None, None, norm, None) is None
        assert CPU.unchecked.batch_norm(x, None, False, 0, norm) is None
        assert CPU.unchecked.fold(torch.randn(8, 8, 1, 1), None, norm) is None
    for s in (torch.empty(8, 2), torch.empty(2, 8, dtype=torch.float64)):
        assert CPU.unchecked.forward(x, w1, None, w2, None, None, None, *options, None, None, None, s) is None
    norm = (one, one, one, one, 1e-5)
    assert CPU.unchecked.batch_norm(x, None, False, 0, norm) is not None
    for other in (x[..., ::2], x[0], x[:0], None):
        assert CPU.unchecked.batch_norm(other, None, False, 0, norm) is None
    for residual in (x[:1], x.double(), x.mT):
        assert CPU.unchecked.batch_norm(x, residual, False, 0, norm) is None
    overlapping = torch.randn(3, 8, 3, 3)
    assert CPU.unchecked.batch_norm(overlapping[1:], overlapping[:2], True, 0, norm) is None
    assert CPU.unchecked.batch_norm(x, None, False, len(ACTIVATIONS) + 1, norm) is None
    half = (*(t.half() for t in norm[:4]), 1e-5)
    assert CPU.unchecked.fold(torch.randn(8, 8, 1, 1).half(), None, half) is None
