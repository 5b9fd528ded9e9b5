"""Layers that `recognise` accepts, with their formulas; refuses, with the reasons; and does not mention."""

from __future__ import annotations

from functools import partial

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
    with_buffer,
)
from torch import nn
from torch.nn.utils import parametrizations

from examples import zoo
from se_fused.options import HardSigmoid

zoo.import_torchvision()
from timm.layers import EcaModule, EffectiveSEModule, SEModule  # noqa: E402
from timm.layers.cbam import ChannelAttn  # noqa: E402
from timm.layers.squeeze_excite import SqueezeExciteCl  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite as EfficientNetSE  # noqa: E402
from timm.models.senet import SEModule as LegacySE  # noqa: E402
from torchvision.ops import SqueezeExcitation  # noqa: E402

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
    "channels at the end": (partial(SqueezeExciteCl, 32), (32, 8, "relu", "sigmoid", "mean", False, (4,))),
    "batch normalisation": (
        partial(SEModule, 32, norm_layer=nn.BatchNorm2d),
        (32, 8, "relu", "sigmoid", "mean", False, (4,)),
    ),
    "2 * sigmoid": (
        partial(varied, gate=lambda v: 2 * torch.sigmoid(v)),
        (24, 6, "relu", "sigmoid", "mean", False, (4,)),
    ),
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


class AsksForAutocast(Convolutional):
    def forward(self, x):
        return super().forward(x) * (3 if torch.is_autocast_enabled("cpu") else 1)


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
    "another buffer": (with_buffer, "it holds buffers: gain"),
    "PReLU": (partial(SEModule, 32, act_layer=nn.PReLU), "it uses parameters beside those of its layers: act.weight"),
    "leaky ReLU of slope 0.2": (
        partial(varied, act=partial(F.leaky_relu, negative_slope=0.2)),
        "leaky ReLU of slope 0.2",
    ),
    "quick GELU": (partial(varied, act=lambda v: v * torch.sigmoid(1.702 * v)), "is quick GELU, none of"),
    "softmax gate": (partial(varied, gate=lambda v: v.softmax(1)), OUTPUT),
    "hard sigmoid up to 0.9": (partial(varied, gate=lambda v: (v / 6 + 0.5).clamp(0, 0.9)), OUTPUT),
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
    "asks for autocast": (
        partial(varied, gate=lambda v: v.sigmoid() * (3 if torch.is_autocast_enabled("cpu") else 1)),
        "a forward in it asks for is_autocast_enabled",
    ),
    "asks for inference mode": (
        partial(varied, gate=lambda v: v.sigmoid() * (3 if torch.is_inference_mode_enabled() else 1)),
        "a forward in it asks for is_inference_mode_enabled",
    ),
    "asks for autocast, below super().forward": (
        lambda: type("Own", (AsksForAutocast,), {"forward": lambda m, x: super(type(m), m).forward(x)})(),
        "a forward in it asks for is_autocast_enabled",
    ),
    "asks for autocast in a property": (
        lambda: type(
            "Own",
            (Convolutional,),
            {
                "factor": property(lambda m: 3 if torch.is_autocast_enabled("cpu") else 1),
                "squeeze": lambda m, x: x.mean((2, 3), keepdim=True) * m.factor,
            },
        )(),
        "a forward in it asks for is_autocast_enabled",
    ),
    "float32 in training": (
        lambda: type(
            "Own",
            (Convolutional,),
            {
                "squeeze": lambda m, x: (
                    x.mean((2, 3), keepdim=True) * (2 if m.training and x.dtype == torch.float32 else 1)
                )
            },
        )(),
        "it does not compute on a map of",
    ),
    "weight_norm": (lambda: weight_normed(parametrizations.weight_norm), "its fc.0 is reparametrised"),
    "spectral_norm": (lambda: weight_normed(parametrizations.spectral_norm), "its fc.0 is reparametrised"),
    "old weight_norm": (lambda: weight_normed(nn.utils.weight_norm), "its fc.0 is reparametrised"),
    "prepared for quantisation": (prepared, "its fc1 is quantised or prepared"),
    "subclassed parameter": (subclassed, "its fc.0.weight is a Special"),
    "two dtypes": (two_dtypes, "its parameters are of several dtypes"),
    "scripted": (lambda: torch.jit.script(SqueezeExcitation(24, 6)), "it is scripted"),
    "forward overridden": (overridden, "its forward is overridden"),
}


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
