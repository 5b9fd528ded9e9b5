"""`replace(model, level="block")`: which neighbours are found, and that the results are equal."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from se_blocks import (
    ACTS,
    UNJOINED,
    ActsBeforeSum,
    Autocasts,
    Both,
    Broadcast,
    BroadcastsShortcut,
    C,
    Clamped,
    Clips,
    Counts,
    Deep,
    IntoShortcut,
    Inverted,
    NormWritesBetween,
    ReadsSums,
    ReadTwice,
    Residual,
    WidensShortcut,
    WritesBetween,
    assert_same,
    drawn,
    image,
)
from se_layers import Plus, SqueezeExcitation
from torch import nn

from examples import zoo
from se_fused import replace, restore
from se_fused.blocks import FusedBlock

pytestmark = pytest.mark.usefixtures("one_thread", "known_layers")


def found_in(model: nn.Module) -> list[str]:
    return [str(each) for block in replace(model, level="block").blocks.values() for each in block]


@pytest.mark.parametrize("dims", [3, 4, 5])
@pytest.mark.parametrize("act", ACTS)
def test_inverted_residual(act: str, dims: int) -> None:
    model = drawn(Inverted(act, dims))
    original = copy.deepcopy(model)
    found = "bn1 + " + (f"{act} + " if act != "identity" else "") + "se + project + bn2 + residual, in place"
    assert found_in(model) == [found]
    assert isinstance(model, FusedBlock)
    assert isinstance(model, Inverted)
    for n in (1, 2, 5):
        x = image(n, dims)
        before = x.clone()
        with torch.no_grad():
            assert_same(model(x), original(x))
        assert torch.equal(x, before)


def test_other_batch_norms() -> None:
    model = drawn(Deep())
    original = copy.deepcopy(model)
    assert found_in(model) == ["bn1 + silu + se + project + bn2 + residual + relu, in place"]
    joined = ["bn_in + relu", "expand + bn0 + silu, in place", "shortcut + bn3, in place"]
    assert all(f"fused: {each}" in repr(model) for each in joined)
    x = image()
    before = x.clone()
    with torch.no_grad():
        assert_same(model(x), original(x))
    assert torch.equal(x, before)


def test_new_maps_are_overwritten() -> None:
    model = drawn(ReadsSums())
    replace(model, level="block")
    assert all(f"fused: {each} + relu, in place" in repr(model) for each in ("bn0", "bn3"))


def test_residual() -> None:
    model = drawn(Residual())
    original = copy.deepcopy(model)
    assert found_in(model) == ["bn + se + residual + relu, in place"]
    x = image()
    before = x.clone()
    with torch.no_grad():
        assert_same(model(x), original(x))
    assert torch.equal(x, before)


@settings(max_examples=60, deadline=None)
@given(
    block=st.sampled_from([Inverted, Deep]), act=st.sampled_from(sorted(ACTS)), bias=st.booleans(),
    affine=st.booleans(), n=st.integers(1, 20), sides=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels_last=st.booleans(), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_any_map(block, act, bias, affine, n, sides, channels_last, seed, dtype) -> None:
    model = drawn(block(act, bias=bias, affine=affine), seed).to(dtype)
    original, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    replace(model, level="block")
    x = torch.randn(n, C, *sides).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        got, eager, wanted = model(x), original(x), exact(x.double())
    assert got.dtype is dtype
    assert got.stride() == eager.stride()
    of = [float((y.double() - wanted).abs().max() / wanted.abs().max()) for y in (got, eager)]
    assert of[0] <= 2 * of[1] + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "name",
    [
        "timm:efficientnet_b0", "timm:mobilenetv3_small_100", "timm:seresnet50", "timm:regnety_002", "timm:mixnet_s",
        "timm:tresnet_m", "timm:hgnet_small", "timm:ghostnet_100", "torchvision:mobilenet_v3_small",
        "torchvision:efficientnet_b0",
    ],
)  # fmt: skip
def test_models(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 160, 128)
    model = zoo.settled(zoo.build(name), x)
    original, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    report = replace(model, level="block")
    assert len(report.replaced) == sum(map(len, report.blocks.values())) + len(report.alone)
    assert len(report.blocks) > 0
    with torch.no_grad():
        got, eager, wanted = model(x), original(x), exact(x.double())
        of = [float((y.double() - wanted).abs().max() / wanted.abs().max()) for y in (got, eager)]
        assert of[0] <= max(1e-5, 3 * of[1])
        restore(model)
        assert torch.equal(model(x), eager)
    assert not any(isinstance(module, FusedBlock) for module in model.modules())


@pytest.mark.parametrize(
    "block",
    [
        *(Broadcast, WritesBetween, Both, Clamped, IntoShortcut, NormWritesBetween, ActsBeforeSum, ReadTwice),
        ReadsSums,
        *(BroadcastsShortcut, WidensShortcut, *UNJOINED),
    ],
)
def test_what_is_not_joined(block: type[nn.Module]) -> None:
    """A block is left alone, or joined without what another reads; in both cases it computes what it did."""
    torch.manual_seed(0)  # with huge maps some weights make a gate whose rounding exceeds the tolerance
    model = drawn(block())
    original = copy.deepcopy(model)
    report = replace(model, level="block")
    assert list(report.replaced) == ["se"]
    if block in UNJOINED:
        assert list(report.alone) == ["se"]
    for factor in (1, 1e5):
        xs = [image() * factor] * 2
        ys = []
        for each in (model, original):
            torch.manual_seed(1)
            x = xs[0].clone()
            with torch.no_grad():
                ys.append((each(x), x))
        for got, wanted in zip(*ys, strict=True):
            assert_same(got, wanted, 3e-2 if block is Autocasts else 1e-5)
    if block is Counts:
        assert model.calls == original.calls == 2


def test_infinite_numbers_reach_who_read_them() -> None:
    model, x = drawn(Clips()), image()
    x[0, 0] = torch.inf
    original = copy.deepcopy(model)
    replace(model, level="block")
    with torch.no_grad():
        assert torch.equal(model(x).isnan(), original(x).isnan())


def test_a_batch_norm_of_tiny_scale_in_float16() -> None:
    """The weights of the convolution times the scale of the batch norm, 1e-7, are below the numbers of float16."""
    model = drawn(Inverted("relu"))
    with torch.no_grad():
        model.bn1.bias.fill_(1e4)
        model.project.weight.mul_(1e-3)
        for t, value in (("weight", 0.1), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 6e4)):
            getattr(model.bn2, t).fill_(value)
    model = model.half()
    exact = copy.deepcopy(model).double()
    replace(model, level="block")
    x = torch.zeros_like(image())  # without the residual
    with torch.no_grad():
        wanted, got = exact(x.double()), model(x.half())
    assert wanted.abs().max() > 1e-4
    assert float((got.double() - wanted).abs().max()) <= 1e-2 * float(wanted.abs().max())


def test_the_residual_of_the_layer_itself() -> None:
    """x * (1 + s) of a layer after a batch norm: its residual is not the map before that."""
    model = drawn(
        nn.Sequential(
            nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU(), Plus(SqueezeExcitation(C, 4)), nn.Conv2d(C, C, 1)
        )
    )
    original, x = copy.deepcopy(model), image()
    assert len(replace(model, level="block").replaced) == 1
    with torch.no_grad():
        assert_same(model(x), original(x))


def test_no_call_reads_what_it_was_not_made_for() -> None:
    model, x = drawn(Inverted()), image()
    original = copy.deepcopy(model)
    replace(model, level="block")
    with torch.no_grad():
        assert model(x[:0]).shape == original(x[:0]).shape
        for strided in (x[:, :, ::2], x.mT, x.expand(3, 2, C, 9, 8)[1]):
            assert_same(model(strided), original(strided))
        with pytest.raises(RuntimeError, match="channels"):
            model(torch.randn(2, C + 1, 9, 8))
        with pytest.raises(RuntimeError, match=r"dtype|type"):
            model(x.double())


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"replace: level is 'network'; wanted 'layer' or 'block'"):
        replace(nn.Identity(), level="network")
    model = drawn(Inverted())
    report = replace(model, level="block", dry_run=True)
    assert len(report.blocks) == 1
    assert type(model) is Inverted
    assert type(model.se) is SqueezeExcitation
    assert "bn1 + silu + se + project + bn2 + residual, in place" in str(report)


def test_report_says_how_convolutions_are_computed() -> None:
    model = nn.Sequential(drawn(Deep()), nn.Conv2d(C, 40, 1), nn.AdaptiveAvgPool2d(1)).eval()
    report = replace(model, level="block")
    found = report.convolutions(image(1))
    assert found.keys() == {"0.expand", "0.project", "0.shortcut"}
    assert found["0.expand"] == "product of 1x16x9x8 to 16 channels: 0.0 million multiplications; products up to 20"
    assert report.convolutions(image(3))["0.project"].startswith(
        "folded of 3x16x9x8 to 16 channels: Cin Cout / L is 3.6"
    )
    last = image(2).to(memory_format=torch.channels_last)
    assert report.convolutions(last)["0.project"] == "convolution of 2x16x9x8 to 16 channels: channels_last"
    model[0].project.eps = 1  # any change
    assert report.convolutions(image()) == {}
    model.train()
    with pytest.raises(ValueError, match=r"Report.convolutions: the model is in training mode"):
        report.convolutions(image())
