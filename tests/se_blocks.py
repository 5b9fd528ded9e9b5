"""Hand-written blocks with an SE layer, for the tests of `replace(model, level="block")`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from se_layers import SqueezeExcitation
from torch import Tensor, nn

ACTS = {"silu": nn.SiLU, "relu": nn.ReLU, "hardswish": nn.Hardswish, "identity": nn.Identity, "gelu": nn.GELU}
C = 16


class Inverted(nn.Module):
    """Depthwise convolution, batch norm, activation, SE, 1x1 convolution, batch norm, residual: MobileNetV3's order."""

    def __init__(self, act: str = "silu", dims: int = 4, bias: bool = False, affine: bool = True) -> None:
        super().__init__()
        conv, norm = {
            3: (nn.Conv1d, nn.BatchNorm1d),
            4: (nn.Conv2d, nn.BatchNorm2d),
            5: (nn.Conv3d, nn.BatchNorm3d),
        }[dims]
        self.conv = conv(C, C, 3, padding=1, groups=C, bias=bias)
        self.bn1 = norm(C, affine=affine)
        self.act = ACTS[act]()
        self.se = se_layer(dims)
        self.project = conv(C, C, 1, bias=bias)
        self.bn2 = norm(C, affine=affine, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.project(self.se(self.act(self.bn1(self.conv(x))))))


class Residual(nn.Module):
    """1x1 convolution, batch norm, SE, residual, activation: SE-ResNet's order, in functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.se = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), SqueezeExcitation(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.bn(self.conv(x)))
        y += x
        return F.relu(y)


class Deep(Inverted):
    """Inverted with batch norms apart from the SE layer: of the input, of another convolution, and of a shortcut."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        conv, norm = type(self.project), type(self.bn1)
        affine = self.bn1.affine
        self.bn_in, self.bn0, self.bn3 = (norm(C, affine=affine) for _ in range(3))
        self.expand, self.shortcut = conv(C, C, 1), conv(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn0(self.expand(F.relu(self.bn_in(x)))))
        y = self.bn2(self.project(self.se(self.act(self.bn1(self.conv(y))))))
        return F.relu(y + self.bn3(self.shortcut(x)))


class Linear(nn.Module):
    """SE of nn.Linear, for maps of any rank."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.fc2(F.relu(self.fc1(x.flatten(2).mean(2)))))
        return x * s[(..., *(None,) * (x.dim() - 2))]


def se_layer(dims: int) -> nn.Module:
    return SqueezeExcitation(C, 4) if dims == 4 else Linear()


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode with random batch norms."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def image(n: int = 2, dims: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, C, *(9, 8, 7)[: dims - 2]).to(dtype)


def assert_same(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert got.dtype is wanted.dtype
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


class Both(Inverted):
    """Returns the map before SE as well."""

    def forward(self, x: Tensor) -> Tensor:
        u = self.act(self.bn1(self.conv(x)))
        return self.bn2(self.project(self.se(u))) + u


class Twice(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.se(self.bn1(self.conv(self.se(x)))))


class SizeDependent(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[2] > 4 else x


class Counts(Inverted):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Keeps(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return self.bn2(self.project(self.se(self.act(self.bn1(self.last)))))


class Clamped(Inverted):
    """Between batch norm and SE stands what is an identity for all but large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Hardtanh(-1000, 1000)


class WritesOver(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu_(x))


class Noisy(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, training=True))


class IntoShortcut(Residual):
    """The sum is written over the shortcut, which is the block's input."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.se(self.bn(self.conv(x)))
        return F.relu(x)


class Broadcast(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.se(self.bn(self.conv(x))) + x.mean((2, 3), keepdim=True))


class WritesBetween(nn.Module):
    """x changes after the batch norm has read it, and before the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.se = nn.BatchNorm2d(C), SqueezeExcitation(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.se(self.bn(x))
        x.add_(1)
        return y + x


class NormWritesBetween(Deep):
    """The same, between a batch norm apart from the SE layer and its activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.bn_in(x)
        x.add_(1)
        return Inverted.forward(self, F.relu(y)) + x


class ActsBeforeSum(Deep):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn0(self.expand(x))) + Inverted.forward(self, x)


class ReadsSums(Deep):
    """Batch norms of a sum and of a concatenation, whose parts have other readers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(x)
        a, b = (x + y).chunk(2, 1)
        return F.relu(self.bn0(x + y)) + F.relu(self.bn3(torch.cat([b, a], 1))) + y + Inverted.forward(self, x)


class ReadTwice(Deep):
    """The result of a convolution has another reader than its batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(x)
        return F.relu(self.bn0(y)) + y + Inverted.forward(self, x)


class BroadcastsShortcut(Deep):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn0(self.expand(x)) + x.mean((2, 3), keepdim=True))
        return Inverted.forward(self, y)


class WidensShortcut(Deep):
    """The sum is wider than the result of the batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn0(self.expand(x.mean((2, 3), keepdim=True))) + x)
        return Inverted.forward(self, y)


class Parametrised(Inverted):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.project)


class ReadsNumber(Inverted):
    """A number of a buffer, which may change, decides."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flag", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.flag else x


class ReadsParameter(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * next(iter(self.parameters()))[0, 0, 0, 0].item()


class Autocasts(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class ReadsDtype(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.dtype is torch.float32 else 1)


class ReadsMode(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if torch.is_inference_mode_enabled() else 1)


class CountsElsewhere(Inverted):
    def __init__(self) -> None:
        super().__init__()
        self.elsewhere = SimpleNamespace(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        self.elsewhere.calls += 1
        return super().forward(x)


class Clips(Inverted):
    """The map is changed after the batch norm has read it, in a way that only infinite numbers show."""

    def forward(self, x: Tensor) -> Tensor:
        c = self.conv(x)
        u = self.bn1(c)
        c.clamp_(-1e30, 1e30)
        return self.se(u)


UNJOINED = [
    *(ReadsNumber, ReadsParameter, Autocasts, ReadsDtype, ReadsMode, CountsElsewhere, Clips, Parametrised),
    *(Twice, SizeDependent, Counts, Keeps, WritesOver, Noisy),
]
