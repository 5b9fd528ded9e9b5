"""The layers that are recognised, with their formulas, and those that are refused, with the reasons."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from se_candidates import ACCEPTED, REFUSED, UNMENTIONED
from se_layers import (
    Classic,
    Convolutional,
    Dropping,
    OneLayer,
)
from torch import nn

from examples import zoo
from se_fused import invariance
from se_fused.recognise import recognise
from se_fused.recognised import Recognised

zoo.import_torchvision()
from timm.layers import SEModule  # noqa: E402
from torchvision.ops import SqueezeExcitation  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepts(case: str) -> None:
    make, wanted = ACCEPTED[case]
    got = recognise(make())
    assert isinstance(got, Recognised), got
    assert (got.channels, got.hidden, got.act, got.gate, got.squeeze, got.residual, got.dims) == wanted


def test_names_of_parameters_follow_the_calls_and_not_the_registration() -> None:
    got = recognise(nn.Sequential(Convolutional()))
    assert isinstance(got, Recognised)
    assert (got.w1, got.b1, got.w2, got.b2) == ("0.down.weight", "0.down.bias", "0.up.weight", "0.up.bias")
    got = recognise(OneLayer())
    assert isinstance(got, Recognised)
    assert (got.w1, got.b1, got.w2, got.b2) == (None, None, "fc.weight", "fc.bias")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    make, reason = REFUSED[case]
    got = recognise(make())
    assert isinstance(got, str), got
    assert re.search(reason, got), got


@pytest.mark.parametrize("case", UNMENTIONED)
def test_does_not_mention(case: str) -> None:
    assert recognise(UNMENTIONED[case]()) is None


@pytest.mark.parametrize("make", [Classic, partial(SEModule, 32, norm_layer=nn.BatchNorm2d), Dropping])
def test_leaves_no_trace(make) -> None:
    layer = make().train()
    layer(torch.randn(2, next(layer.parameters()).shape[0] if make is Dropping else 32, 3, 2)).sum().backward()
    for p in layer.parameters():
        p.requires_grad_(False)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    grads = [p.grad.clone() for p in layer.parameters()]
    hidden = {name: vars(m).keys() for name, m in layer.named_modules()}
    rng = torch.get_rng_state()
    recognise(layer)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())
    assert all(torch.equal(p.grad, g) and not p.requires_grad for p, g in zip(layer.parameters(), grads, strict=True))
    assert all(m.training for m in layer.modules())
    assert {name: vars(m).keys() for name, m in layer.named_modules()} == hidden


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_not_looked_at(dtype: torch.dtype) -> None:
    layer = SqueezeExcitation(24, 6).to(dtype)
    for p in layer.parameters():
        nn.init.zeros_(p)
    assert isinstance(recognise(layer), Recognised)
    with torch.device("meta"):
        assert isinstance(recognise(SqueezeExcitation(24, 6)), Recognised)


SHAPES = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "transposed": (3, 1, 0, 2)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("order", SHAPES)
def test_the_quicker_operators_on_the_meta_device_give_the_same(order: str, dtype: torch.dtype) -> None:
    dense = torch.empty(2, 3, 5, 7, dtype=dtype, device="meta").permute(SHAPES[order]).contiguous()
    x = dense.permute(torch.tensor(SHAPES[order]).argsort().tolist())
    aten, matrix = torch.ops.aten, torch.empty(4, 4, dtype=dtype, device="meta")
    activations = invariance._LIKE_SIGMOID - {aten.clamp.default}
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.mean.dim, (x, [2, 3], True), {}),
        (aten.mean.dim, (x, [1]), {"dtype": torch.float32}),
        (aten.addmm.default, (matrix[0], matrix, matrix.t()), {}),
        (aten.addmm.default, (matrix[0].to(torch.complex64), matrix, matrix), {}),
        (aten.addmm.default, (matrix[0].double(), matrix, matrix), {}),
        (aten.clamp.default, (x, 0, 1), {}),
        (aten.clamp.default, (torch.empty(3, dtype=torch.int64, device="meta"), 0.5), {}),
        *((func, (given,), {}) for func in activations for given in (x, x[:, ::2], x[0, 0, 0, 0])),
    ]
    for func, args, kwargs in calls:
        got, wanted = invariance._on_meta(func, args, kwargs), func(*args, **kwargs)
        facts = [(y.shape, y.stride(), y.dtype, y.device, y.storage_offset()) for y in (got, wanted)]
        assert facts[0] == facts[1], func


def test_works_under_any_mode() -> None:
    layer = SqueezeExcitation(24, 6)
    wanted = recognise(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert recognise(layer) == wanted
    with torch.inference_mode():
        assert recognise(layer) == wanted
    with torch.enable_grad():
        assert recognise(layer) == wanted
    torch.set_default_dtype(torch.float64)
    try:
        assert recognise(layer) == wanted
    finally:
        torch.set_default_dtype(torch.float32)
