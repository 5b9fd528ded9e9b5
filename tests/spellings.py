"""Ways in which people write SE, its relatives and what only looks like it, and mutants of them.

SPELLINGS: by name, a class and what `replace` has to do with it. MUTANTS: by name, what makes a class that computes
something else out of the class of a spelling. LOG: what some of them change outside.

A spelling is SE in four steps (squeeze, layers, gate, product), so that every mutant changes every spelling.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from look_alikes import Scaled
from torch import Tensor, nn

from examples import zoo

zoo.import_torchvision()
import timm.layers as timm  # noqa: E402
from timm.layers.cbam import CbamModule, ChannelAttn, LightChannelAttn  # noqa: E402
from timm.layers.coord_attn import CoordAttn  # noqa: E402
from timm.layers.gather_excite import GatherExcite  # noqa: E402
from timm.layers.global_context import GlobalContext  # noqa: E402

C, R = 12, 4
LOG: list[float] = []


class Spelling(NamedTuple):
    """What makes a model, what `replace` has to do with it, and a pattern of the reason if it is kept.

    verdict: "fused": SE is replaced, as a layer or inside a block. "kept": nothing is replaced, and the report mentions
    the model. "open": the one or the other. "far": nothing is replaced, and the report may be silent.
    """

    make: Callable[[], nn.Module]
    verdict: str = "fused"
    reason: str = ""
    layers: int = 1


def beside(s: Tensor, x: Tensor) -> Tensor:
    """`s` with the rank of `x`."""
    return s.reshape(*s.shape[:2], *(1,) * (x.dim() - 2))


# Hosts: what stands around SE.


class SE(nn.Module):
    """SE as a module of its own. dims: the rank of its maps. is_last: whether their channels are last. inputs: how many
    maps it may be given. calls: the options it may be given. Subclasses make the parts of their SE in `made` and what
    is around it in `around`."""

    dims, is_last, inputs, calls = 4, False, (1,), ({},)

    def __init__(self) -> None:
        super().__init__()
        for name, part in {**self.around(), **self.made()}.items():
            setattr(self, name, part)

    def made(self) -> dict[str, Any]:
        return {"fc1": nn.Linear(C, R), "fc2": nn.Linear(R, C)}

    def around(self) -> dict[str, Any]:
        return {}

    def squeeze(self, x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.dim())))

    def act(self, p1: Tensor) -> Tensor:
        return F.relu(p1)

    def layers(self, z: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(z.flatten(1))))

    def gate(self, v: Tensor) -> Tensor:
        return torch.sigmoid(v)

    def product(self, x: Tensor, s: Tensor) -> Tensor:
        return x * beside(s, x)

    def se(self, x: Tensor) -> Tensor:
        return self.product(x, self.gate(self.layers(self.squeeze(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.se(x)


class SE1d(SE):
    dims = 3


class SE3d(SE):
    dims = 5


class Block(SE):
    """SE inside a block: a depthwise convolution before it, a residual after it."""

    def around(self) -> dict[str, Any]:
        return {"conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dims - 3](C, C, 3, padding=1, groups=C)}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se(self.conv(x))


class Block1d(Block):
    dims = 3


class Block3d(Block):
    dims = 5


def host(of: type[SE], forward: Callable[..., Any], **parts: Any) -> type[SE]:
    """The class `of` with another forward and with other steps."""
    return type(of.__name__, (of,), {"forward": forward, **parts})


def spelt(of: type[SE], **parts: Any) -> type[SE]:
    return type(of.__name__, (of,), parts)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v * torch.sigmoid(v)

    @staticmethod
    def backward(ctx, g):
        (v,) = ctx.saved_tensors
        s = torch.sigmoid(v)
        return g * (s * (1 + v * (1 - s)))


class StaticPadding(nn.Conv2d):
    """A convolution that pads by a module of its own, as in efficientnet_pytorch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        side = self.kernel_size[0] // 2
        self.static_padding = nn.ZeroPad2d((side,) * 4) if side else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class MBConv(SE):
    """The block of efficientnet_pytorch."""

    calls = ({}, {"drop_connect_rate": 0.4})

    def around(self) -> dict[str, Any]:
        return {
            "_expand_conv": StaticPadding(C, C, 1, bias=False),
            "_bn0": nn.BatchNorm2d(C, momentum=0.01, eps=1e-3),
            "_depthwise_conv": StaticPadding(C, C, 3, groups=C, bias=False),
            "_bn1": nn.BatchNorm2d(C, momentum=0.01, eps=1e-3),
            "_project_conv": StaticPadding(C, C, 1, bias=False),
            "_bn2": nn.BatchNorm2d(C, momentum=0.01, eps=1e-3),
        }

    def made(self) -> dict[str, Any]:
        return {"_se_reduce": StaticPadding(C, R, 1), "_se_expand": StaticPadding(R, C, 1)}

    def squeeze(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1)

    def layers(self, z: Tensor) -> Tensor:
        return self._se_expand(Swish.apply(self._se_reduce(z)))

    def product(self, x: Tensor, s: Tensor) -> Tensor:
        return s * x

    def forward(self, inputs: Tensor, drop_connect_rate: float | None = None) -> Tensor:
        x = Swish.apply(self._bn0(self._expand_conv(inputs)))
        x = Swish.apply(self._bn1(self._depthwise_conv(x)))
        x = self.se(x)
        x = self._bn2(self._project_conv(x))
        if drop_connect_rate and self.training:
            keep = 1 - drop_connect_rate
            x = x / keep * torch.floor(keep + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype))
        return x + inputs


class BasicBlock(SE):
    """The block of SE-ResNet-18, whose sum is written in place."""

    def around(self) -> dict[str, Any]:
        return {
            "conv1": nn.Conv2d(C, C, 3, padding=1, bias=False),
            "bn1": nn.BatchNorm2d(C),
            "conv2": nn.Conv2d(C, C, 3, padding=1, bias=False),
            "bn2": nn.BatchNorm2d(C),
            "relu": nn.ReLU(inplace=True),
        }

    def made(self) -> dict[str, Any]:
        return {"avg_pool": nn.AdaptiveAvgPool2d(1), "fc": two_layers(nn.Linear, bias=False)}

    def squeeze(self, x: Tensor) -> Tensor:
        return self.avg_pool(x).view(x.size(0), x.size(1))

    def layers(self, z: Tensor) -> Tensor:
        return self.fc(z)

    def product(self, x: Tensor, s: Tensor) -> Tensor:
        return x * s.view(x.size(0), x.size(1), 1, 1).expand_as(x)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        out += residual
        return self.relu(out)


