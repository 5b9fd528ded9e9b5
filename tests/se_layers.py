"""Hand-written SE layers and look-alikes for the tests of recognition and replacement."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import zoo

zoo.import_torchvision()
from torchvision.ops import SqueezeExcitation  # noqa: E402


class Classic(nn.Module):
    """The form of the layer that is copied most often."""

    def __init__(
        self, c: int = 32, reduction: int = 4, gate: nn.Module | None = None, pool: type = nn.AdaptiveAvgPool2d
    ):
        super().__init__()
        self.avg_pool = pool(1)
        self.fc = nn.Sequential(
            nn.Linear(c, c // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(c // reduction, c, bias=False),
            nn.Sigmoid() if gate is None else gate,
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, *(1,) * (x.dim() - 2))
        return x * y.expand_as(x)


class Convolutional(nn.Module):
    """A layer whose parts are functions, for tests to vary. Its second convolution is registered first."""

    def __init__(self, c: int = 24, r: int = 6, conv: type = nn.Conv2d, bias: bool = True):
        super().__init__()
        self.up, self.down = conv(r, c, 1, bias=bias), conv(c, r, 1, bias=bias)
        self.dims = tuple(range(2, self.up.weight.dim()))

    def squeeze(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=True)

    def act(self, p1: Tensor) -> Tensor:
        return F.relu(p1)

    def gate(self, p2: Tensor) -> Tensor:
        return torch.sigmoid(p2)

    def scale(self, x: Tensor, s: Tensor) -> Tensor:
        return x * s

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x, self.gate(self.up(self.act(self.down(self.squeeze(x))))))


def varied(**parts) -> Convolutional:
    kind = type(
        "Varied", (Convolutional,), {name: staticmethod(part) for name, part in parts.items() if callable(part)}
    )
    return kind()


class Residual(nn.Module):
    """Adds x after scaling, as MONAI's ResidualSELayer does; the gate is a ReLU, the activation a leaky ReLU."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Sequential(nn.Linear(c, c // 2), nn.LeakyReLU(), nn.Linear(c // 2, c), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        s = self.fc(self.avg_pool(x).flatten(1))
        result = x * s[:, :, None, None, None]
        result += x
        return result


class Plus(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class OneLayer(nn.Module):
    def __init__(self, c: int = 12):
        super().__init__()
        self.fc = nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(self.fc(x.flatten(2).mean(-1)))[..., None, None]


class Parameters(nn.Module):
    """A layer with parameters and einsum, and without children."""

    def __init__(self, c: int = 20, r: int = 20):
        super().__init__()
        self.w2, self.w1 = nn.Parameter(torch.zeros(c, r)), nn.Parameter(torch.zeros(r, c))

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(torch.einsum("nc,rc->nr", x.amax((2, 3)), self.w1))
        return x * torch.sigmoid(F.linear(h, self.w2))[:, :, None, None]


def classic_in_mobilenet(**options) -> nn.Module:
    return Classic(gate=nn.Hardsigmoid(), **options)


def hooked(register: str, layer: nn.Module) -> nn.Module:
    def fail(*_: object) -> None:
        raise AssertionError("a hook of the model was called")

    getattr(layer.fc[0], register)(fail)
    return layer


class Twice(Convolutional):
    def gate(self, p2: Tensor) -> Tensor:
        return torch.sigmoid(p2 + self.up(self.act(self.down(torch.ones_like(p2)))))


class TwoInputs(Convolutional):
    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:
        return self.scale(x, self.gate(self.up(self.act(self.down(pooled)))))


def with_buffer() -> nn.Module:
    layer = Classic()
    layer.register_buffer("gain", torch.ones(1))
    return layer


class WithParameter(Convolutional):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain[:, None, None]


class Dropping(Convolutional):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.01)

    def act(self, p1: Tensor) -> Tensor:
        return self.drop(F.relu(p1))


def overridden() -> nn.Module:
    layer = Classic()
    layer.forward = layer.forward
    return layer


def weight_normed(norm) -> nn.Module:
    layer = Classic()
    norm(layer.fc[0])
    return layer


def prepared() -> nn.Module:
    layer = SqueezeExcitation(24, 6)
    layer.fc1.qconfig = object()
    return layer


def subclassed() -> nn.Module:
    class Special(nn.Parameter):
        pass

    layer = Classic()
    layer.fc[0].weight = Special(layer.fc[0].weight.detach())
    return layer


def two_dtypes() -> nn.Module:
    layer = Classic()
    layer.fc[0].half()
    return layer
