"""The layers that are recognised, with their formulas, and those that are refused, with the reasons."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from se_layers import (
    Classic,
    Convolutional,
    Dropping,
    OneLayer,
    Parameters,
    Plus,
    Residual,
    Twice,
    TwoInputs,
    WithParameter,
    classic_in_mobilenet,
    hooked,
    overridden,
    prepared,
    subclassed,
    two_dtypes,
    varied,
    weight_normed,
)
from torch import nn
from torch.nn.utils import parametrizations

from examples import zoo
from se_fused.options import HardSigmoid
from se_fused.recognise import recognise
from se_fused.recognised import Recognised

zoo.import_torchvision()
from timm.layers import EcaModule, EffectiveSEModule, SEModule  # noqa: E402
from timm.layers.cbam import ChannelAttn  # noqa: E402
from timm.layers.squeeze_excite import SqueezeExciteCl  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite as EfficientNetSE  # noqa: E402
from timm.models.senet import SEModule as LegacySE  # noqa: E402
from torchvision.ops import SqueezeExcitation  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PYTORCH_HARD = HardSigmoid(1 / 6, 1 / 2)


# layer, then C, R, act, gate, squeeze, residual, ranks of x
ACCEPTED = {
    "classic": (Classic, (32, 8, "relu", "sigmoid", "mean", False, (4,))),
    "classic, hard gate": (classic_in_mobilenet, (32, 8, "relu", PYTORCH_HARD, "mean", False, (4,))),
    "classic, R = 1": (partial(Classic, 8, 8), (8, 1, "relu", "sigmoid", "mean", False, (4,))),
    "classic, R = C": (partial(Classic, 8, 1), (8, 8, "relu", "sigmoid", "mean", False, (4,))),
    "classic, 1-D": (partial(Classic, pool=nn.AdaptiveAvgPool1d), (32, 8, "relu", "sigmoid", "mean", False, (3,))),
    "classic, 3-D": (partial(Classic, pool=nn.AdaptiveAvgPool3d), (32, 8, "relu", "sigmoid", "mean", False, (5,))),
    "torchvision": (partial(SqueezeExcitation, 24, 6), (24, 6, "relu", "sigmoid", "mean", False, (4,))),
    "torchvision, efficientnet": (
        partial(SqueezeExcitation, 24, 6, activation=partial(nn.SiLU, inplace=True)),
        (24, 6, "silu", "sigmoid", "mean", False, (4,)),
    ),
    "torchvision, mobilenet": (
        partial(SqueezeExcitation, 24, 6, scale_activation=nn.Hardsigmoid),
        (24, 6, "relu", PYTORCH_HARD, "mean", False, (4,)),
    ),
    "timm, mean and max": (
        partial(SEModule, 32, add_maxpool=True),
        (32, 8, "relu", "sigmoid", "mean_max", False, (4,)),
    ),
    "timm, no bias": (partial(SEModule, 32, bias=False), (32, 8, "relu", "sigmoid", "mean", False, (4,))),
    "timm, efficientnet": (partial(EfficientNetSE, 32), (32, 8, "relu", "sigmoid", "mean", False, (4,))),
    "timm, legacy": (partial(LegacySE, 32, 16), (32, 2, "relu", "sigmoid", "mean", False, (4,))),
    "timm, effective": (partial(EffectiveSEModule, 32), (32, None, None, PYTORCH_HARD, "mean", False, (4,))),
    "timm, effective, mean and max": (
        partial(EffectiveSEModule, 32, add_maxpool=True, gate_layer="sigmoid"),
        (32, None, None, "sigmoid", "mean_max", False, (4,)),
    ),
    "1-D": (partial(Convolutional, conv=nn.Conv1d), (24, 6, "relu", "sigmoid", "mean", False, (3,))),
    "3-D": (partial(Convolutional, conv=nn.Conv3d), (24, 6, "relu", "sigmoid", "mean", False, (5,))),
    "R > C": (partial(Convolutional, 6, 24), (6, 24, "relu", "sigmoid", "mean", False, (4,))),
    "pooling by a full kernel": (
        partial(varied, squeeze=lambda x: F.avg_pool2d(x, x.shape[2:])),
        (24, 6, "relu", "sigmoid", "mean", False, (4,)),
    ),
    "Paddle's hard sigmoid": (
        partial(varied, gate=lambda v: (0.2 * v + 0.5).clamp(0, 1)),
        (24, 6, "relu", HardSigmoid(0.2, 0.5), "mean", False, (4,)),
    ),
    "Paddle's as relu6": (
        partial(varied, gate=lambda v: F.relu6(1.2 * v + 3) / 6),
        (24, 6, "relu", HardSigmoid(0.2, 0.5), "mean", False, (4,)),
    ),
    "early mmcv's hard sigmoid": (
        partial(varied, gate=lambda v: ((v + 1) / 2).clamp_(0, 1)),
        (24, 6, "relu", HardSigmoid(0.5, 0.5), "mean", False, (4,)),
    ),
    "residual, 3-D, Linear": (Residual, (16, 8, "leaky_relu", "relu", "mean", True, (5,))),
    "residual by a wrapper": (lambda: Plus(Classic()), (32, 8, "relu", "sigmoid", "mean", True, (4,))),
    "residual, hard gate": (
        partial(varied, gate=F.hardsigmoid, scale=lambda x, s: x + x * s),
        (24, 6, "relu", PYTORCH_HARD, "mean", True, (4,)),
    ),
    "identity gate": (partial(varied, gate=lambda v: v), (24, 6, "relu", "identity", "mean", False, (4,))),
    "in a Sequential": (lambda: nn.Sequential(Classic()), (32, 8, "relu", "sigmoid", "mean", False, (4,))),
    "one Linear": (OneLayer, (12, None, None, "tanh", "mean", False, (4,))),
    "bare parameters": (Parameters, (20, 20, "silu", "sigmoid", "max", False, (4,))),
    **{
        f"timm, {act.__name__}": (partial(SEModule, 32, act_layer=act), (32, 8, name, "sigmoid", "mean", False, (4,)))
        for act, name in [
            (nn.SiLU, "silu"),
            (nn.GELU, "gelu"),
            (nn.LeakyReLU, "leaky_relu"),
            (nn.Hardswish, "hardswish"),
            (nn.ReLU6, "relu6"),
            (nn.Mish, "mish"),
            (nn.Tanh, "tanh"),
            (nn.Sigmoid, "sigmoid"),
            (nn.Identity, "identity"),
        ]
    },
    **{
        f"act as {name}": (partial(varied, act=act), (24, 6, name, "sigmoid", "mean", False, (4,)))
        for name, act in {
            "gelu_tanh": partial(F.gelu, approximate="tanh"),
            "mish": lambda v: v * torch.tanh(F.softplus(v)),
            "silu": lambda v: v.mul_(v.sigmoid()),
            "hardswish": lambda v: v * F.relu6(v + 3) / 6,
        }.items()
    },
}


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


SQUEEZE = r"its squeeze is not the mean.* over all positions of a map \[N, C, \*spatial\]"
ACT = "its activation is none of"
OUTPUT = "its output is not"
REFUSED = {
    "mean over two of three axes": (
        lambda: type("NnUnet", (Convolutional,), {"squeeze": lambda s, x: x.mean((2, 3), keepdim=True)})(
            conv=nn.Conv3d
        ),
        SQUEEZE,
    ),
    "pooling by a square kernel": (partial(varied, squeeze=lambda x: F.avg_pool2d(x, x.size(3))), SQUEEZE),
    "pooling to 2x2": (partial(varied, squeeze=lambda x: F.adaptive_avg_pool2d(x, 2).mean(2, keepdim=True)), SQUEEZE),
    "sum of squares": (partial(varied, squeeze=lambda x: x.square().mean((2, 3), keepdim=True)), SQUEEZE),
    "channels at the end": (partial(SqueezeExciteCl, 32), SQUEEZE),
    "batch normalisation": (partial(SEModule, 32, norm_layer=nn.BatchNorm2d), "it holds buffers.*bn.running_mean"),
    "PReLU": (partial(SEModule, 32, act_layer=nn.PReLU), "it uses parameters beside those of its layers: act.weight"),
    "leaky ReLU of slope 0.2": (partial(varied, act=partial(F.leaky_relu, negative_slope=0.2)), ACT),
    "quick GELU": (partial(varied, act=lambda v: v * torch.sigmoid(1.702 * v)), ACT),
    "softmax gate": (partial(varied, gate=lambda v: v.softmax(1)), OUTPUT),
    "hard sigmoid up to 0.9": (partial(varied, gate=lambda v: (v / 6 + 0.5).clamp(0, 0.9)), OUTPUT),
    "2 * sigmoid": (partial(varied, gate=lambda v: 2 * torch.sigmoid(v)), OUTPUT),
    "shifted": (partial(varied, scale=lambda x, s: x * s + 1), OUTPUT),
    "activation after": (partial(varied, scale=lambda x, s: F.relu(x * s)), OUTPUT),
    "gain": (WithParameter, "it uses parameters beside those of its layers: gain"),
    "CBAM": (partial(ChannelAttn, 32), "its layers are applied more than once: fc1.weight 2 times"),
    "applied twice": (Twice, "its layers are applied more than once"),
    "dropout": (Dropping, "it draws random numbers in train mode"),
    "writes its input": (partial(varied, scale=lambda x, s: x.mul_(s)), "it writes over its input"),
    "two inputs": (TwoInputs, "it needs 2 inputs"),
    "depends on the size": (
        partial(varied, scale=lambda x, s: x * s * (1 + (x.shape[2] == 4))),
        r"its output differs from the formula by 1\.0e\+00 .* in eval mode",
    ),
    "forward hook on a child": (lambda: hooked("register_forward_hook", Classic()), "its fc.0 has hooks"),
    "pre-hook on a child": (lambda: hooked("register_forward_pre_hook", Classic()), "its fc.0 has hooks"),
    "backward hook on a child": (lambda: hooked("register_full_backward_hook", Classic()), "its fc.0 has hooks"),
    "weight_norm": (lambda: weight_normed(parametrizations.weight_norm), "its fc.0 is reparametrised"),
    "spectral_norm": (lambda: weight_normed(parametrizations.spectral_norm), "its fc.0 is reparametrised"),
    "old weight_norm": (lambda: weight_normed(nn.utils.weight_norm), "its fc.0 is reparametrised"),
    "prepared for quantisation": (prepared, "its fc1 is quantised or prepared"),
    "subclassed parameter": (subclassed, "its fc.0.weight is a Special"),
    "two dtypes": (two_dtypes, "its parameters are of several dtypes"),
    "scripted": (lambda: torch.jit.script(SqueezeExcitation(24, 6)), "it is scripted"),
    "forward overridden": (overridden, "its forward is overridden"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    make, reason = REFUSED[case]
    got = recognise(make())
    assert isinstance(got, str), got
    assert re.search(reason, got), got


UNMENTIONED = {
    "MLP": lambda: nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid()),
    "residual MLP": lambda: Plus(nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))),
    "pair of 1x1 convolutions": lambda: Plus(nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1))),
    "head": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16)),
    "gate alone": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1)),
    "ECA": lambda: EcaModule(16),
    "3x3 convolutions": lambda: nn.Sequential(nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(4, 16, 3, padding=1)),
    "Linear": lambda: nn.Linear(16, 16),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 16)),
    "embedding": lambda: nn.Sequential(nn.Embedding(16, 4), nn.Linear(4, 16)),
    "bilinear": lambda: nn.Bilinear(4, 4, 4),
    "no parameters": nn.ReLU,
}


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