class Bottleneck(BasicBlock):
    """The block of SE-ResNet-50 with strides, whose shortcut is a convolution."""

    def around(self) -> dict[str, Any]:
        return {
            "conv1": nn.Conv2d(C, 6, 1, bias=False),
            "bn1": nn.BatchNorm2d(6),
            "conv2": nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=False),
            "bn2": nn.BatchNorm2d(6),
            "conv3": nn.Conv2d(6, C, 1, bias=False),
            "bn3": nn.BatchNorm2d(C),
            "relu": nn.ReLU(inplace=True),
            "downsample": nn.Sequential(nn.Conv2d(C, C, 1, stride=2, bias=False), nn.BatchNorm2d(C)),
        }

    def made(self) -> dict[str, Any]:
        return two_convolutions(nn.Conv2d)

    squeeze = SE.squeeze

    def layers(self, z: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(z[:, :, None, None])))

    product = SE.product

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out))) + self.downsample(x)
        return F.relu(out)


class Monai(SE):
    """The style of MONAI: any number of dimensions, and `result += x`."""

    dims = 5

    def made(self) -> dict[str, Any]:
        return {"avg_pool": nn.AdaptiveAvgPool3d(1), "fc": two_layers(nn.Linear, nn.LeakyReLU)}

    def squeeze(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        return self.avg_pool(x).view(b, c)

    def layers(self, z: Tensor) -> Tensor:
        return self.fc(z)

    def product(self, x: Tensor, s: Tensor) -> Tensor:
        result = x * s.view([*s.shape[:2]] + [1] * (x.dim() - 2))
        result += x
        return result


class Ecapa(SE):
    """An SE-Res2 block of ECAPA-TDNN."""

    dims = 3

    def around(self) -> dict[str, Any]:
        return {"tdnn": nn.Conv1d(C, C, 3, padding=2, dilation=2), "norm": nn.BatchNorm1d(C)}

    def made(self) -> dict[str, Any]:
        return two_convolutions(nn.Conv1d)

    def squeeze(self, x: Tensor) -> Tensor:
        return x.mean(dim=2, keepdim=True)

    def layers(self, z: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(z)))

    def product(self, x: Tensor, s: Tensor) -> Tensor:
        return s * x

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.norm(F.relu(self.tdnn(x)))) + x


class X3d(SE):
    """Batch norm, SE, swish and a convolution, as in X3D."""

    dims = 5

    def around(self) -> dict[str, Any]:
        return {
            "conv": nn.Conv3d(C, C, 3, padding=1, groups=C, bias=False),
            "norm": nn.BatchNorm3d(C),
            "last": nn.Conv3d(C, 8, 1),
        }

    def made(self) -> dict[str, Any]:
        return {"block": two_layers(nn.Conv3d)}

    def squeeze(self, x: Tensor) -> Tensor:
        return x.mean([2, 3, 4], keepdim=True)

    def layers(self, z: Tensor) -> Tensor:
        return self.block(z)

    def product(self, x: Tensor, s: Tensor) -> Tensor:
        return x * s

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.se(self.norm(self.conv(x)))))


class NafBlock(SE):
    """Simplified channel attention: one convolution, and its result is the gate. The map before it is a product."""

    def around(self) -> dict[str, Any]:
        return {
            "conv1": nn.Conv2d(C, 2 * C, 1),
            "conv3": nn.Conv2d(C, C, 1),
            "beta": nn.Parameter(torch.ones(1, C, 1, 1)),
        }

    def made(self) -> dict[str, Any]:
        return {"sca": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1))}

    def squeeze(self, x: Tensor) -> Tensor:
        return self.sca[0](x)

    def layers(self, z: Tensor) -> Tensor:
        return self.sca[1](z)

    def gate(self, v: Tensor) -> Tensor:
        return v

    def product(self, x: Tensor, s: Tensor) -> Tensor:
        return x * s

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv1(x).chunk(2, dim=1)
        return x + self.conv3(self.se(a * b)) * self.beta


class ScSE(SE):
    """The sum of a channel gate and a spatial gate."""

    def around(self) -> dict[str, Any]:
        return {"spatial": nn.Conv2d(C, 1, 1)}

    def forward(self, x: Tensor) -> Tensor:
        return self.se(x) + x * torch.sigmoid(self.spatial(x))


class GateInChild(SE):
    """The parent takes the product with what a child of it returns."""

    def made(self) -> dict[str, Any]:
        return {
            "attention": nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, R, 1), nn.ReLU(), nn.Conv2d(R, C, 1), nn.Sigmoid()
            )
        }

    def squeeze(self, x: Tensor) -> Tensor:
        return x

    def layers(self, z: Tensor) -> Tensor:
        return self.attention(z)

    def gate(self, v: Tensor) -> Tensor:
        return v

    def product(self, x: Tensor, s: Tensor) -> Tensor:
        return x * s


class TwoInOne(SE):
    """Two SE in one forward, of which one shares nothing with the other."""

    def around(self) -> dict[str, Any]:
        return {"conv": nn.Conv2d(C, C, 1), "down": nn.Conv2d(C, R, 1), "up": nn.Conv2d(R, C, 1)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.se(x))
        return y * torch.sigmoid(self.up(F.silu(self.down(y.mean((2, 3), keepdim=True))))) + x


def two_layers(kind: type, act: type = nn.ReLU, **options: Any) -> nn.Sequential:
    kernel = () if kind is nn.Linear else (1,)
    return nn.Sequential(kind(C, R, *kernel, **options), act(), kind(R, C, *kernel, **options))


def two_convolutions(kind: type, **options: Any) -> dict[str, nn.Module]:
    return {"fc1": kind(C, R, 1, **options), "fc2": kind(R, C, 1, **options)}


def parameters(**shapes: tuple[int, ...]) -> Callable[[Any], dict[str, nn.Parameter]]:
    return lambda _: {name: nn.Parameter(torch.randn(shape) / 2) for name, shape in shapes.items()}


# Steps, each written in many ways. Every function takes the module first.

POOLINGS = {
    "nn.AdaptiveAvgPool2d(1)": lambda _, x: nn.AdaptiveAvgPool2d(1)(x),
    "nn.AdaptiveAvgPool2d((1, 1))": lambda _, x: nn.AdaptiveAvgPool2d((1, 1))(x),
    "F.adaptive_avg_pool2d(x, 1)": lambda _, x: F.adaptive_avg_pool2d(x, 1),
    "F.adaptive_avg_pool2d(x, (1, 1))": lambda _, x: F.adaptive_avg_pool2d(x, (1, 1)),
    "F.avg_pool2d(x, x.shape[2:])": lambda _, x: F.avg_pool2d(x, x.shape[2:]),
    "F.avg_pool2d(x, (h, w))": lambda _, x: F.avg_pool2d(x, (x.size(2), x.size(3))),
    "F.interpolate by area": lambda _, x: F.interpolate(x, size=1, mode="area"),
    "x.mean((2, 3))": lambda _, x: x.mean((2, 3)),
    "x.mean([2, 3], keepdim=True)": lambda _, x: x.mean([2, 3], keepdim=True),
    "x.mean((-1, -2))": lambda _, x: x.mean((-1, -2)),
    "x.mean(2).mean(2)": lambda _, x: x.mean(2).mean(2),
    "x.mean(3, True).mean(2, True)": lambda _, x: x.mean(3, True).mean(2, True),
    "torch.mean(x, dim=[2, 3])": lambda _, x: torch.mean(x, dim=[2, 3]),
    "x.flatten(2).mean(2)": lambda _, x: x.flatten(2).mean(2),
    "x.view(b, c, -1).mean(-1)": lambda _, x: x.view(x.size(0), x.size(1), -1).mean(-1),
    "x.permute(0, 2, 3, 1).mean((1, 2))": lambda _, x: x.permute(0, 2, 3, 1).mean((1, 2)),
    "x.sum((2, 3)) / (h * w)": lambda _, x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]),
    "einsum nchw->nc": lambda _, x: torch.einsum("nchw->nc", x) / (x.shape[2] * x.shape[3]),
    "torch.var_mean": lambda _, x: torch.var_mean(x, (2, 3))[1],
    "x.amax(3).amax(2)": lambda _, x: x.amax(3).amax(2),
    "x.flatten(2).amax(-1)": lambda _, x: x.flatten(2).amax(-1),
    "x.amax((2, 3))": lambda _, x: x.amax((2, 3)),
    "0.5 * mean + 0.5 * max": lambda _, x: 0.5 * x.mean((2, 3), keepdim=True) + 0.5 * x.amax((2, 3), keepdim=True),
}
# Where several positions are the maximum, the gradient of these goes to one of them, and that of amax to all. The last
# one copies the map, unless it has a single position.
OTHER_POOLINGS = {
    "nn.AdaptiveMaxPool2d(1)": lambda _, x: nn.AdaptiveMaxPool2d(1)(x),
    "F.adaptive_max_pool2d(x, 1)": lambda _, x: F.adaptive_max_pool2d(x, 1),
    "F.max_pool2d(x, x.shape[2:])": lambda _, x: F.max_pool2d(x, x.shape[2:]),
    "x.flatten(2).max(2).values": lambda _, x: x.flatten(2).max(2).values,
    "x.max(3)[0].max(2)[0]": lambda _, x: x.max(3)[0].max(2)[0],
    "(avg + max) / 2": lambda _, x: (F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1)) / 2,
    "b c h w -> b (h w) c": lambda _, x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]).mean(1),
}
POOLINGS_1D = {
    "nn.AdaptiveAvgPool1d(1)": lambda _, x: nn.AdaptiveAvgPool1d(1)(x),
    "F.avg_pool1d(x, x.size(2))": lambda _, x: F.avg_pool1d(x, x.size(2)),
    "x.mean(-1)": lambda _, x: x.mean(-1),
    "x.amax(2, keepdim=True)": lambda _, x: x.amax(2, keepdim=True),
}
POOLINGS_3D = {
    "nn.AdaptiveAvgPool3d(1)": lambda _, x: nn.AdaptiveAvgPool3d(1)(x),
    "x.mean((2, 3, 4))": lambda _, x: x.mean((2, 3, 4)),
    "x.flatten(2).amax(2)": lambda _, x: x.flatten(2).amax(2),
}


def each(m: SE, z: Tensor) -> Tensor:
    for layer in m.fcs:
        z = layer(z)
    return z


_W = {"w1": (R, C), "b1": (R,), "w2": (C, R), "b2": (C,)}
LAYERS = {
    "Linear without bias": {
        "made": lambda _: {"fc1": nn.Linear(C, R, bias=False), "fc2": nn.Linear(R, C, bias=False)},
    },
    "Conv2d": {
        "made": lambda _: two_convolutions(nn.Conv2d),
        "layers": lambda m, z: m.fc2(F.relu(m.fc1(z.view(*z.shape[:2], 1, 1)))),
    },
    "Conv2d, same padding": {
        "made": lambda _: two_convolutions(nn.Conv2d, bias=False, padding="same"),
        "layers": lambda m, z: m.fc2(F.relu(m.fc1(z.view(*z.shape[:2], 1, 1)))),
    },
    "Conv1d": {
        "made": lambda _: two_convolutions(nn.Conv1d),
        "layers": lambda m, z: m.fc2(F.relu(m.fc1(z.flatten(1).unsqueeze(-1)))),
    },
    "Conv3d": {
        "made": lambda _: two_convolutions(nn.Conv3d),
        "layers": lambda m, z: m.fc2(F.relu(m.fc1(z.reshape(*z.shape[:2], 1, 1, 1)))),
    },
    "Sequential": {"made": lambda _: {"fc": two_layers(nn.Linear)}, "layers": lambda m, z: m.fc(z.flatten(1))},
    "ModuleList in a loop": {
        "made": lambda _: {"fcs": nn.ModuleList([nn.Linear(C, R), nn.SiLU(), nn.Linear(R, C)])},
        "layers": lambda m, z: each(m, z.flatten(1)),
    },
    "one Linear": {"made": lambda _: {"fc": nn.Linear(C, C)}, "layers": lambda m, z: m.fc(z.flatten(1))},
    "one Conv2d": {
        "made": lambda _: {"fc": nn.Conv2d(C, C, 1)},
        "layers": lambda m, z: m.fc(z.reshape(*z.shape[:2], 1, 1)),
    },
    "F.linear": {
        "made": parameters(**_W),
        "layers": lambda m, z: F.linear(F.relu(F.linear(z.flatten(1), m.w1, m.b1)), m.w2, m.b2),
    },
    "F.conv2d": {
        "made": parameters(w1=(R, C, 1, 1), b1=(R,), w2=(C, R, 1, 1), b2=(C,)),
        "layers": lambda m, z: F.conv2d(F.relu(F.conv2d(z.view(*z.shape[:2], 1, 1), m.w1, m.b1)), m.w2, m.b2),
    },
    "z @ w.t()": {
        "made": parameters(w1=(R, C), w2=(C, R)),
        "layers": lambda m, z: F.relu(z.flatten(1) @ m.w1.t()) @ m.w2.t(),
    },
    "z @ w.t(), square": {"made": parameters(w=(C, C)), "layers": lambda m, z: z.flatten(1) @ m.w.t()},
    "torch.addmm": {
        "made": parameters(**_W),
        "layers": lambda m, z: torch.addmm(m.b2, F.relu(torch.addmm(m.b1, z.flatten(1), m.w1.t())), m.w2.t()),
    },
    "torch.einsum": {
        "made": parameters(w1=(R, C), w2=(C, R)),
        "layers": lambda m, z: torch.einsum("nr,cr->nc", F.relu(torch.einsum("nc,rc->nr", z.flatten(1), m.w1)), m.w2),
    },
}
ACTS = {
    "silu": lambda _, v: F.silu(v),
    "v * sigmoid(v)": lambda _, v: v * torch.sigmoid(v),
    "swish as a Function": lambda _, v: Swish.apply(v),
    "gelu": lambda _, v: F.gelu(v),
    "clamp(min=0)": lambda _, v: v.clamp(min=0),
    "leaky_relu, in place": lambda _, v: F.leaky_relu(v, 0.01, inplace=True),
    "hardswish": lambda _, v: F.hardswish(v),
    "tanh": lambda _, v: v.tanh(),
    "no activation": lambda _, v: v,
}
GATES = {
    "nn.Sigmoid()": lambda _, v: nn.Sigmoid()(v),
    "v.sigmoid()": lambda _, v: v.sigmoid(),
    "v.sigmoid_()": lambda _, v: v.sigmoid_(),
    "1 / (1 + exp(-v))": lambda _, v: 1 / (1 + torch.exp(-v)),
    "torch.special.expit": lambda _, v: torch.special.expit(v),
    "F.hardsigmoid": lambda _, v: F.hardsigmoid(v),
    "relu6(v + 3) / 6": lambda _, v: F.relu6(v + 3) / 6,
    "relu6(1.2 * v + 3) / 6": lambda _, v: F.relu6(1.2 * v + 3) / 6,
    "clamp(0.2 * v + 0.5, 0, 1)": lambda _, v: torch.clamp(0.2 * v + 0.5, 0, 1),
    "((v + 1) / 2).clamp(0, 1)": lambda _, v: ((v + 1) / 2).clamp(0, 1),
    "torch.tanh": lambda _, v: torch.tanh(v),
    "relu": lambda _, v: F.relu(v),
    "no gate": lambda _, v: v,
}
PRODUCTS = {
    "s * x": lambda _, x, s: beside(s, x) * x,
    "torch.mul": lambda _, x, s: torch.mul(x, beside(s, x)),
    "x.mul(s)": lambda _, x, s: x.mul(beside(s, x)),
    "x * s[:, :, None, None]": lambda _, x, s: x * s.flatten(1)[:, :, None, None],
    "x * s[..., None, None]": lambda _, x, s: x * s.flatten(1)[..., None, None],
    "x * s.unsqueeze(2).unsqueeze(3)": lambda _, x, s: x * s.flatten(1).unsqueeze(2).unsqueeze(3),
    "x * s.view(b, c, 1, 1)": lambda _, x, s: x * s.view(x.size(0), x.size(1), 1, 1),
    "x * s.expand_as(x)": lambda _, x, s: x * beside(s, x).expand_as(x),
    "x * s.expand": lambda _, x, s: x * beside(s, x).expand(-1, -1, x.size(2), x.size(3)),
    "x * s.broadcast_to": lambda _, x, s: x * torch.broadcast_to(beside(s, x), x.shape),
    "x * s.repeat": lambda _, x, s: x * beside(s, x).repeat(1, 1, x.size(2), x.size(3)),
    "flat": lambda _, x, s: (x.flatten(2) * s.flatten(1).unsqueeze(2)).view_as(x),
    "einsum": lambda _, x, s: torch.einsum("nchw,nc->nchw", x, s.flatten(1)),
    "channels last": lambda _, x, s: (x.permute(0, 2, 3, 1) * s.reshape(x.size(0), 1, 1, -1)).permute(0, 3, 1, 2),
    "x.clone().mul_(s)": lambda _, x, s: x.clone().mul_(beside(s, x)),
    "x + x * s": lambda _, x, s: x + x * beside(s, x),
    "x * (1 + s)": lambda _, x, s: x * (1 + beside(s, x)),
    "x * s, then += x": lambda _, x, s: (x * beside(s, x)).add_(x),
    "torch.addcmul(x, x, s)": lambda _, x, s: torch.addcmul(x, x, beside(s, x)),
}


def steps() -> dict[str, Spelling]:
    """Every way of every step in a block, and combinations of them in a layer."""
    ways = [
        *(("pooling", name, Block, {"squeeze": step}) for name, step in POOLINGS.items()),
        *(("pooling", name, Block1d, {"squeeze": step}) for name, step in POOLINGS_1D.items()),
        *(("pooling", name, Block3d, {"squeeze": step}) for name, step in POOLINGS_3D.items()),
        *(("layers", name, Block, parts) for name, parts in LAYERS.items()),
        *(("activation", name, Block, {"act": step}) for name, step in ACTS.items()),
        *(("gate", name, Block, {"gate": step}) for name, step in GATES.items()),
        *(("product", name, Block, {"product": step}) for name, step in PRODUCTS.items()),
    ]
    table = {f"{what}: {name}": Spelling(spelt(of, **parts)) for what, name, of, parts in ways}
    table |= {
        f"pooling: {name}, {where}": Spelling(spelt(of, squeeze=step), "open")
        for name, step in OTHER_POOLINGS.items()
        for where, of in (("layer", SE), ("block", Block))
    }
    together = zip(POOLINGS.items(), cycle(LAYERS.items()), cycle(GATES.items()), cycle(PRODUCTS.items()))
    for (pooling, squeeze), (layers, parts), (gate, s), (product, y) in islice(together, 0, None, 2):
        name = " | ".join((pooling, layers, gate, product))
        table[f"layer: {name}"] = Spelling(spelt(SE, squeeze=squeeze, gate=s, product=y, **parts))
    return table


# Whole blocks.


def _with(**around: Callable[[], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda _: {name: make() for name, make in around.items()}


def _gain() -> nn.Parameter:
    return nn.Parameter(torch.randn(C, 1, 1))


def _half(m: SE, x: Tensor) -> Tensor:
    a, b = m.conv(x).chunk(2, 1)
    return torch.cat([b, m.se(a)], 1)


def _shared(m: SE, x: Tensor) -> Tensor:
    return m.se(m.conv(x)) + m.conv(x)


def conv(inputs: int = C, outputs: int = C) -> Callable[[], nn.Conv2d]:
    return lambda: nn.Conv2d(inputs, outputs, 3, padding=1)


BLOCKS = {
    "efficientnet_pytorch": Spelling(MBConv),
    "SE-ResNet-18": Spelling(BasicBlock),
    "SE-ResNet-50": Spelling(Bottleneck),
    "MONAI": Spelling(Monai),
    "MONAI, ReLU gate": Spelling(spelt(Monai, gate=lambda _, v: F.relu(v))),
    "ECAPA-TDNN": Spelling(Ecapa),
    "X3D": Spelling(X3d),
    "NAFNet": Spelling(NafBlock),
    "scSE": Spelling(ScSE),
    "scSE, maximum": Spelling(host(ScSE, lambda m, x: torch.max(m.se(x), x * torch.sigmoid(m.spatial(x))))),
    "gate in a child": Spelling(GateInChild),
    "gate in a child of a block": Spelling(
        host(GateInChild, lambda m, x: x + m.se(F.relu(m.conv(x))), around=_with(conv=conv()))
    ),
    "two": Spelling(TwoInOne, layers=2),
    "before a sum": Spelling(host(Block, lambda m, x: m.se(x) + m.conv(x))),
    "after a sum": Spelling(host(Block, lambda m, x: m.se(x + m.conv(x)))),
    "of a shared convolution": Spelling(host(Block, _shared)),
    "batch norm, SE, relu": Spelling(
        host(Block, lambda m, x: F.relu(m.se(m.bn(m.conv(x)))), around=_with(conv=conv(), bn=lambda: nn.BatchNorm2d(C)))
    ),
    "h_swish after": Spelling(host(Block, lambda m, x: F.hardswish(m.se(m.conv(x))))),
    "GELU after, no residual": Spelling(host(Block, lambda m, x: F.gelu(m.se(m.conv(x))))),
    "relu before": Spelling(host(SE, lambda m, x: m.se(F.relu(x)))),
    "relu after": Spelling(host(SE, lambda m, x: F.relu(m.se(x)))),
    "shift": Spelling(host(SE, lambda m, x: m.se(x) + 1)),
    "gain": Spelling(host(SE, lambda m, x: m.se(x) * m.gain, around=_with(gain=_gain))),
    "fixed gain": Spelling(host(Block, lambda m, x: x + 0.2 * (2.0 * m.se(m.conv(x))))),
    "half of the channels": Spelling(host(Block, _half, around=_with(conv=conv(C, 2 * C)))),
    "joined with its input": Spelling(host(Block, lambda m, x: torch.cat([x, m.se(m.conv(x))], 1))),
    "pooled afterwards": Spelling(host(Block, lambda m, x: m.se(m.conv(x)).mean((2, 3)))),
    "in a Sequential": Spelling(lambda: nn.Sequential(nn.Conv2d(C, C, 1), spelt(SE)(), nn.ReLU())),
    "two blocks": Spelling(lambda: nn.Sequential(Block(), nn.ReLU(), Block()), layers=2),
    "block in a model": Spelling(lambda: nn.Sequential(conv()(), BasicBlock(), nn.AdaptiveAvgPool2d(1), nn.Flatten())),
    "timm, SEModule": Spelling(lambda: timm.SEModule(C, rd_channels=R)),
    "timm, EffectiveSEModule": Spelling(lambda: timm.EffectiveSEModule(C)),
    "timm, LightChannelAttn": Spelling(lambda: LightChannelAttn(C)),
    "dropout after": Spelling(host(Block, lambda m, x: x + F.dropout(m.se(m.conv(x)), 0.3, m.training)), "open"),
    "stochastic depth": Spelling(
        host(Block, lambda m, x: x if m.training and torch.rand(()) < 0.5 else x + m.se(m.conv(x))), "open"
    ),
    "the map is returned too": Spelling(host(Block, lambda m, x: (lambda u: (m.se(u), u))(m.conv(x))), "open"),
    "applied twice": Spelling(host(Block, lambda m, x: m.se(F.relu(m.se(m.conv(x))))), "open"),
    "x / (1 + exp(-v))": Spelling(
        spelt(SE, gate=lambda _, v: 1 + torch.exp(-v), product=lambda _, x, s: x / beside(s, x)), "open"
    ),
    "(tanh(v / 2) + 1) / 2": Spelling(spelt(SE, gate=lambda _, v: (torch.tanh(v / 2) + 1) / 2), "open"),
    "matmul with a column": Spelling(
        spelt(
            Block,
            made=parameters(w1=(R, C), w2=(C, R)),
            layers=lambda m, z: (m.w2 @ F.relu(m.w1 @ z.flatten(1).unsqueeze(-1))).squeeze(-1),
        ),
        "open",
    ),
    "torch.baddbmm": Spelling(
        spelt(
            Block,
            made=parameters(w=(C, C), b=(C,)),
            layers=lambda m, z: torch.baddbmm(m.b, z.reshape(1, -1, C), m.w.t().unsqueeze(0))[0],
        ),
        "open",
    ),
    "masked by an optional argument": Spelling(
        host(SE, lambda m, x, mask=None: m.se(x if mask is None else x * mask), inputs=(1, 2)), "open"
    ),
}


# Relatives and look-alikes.

SQUEEZE = "its squeeze is not|windows|not only"
OUTPUT = "its output is not|not only"


class SelectiveKernel(Block):
    """Two branches, whose gates are a softmax over the branches."""

    def made(self) -> dict[str, Any]:
        return {"fc1": nn.Linear(C, R), "fc2": nn.Linear(R, 2 * C)}

    def se(self, x: Tensor) -> Tensor:
        a, b = x, F.relu(x)
        s = self.layers(self.squeeze(a + b)).view(-1, 2, C, 1, 1).softmax(1)
        return a * s[:, 0] + b * s[:, 1]


class Film(SE):
    """Scales and shifts the map, as the SE of Leela Chess Zero."""

    def made(self) -> dict[str, Any]:
        return {"fc1": nn.Linear(C, R), "fc2": nn.Linear(R, 2 * C)}

    def product(self, x: Tensor, s: Tensor) -> Tensor:
        gain, shift = s.chunk(2, 1)
        return x * beside(gain, x) + beside(shift, x)


class Last(SE):
    """Of maps [N, H, W, C]."""

    is_last = True

    def squeeze(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)

    def product(self, x: Tensor, s: Tensor) -> Tensor:
        return x * s.reshape(x.size(0), *(1,) * (x.dim() - 2), -1)


class LastBlock(Last):
    def around(self) -> dict[str, Any]:
        return {"mix": nn.Linear(C, C)}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se(self.mix(x))


class Dropping(SE):
    def around(self) -> dict[str, Any]:
        return {"drop": nn.Dropout(0.2)}

    def act(self, p1: Tensor) -> Tensor:
        return self.drop(F.relu(p1))


def _style(m: SE, x: Tensor) -> Tensor:
    u = x.flatten(2)
    s = torch.sigmoid((torch.stack([u.mean(2), u.std(2)], 2) * m.style).sum(2))
    return x * beside(s, x)


def _norms(m: SE, x: Tensor) -> Tensor:
    e = (x.square().sum((2, 3), keepdim=True) + 1e-5).sqrt() * m.alpha
    return x * (1 + torch.tanh(m.gamma * e / (e.square().mean(1, keepdim=True) + 1e-5).sqrt() + m.beta))


def _attention(m: SE, x: Tensor) -> Tensor:
    u = x.flatten(2).transpose(1, 2)
    y = m.up(F.scaled_dot_product_attention(m.down(u), m.down(u), m.down(u)))
    return x + y.transpose(1, 2).reshape(x.shape)


def _ones_by_one(kind: type = nn.Conv2d, **options: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda _: two_convolutions(kind, **options)


def _convolved(m: SE, z: Tensor) -> Tensor:
    return m.fc2(F.relu(m.fc1(z.reshape(*z.shape[:2], 1, 1))))


def _norm(features: int) -> Callable[[Any], dict[str, Any]]:
    return _with(bn=lambda: nn.BatchNorm1d(features))


RELATIVES = {
    "ECA": Spelling(lambda: timm.EcaModule(C), "kept"),
    "ECA, circular": Spelling(lambda: timm.CecaModule(C), "kept"),
    "GlobalContext": Spelling(lambda: GlobalContext(C, rd_channels=8), "kept"),
    "SplitAttn": Spelling(lambda: timm.SplitAttn(C), "kept"),
    "timm, SelectiveKernel": Spelling(lambda: timm.SelectiveKernel(C, rd_channels=R), "kept"),
    "selective kernel": Spelling(SelectiveKernel, "far"),
    "GatherExcite": Spelling(lambda: GatherExcite(C, extent=2, use_mlp=False), "far"),
    "CoordAttn": Spelling(lambda: CoordAttn(C), "far"),
    "CBAM, channels": Spelling(lambda: ChannelAttn(C), "kept", "applied more than once: fc1.weight 2 times"),
    "CBAM": Spelling(lambda: CbamModule(C), "kept"),
    "style recalibration": Spelling(
        host(SE, _style, made=parameters(style=(C, 2))), "far"
    ),
    "gated channel transformation": Spelling(
        host(SE, _norms, made=parameters(alpha=(1, C, 1, 1), beta=(1, C, 1, 1), gamma=(1, C, 1, 1))), "far"
    ),
    "scale and shift": Spelling(Film, "far"),
    "self-attention": Spelling(
        host(SE, _attention, made=_with(down=lambda: nn.Linear(C, R), up=lambda: nn.Linear(R, C))), "far"
    ),
    "weights of every position": Spelling(
        spelt(SE, made=_ones_by_one(), squeeze=lambda _, x: x, layers=lambda m, x: m.fc2(F.relu(m.fc1(x))),
              product=lambda _, x, s: x * s), "far"
    ),
    "a spatial gate only": Spelling(host(ScSE, lambda m, x: x * torch.sigmoid(m.spatial(x))), "far"),
    "the gate of one map for another": Spelling(
        host(Block, lambda m, x: x * beside(m.gate(m.layers(m.squeeze(m.conv(x)))), x)), "kept"
    ),
    "the gate of two maps": Spelling(
        host(Block, lambda m, x: (lambda u: u * beside(m.gate(m.layers(m.squeeze(u + x))), u))(m.conv(x))), "kept"
    ),
    "the gate for two maps": Spelling(
        host(Block, lambda m, x: (lambda s: torch.cat([x * s, m.conv(x) * s], 1))(
            beside(m.gate(m.layers(m.squeeze(x))), x))), "open"
    ),
    "the gate from outside": Spelling(
        host(SE, lambda m, x, z: m.product(x, m.gate(m.layers(m.squeeze(z)))), inputs=(2,)), "far"
    ),
    "the gate alone": Spelling(host(SE, lambda m, x: m.gate(_convolved(m, m.squeeze(x))), made=_ones_by_one()), "kept",
                               "returns the gate only"),
    "the gate returned too": Spelling(
        host(SE, lambda m, x: (lambda s: (m.product(x, s), s))(m.gate(m.layers(m.squeeze(x))))), "open"
    ),
    "windows of 4": Spelling(
        spelt(SE, squeeze=lambda _, x: F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1)), "kept", SQUEEZE
    ),
    "square windows": Spelling(
        spelt(SE, squeeze=lambda _, x: F.avg_pool2d(x, min(x.shape[2:]))[..., 0, 0]), "kept", SQUEEZE
    ),
    "windows for large maps": Spelling(
        spelt(SE, squeeze=lambda _, x: x[..., :32].mean((2, 3))), "kept", "map of shape|does not compute"
    ),
    "half of the map": Spelling(spelt(SE, squeeze=lambda _, x: x[:, :, ::2].mean((2, 3))), "kept", SQUEEZE),
    "one axis": Spelling(spelt(SE, squeeze=lambda _, x: x.mean(2)[..., 0]), "kept", SQUEEZE),
    "the batch too": Spelling(
        spelt(SE, squeeze=lambda _, x: x.mean((0, 2, 3)).expand(x.size(0), -1)), "kept", SQUEEZE
    ),
    "sum": Spelling(spelt(SE, squeeze=lambda _, x: x.sum((2, 3))), "kept", SQUEEZE),
    "mean + max": Spelling(spelt(SE, squeeze=lambda _, x: x.mean((2, 3)) + x.amax((2, 3))), "kept", SQUEEZE),
    "generalised mean": Spelling(
        spelt(SE, squeeze=lambda _, x: x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)), "kept", SQUEEZE
    ),
    "root of the mean square": Spelling(
        spelt(SE, squeeze=lambda _, x: (x.square().mean((2, 3)) + 1e-6).sqrt()), "kept", SQUEEZE
    ),
    "nanmean": Spelling(spelt(SE, squeeze=lambda _, x: x.nanmean((2, 3))), "kept"),
    "pooled in float32": Spelling(spelt(SE, squeeze=lambda _, x: x.float().mean((2, 3)).to(x.dtype)), "kept"),
    "softmax gate": Spelling(spelt(SE, gate=lambda _, v: v.softmax(1)), "kept", OUTPUT),
    "2 * sigmoid": Spelling(spelt(SE, gate=lambda _, v: 2 * torch.sigmoid(v))),
    "2 * sigmoid in a block": Spelling(spelt(Block, gate=lambda _, v: torch.sigmoid(v) * 2)),
    "2 * sigmoid, in the product": Spelling(spelt(SE, product=lambda _, x, s: x * 2 * beside(s, x))),
    "3 * sigmoid": Spelling(spelt(SE, gate=lambda _, v: 3 * torch.sigmoid(v)), "kept", OUTPUT),
    "2 * hard sigmoid": Spelling(spelt(SE, gate=lambda _, v: 2 * F.hardsigmoid(v)), "kept", OUTPUT),
    "1 + tanh(v / 2)": Spelling(spelt(SE, gate=lambda _, v: 1 + torch.tanh(v / 2))),
    "softplus gate": Spelling(spelt(SE, gate=lambda _, v: F.softplus(v)), "kept", OUTPUT),
    "sigmoid with a temperature": Spelling(spelt(SE, gate=lambda _, v: torch.sigmoid(v / 2)), "kept", OUTPUT),
    "softmax gate in a block": Spelling(spelt(Block, gate=lambda _, v: v.softmax(1)), "kept"),
    "sum in a block": Spelling(spelt(Block, squeeze=lambda _, x: x.sum((2, 3))), "kept"),
    "quick GELU": Spelling(
        spelt(SE, act=lambda _, v: v * torch.sigmoid(1.702 * v)), "kept", "its activation is quick GELU, none of"
    ),
    "ELU": Spelling(spelt(SE, act=lambda _, v: F.elu(v)), "kept", "its activation is ELU, none of"),
    "softplus": Spelling(spelt(SE, act=lambda _, v: F.softplus(v)), "kept", "its activation is softplus, none of"),
    "leaky ReLU": Spelling(
        spelt(SE, act=lambda _, v: F.leaky_relu(v, 0.2)), "kept", "its activation is a leaky ReLU of slope 0.2, none of"
    ),
    "squared ReLU": Spelling(spelt(SE, act=lambda _, v: F.relu(v).square()), "kept", "its activation is none of"),
    "PReLU": Spelling(
        spelt(SE, around=_with(prelu=nn.PReLU), act=lambda m, v: m.prelu(v)), "kept", "uses parameters beside"
    ),
    "grouped": Spelling(
        spelt(SE, made=_ones_by_one(groups=2), layers=_convolved), "kept", "grouped fully connected layers"
    ),
    "three layers": Spelling(
        spelt(SE, around=_with(mid=lambda: nn.Linear(R, R)), act=lambda m, v: F.relu(m.mid(F.relu(v)))),
        "kept", "three fully connected layers",
    ),
    "applied to mean and max": Spelling(
        host(SE, lambda m, x: m.product(x, m.gate(m.layers(x.mean((2, 3))) + m.layers(x.amax((2, 3)))))),
        "kept", "applied more than once",
    ),
    "dropout inside": Spelling(Dropping, "kept", "draws random numbers"),
    "batch norm, then ReLU": Spelling(spelt(SE, around=_norm(R), act=lambda m, v: F.relu(m.bn(v)))),
    "ReLU, then batch norm": Spelling(spelt(SE, around=_norm(R), act=lambda m, v: m.bn(F.relu(v)))),
    "batch norm of the squeeze": Spelling(
        spelt(SE, around=_norm(C), layers=lambda m, z: m.fc2(F.silu(m.fc1(m.bn(z)))))
    ),
    "batch norm before the gate": Spelling(spelt(SE, around=_norm(C), gate=lambda m, v: torch.sigmoid(m.bn(v)))),
    "batch norm before 2 * sigmoid": Spelling(
        spelt(SE, around=_norm(C), gate=lambda m, v: 2 * torch.sigmoid(m.bn(v)))
    ),
    "batch norms after both layers": Spelling(
        spelt(SE, around=_with(bn1=lambda: nn.BatchNorm1d(R), bn2=lambda: nn.BatchNorm1d(C)),
              act=lambda m, v: F.relu(m.bn1(v)), gate=lambda m, v: torch.sigmoid(m.bn2(v)))
    ),
    "batch norms before both layers": Spelling(
        spelt(SE, around=_with(bn1=lambda: nn.BatchNorm1d(C), bn2=lambda: nn.BatchNorm1d(R)),
              layers=lambda m, z: m.fc2(m.bn2(F.relu(m.fc1(m.bn1(z))))))
    ),
    "batch norms on both sides of ReLU": Spelling(
        spelt(SE, around=_with(bn1=lambda: nn.BatchNorm1d(R), bn2=lambda: nn.BatchNorm1d(R, affine=False)),
              act=lambda m, v: m.bn2(F.relu(m.bn1(v))))
    ),
    "batch norms around one layer": Spelling(
        spelt(SE, made=_with(fc=lambda: nn.Linear(C, C), bn1=lambda: nn.BatchNorm1d(C), bn2=lambda: nn.BatchNorm1d(C)),
              layers=lambda m, z: m.bn2(m.fc(m.bn1(z))))
    ),
    "BatchNorm2d between convolutions": Spelling(
        spelt(SE, made=_ones_by_one(bias=False), around=_with(bn=lambda: nn.BatchNorm2d(R)),
              layers=lambda m, z: m.fc2(F.relu(m.bn(m.fc1(z.reshape(*z.shape[:2], 1, 1))))))
    ),
    "batch norm in a block": Spelling(
        spelt(Block, around=_with(conv=conv(), bn=lambda: nn.BatchNorm1d(R)), act=lambda m, v: F.relu(m.bn(v)))
    ),
    "batch norm without statistics": Spelling(
        spelt(SE, around=_with(bn=lambda: nn.BatchNorm1d(R, track_running_stats=False)),
              act=lambda m, v: F.relu(m.bn(v))), "kept", "uses parameters beside"
    ),
    "layer norm inside": Spelling(
        spelt(SE, around=_with(norm=lambda: nn.LayerNorm(R)), act=lambda m, v: F.relu(m.norm(v))),
        "kept", "uses parameters beside"
    ),
    "biases added apart": Spelling(
        spelt(SE, made=parameters(**_W), layers=lambda m, z: F.relu(z @ m.w1.t() + m.b1) @ m.w2.t() + m.b2)
    ),
    "biases of shape [1, C, 1, 1]": Spelling(
        spelt(SE, made=parameters(w1=(R, C, 1, 1), b1=(1, R, 1, 1), w2=(C, R, 1, 1), b2=(1, C, 1, 1)),
              layers=lambda m, z: F.conv2d(F.relu(F.conv2d(beside(z, m.w1), m.w1) + m.b1), m.w2) + m.b2)
    ),
    "a bias added apart in a block": Spelling(
        spelt(Block, made=parameters(**_W), layers=lambda m, z: F.linear(F.relu(F.linear(z, m.w1) + m.b1), m.w2, m.b2))
    ),
    "a bias added twice": Spelling(
        spelt(SE, made=parameters(**_W), layers=lambda m, z: F.linear(F.relu(F.linear(z, m.w1) + m.b1 * 2), m.w2)),
        "kept", "uses parameters beside"
    ),
    "a bias beside that of the layer": Spelling(
        spelt(SE, around=parameters(b=(R,)), act=lambda m, v: F.relu(v + m.b)), "kept", "uses parameters beside"
    ),
    "[N, H, W, C]": Spelling(Last),
    "[N, L, C]": Spelling(spelt(Last, dims=3)),
    "[N, D, H, W, C], residual": Spelling(spelt(Last, dims=5, product=lambda m, x, s: x + Last.product(m, x, s))),
    "[N, H, W, C] in a block": Spelling(LastBlock),
    "[N, L, C] in a block": Spelling(
        spelt(LastBlock, dims=3, squeeze=lambda _, x: x.mean(1), product=lambda _, x, s: x * s[:, None])
    ),
    "[N, H, W, C], one axis": Spelling(spelt(Last, squeeze=lambda _, x: x.mean(1)[:, 0]), "kept"),
    "a weight of [inputs, outputs]": Spelling(
        spelt(SE, made=parameters(w1=(C, R), w2=(R, C)), layers=lambda m, z: F.relu(z @ m.w1) @ m.w2),
        "kept", "stands transposed|not only",
    ),
    "a square weight of [inputs, outputs]": Spelling(
        spelt(SE, made=parameters(w=(C, C)), layers=lambda m, z: z @ m.w), "kept", "."
    ),
    "a square weight of [inputs, outputs] in a block": Spelling(
        spelt(Block, made=parameters(w=(C, C)), layers=lambda m, z: z @ m.w), "kept"
    ),
    "F.linear with a square weight, transposed": Spelling(
        spelt(Block, made=parameters(w=(C, C)), layers=lambda m, z: F.linear(z, m.w.t())), "kept"
    ),
    "a square convolution, transposed": Spelling(
        spelt(Block, made=parameters(w=(C, C, 1, 1)),
              layers=lambda m, z: F.conv2d(z[..., None, None], m.w.transpose(0, 1))), "kept"
    ),
    "a mean with given weights": Spelling(
        host(SE, lambda m, x, w: m.product(x, m.gate(m.layers((x * w).sum((2, 3)) / w.exp().sum((2, 3))))),
             inputs=(2,)), "far"
    ),
    "mean as a matrix product": Spelling(
        spelt(Block, squeeze=lambda _, x: x.flatten(2) @ x.new_full((x[0, 0].numel(),), 1 / x[0, 0].numel())), "far"
    ),
    "MLP": Spelling(host(SE, lambda m, x: m.layers(x.mean((2, 3)))), "far"),
    "MLP of the channels": Spelling(host(SE, lambda m, x: x + _mixed(m, x)), "far"),
}  # fmt: skip


def _mixed(m: SE, x: Tensor) -> Tensor:
    return m.fc2(F.gelu(m.fc1(x.movedim(1, -1)))).movedim(-1, 1)


SPELLINGS = {**steps(), **BLOCKS, **RELATIVES}


# Mutants.


def changed(**steps: Callable[..., Any]) -> Callable[[type[SE]], type[SE]]:
    """What makes a class with other steps. Each takes the module, the original step, and the arguments of the step."""

    def of(original: type[SE]) -> type[SE]:
        def method(name: str) -> Callable[..., Any]:
            return lambda m, *args: steps[name](m, getattr(super(mutant, m), name), *args)

        mutant = type(original.__name__, (original,), {name: method(name) for name in steps})
        return mutant

    return of


def everywhere(statistic: Callable[[Tensor], Tensor]) -> Callable[[type[SE]], type[SE]]:
    """Pools a statistic of all positions: the map that is pooled holds it everywhere."""

    def pooled(m: SE, f: Callable[..., Any], x: Tensor) -> Tensor:
        return f(beside(statistic(x.flatten(2)), x).expand_as(x).contiguous())

    return changed(squeeze=pooled)


def in_training(step: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda m, f, t: step(f(t)) if m.training else f(t)


def _returns_gate(original: type[SE]) -> type[SE]:
    class Returning(original):
        def gate(self, v: Tensor) -> Tensor:
            vars(self)["s"] = super().gate(v)
            return self.s

        def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            return super().forward(x, **options), vars(self).pop("s")

    return Returning


def _takes_another(original: type[SE]) -> type[SE]:
    class Taking(original):
        """Reads a second map, if it is given, where it pools."""

        inputs = (1, 2)

        def squeeze(self, x: Tensor) -> Tensor:
            return super().squeeze(x if self.other is None else x + self.other.mean())

        def forward(self, x: Tensor, other: Tensor | None = None, **options: Any) -> Tensor:
            vars(self)["other"] = other
            y = super().forward(x, **options)
            del vars(self)["other"]
            return y

    return Taking


def _keep(m: SE, f: Callable[..., Any], v: Tensor) -> Tensor:
    m.last = f(v)
    return m.last


def _keep_in_list(m: SE, f: Callable[..., Any], v: Tensor) -> Tensor:
    s = f(v)
    m.__dict__.setdefault("history", []).append(s.detach())
    return s


def _log(m: SE, f: Callable[..., Any], v: Tensor) -> Tensor:
    s = f(v)
    LOG.append(float(s.detach().sum()))
    return s


def _count(m: SE, f: Callable[..., Any], t: Tensor) -> Tensor:
    m.count = getattr(m, "count", 0) + 1
    return f(t)


MUTANTS = {
    "pools the first column": changed(squeeze=lambda m, f, x: f(x[..., :1].contiguous())),
    "pools all but the last column": changed(squeeze=lambda m, f, x: f(x[..., :-1].contiguous())),
    "pools up to 32 columns": changed(squeeze=lambda m, f, x: f(x[..., :32].contiguous())),
    "pools the batch": changed(squeeze=lambda m, f, x: f(x.mean(0, keepdim=True).expand_as(x).contiguous())),
    "pools other channels": changed(squeeze=lambda m, f, x: f(x.roll(1, 1))),
    "pools the positive part": changed(squeeze=lambda m, f, x: f(x.relu())),
    "pools the squares": changed(squeeze=lambda m, f, x: f(x.square())),
    "pools std": everywhere(lambda u: u.std(2)),
    "pools sum": everywhere(lambda u: u.sum(2)),
    "pools the minimum": everywhere(lambda u: u.amin(2)),
    "pools the median": everywhere(lambda u: u.median(2).values),
    "pools the norm": everywhere(lambda u: u.norm(dim=2)),
    "pools otherwise in training": changed(
        squeeze=lambda m, f, x: f(x[..., :-1].contiguous() if m.training else x)
    ),
    "detaches what it pools": changed(squeeze=lambda m, f, x: f(x.detach())),
    "detaches what it pools, in training": changed(squeeze=in_training(Tensor.detach)),
    "detaches the squeeze": changed(layers=lambda m, f, z: f(z.detach())),
    "detaches the gate": changed(gate=lambda m, f, v: f(v).detach()),
    "detaches the gate, in training": changed(gate=in_training(Tensor.detach)),
    "detaches the map": changed(product=lambda m, f, x, s: f(x.detach(), s)),
    "has another gradient of the gate": changed(gate=lambda m, f, v: Scaled.apply(f(v))),
    "has another gradient of the map": changed(product=lambda m, f, x, s: f(Scaled.apply(x), s)),
    "has another gradient of the squeeze": changed(squeeze=lambda m, f, x: Scaled.apply(f(x))),
    "keeps the gate": changed(gate=_keep),
    "keeps the gates in a list": changed(gate=_keep_in_list),
    "keeps the squeeze": changed(squeeze=_keep),
    "appends to a global list": changed(gate=_log),
    "counts calls": changed(se=_count),
    "counts gates": changed(gate=_count),
    "returns the gate too": _returns_gate,
    "adds the gate": changed(product=lambda m, f, x, s: f(x, s) + beside(s, x)),
    "multiplies by the gate twice": changed(product=lambda m, f, x, s: f(x, s) * beside(s, x)),
    "takes another gate in training": changed(gate=in_training(lambda s: s * s)),
    "doubles the gate": changed(gate=lambda m, f, v: 2 * f(v)),
    "softens the gate": changed(gate=lambda m, f, v: f(v / 2)),
    "reverses the gate": changed(gate=lambda m, f, v: f(v).flip(1)),
    "mixes the gates of the batch": changed(gate=lambda m, f, v: f(v) + f(v).mean(0, keepdim=True)),
    "applies the layers twice": changed(layers=lambda m, f, z: f(z) + f(z + 1)),
    "takes another input": _takes_another,
    "scales another map": changed(product=lambda m, f, x, s: f(x + 1, s)),
    "scales the positive part": changed(product=lambda m, f, x, s: f(x.relu(), s)),
    "scales other positions": changed(product=lambda m, f, x, s: f(x.roll(1, -1), s)),
    "writes to the map after pooling it": changed(
        se=lambda m, f, x: f(x * 1), product=lambda m, f, x, s: f(x.add_(1), s)
    ),
    "writes to the map after scaling it": changed(
        se=lambda m, f, x: (lambda u: f(u) + u.mul_(2))(x.detach().clone())
    ),
    "pools in float32": changed(squeeze=lambda m, f, x: f(x.float()).to(x.dtype)),
    "scales in float32": changed(product=lambda m, f, x, s: f(x.float(), s.float()).to(x.dtype)),
    "rounds the gate to bfloat16": changed(gate=lambda m, f, v: f(v).bfloat16().to(v.dtype)),
    "drops channels in training": changed(gate=lambda m, f, v: F.dropout(f(v), 0.3, m.training)),
}  # fmt: skip
