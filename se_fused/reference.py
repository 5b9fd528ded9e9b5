"""The formula in plain differentiable PyTorch: the truth that every backend is tested against.

    u = pre_act(x)                     x [N, C, *spatial]
    z = squeeze(u)                     [N, C]   over the spatial positions
    h = act(W1 z + b1)                 [N, R]   w1 [R, C], b1 [R]; absent in the one-FC form
    s = gate(W2 h + b2)                [N, C]   w2 [C, R], b2 [C]; one-FC form: w2 [C, C]
    y = post_act(u * s + residual)

Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", section 3: z is equation 2, s equation 3, y equation 4;
the one-FC form is eSE of Lee and Park, "CenterMask", section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class HardSigmoid(NamedTuple):
    """The gate ``clamp(slope * v + offset, 0, 1)``.

    In use are PyTorch's (1/6, 1/2), Paddle's (0.2, 0.5) and early mmcv's (1/2, 1/2).
    """

    slope: float = 1 / 6
    offset: float = 1 / 2

    def __call__(self, v: Tensor) -> Tensor:
        return torch.clamp(self.slope * v + self.offset, 0, 1)


def _hardswish(v: Tensor) -> Tensor:
    # In float64 F.hardswish multiplies by a float32 1/6 on CUDA, which is off by 3e-8. The gradients are the same.
    return v * F.relu6(v + 3) / 6 if v.dtype is torch.float64 else F.hardswish(v)


def _gelu_tanh(v: Tensor) -> Tensor:
    return F.gelu(v, approximate="tanh")


# The order is that of enum Activation in csrc/se.h.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": _hardswish,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# "hard_sigmoid" names HardSigmoid() with PyTorch's slope and offset.
GATES = ("sigmoid", "hard_sigmoid", "tanh", "relu", "identity")
# The order is that of enum Squeeze in csrc/se.h.
SQUEEZES = ("mean", "max", "mean_max")


def _activation(name: str | HardSigmoid | None, v: Tensor) -> Tensor:
    if name is None:
        return v
    if name == "hard_sigmoid":
        name = HardSigmoid()
    return name(v) if isinstance(name, HardSigmoid) else ACTIVATIONS[name](v)


def _squeeze(u: Tensor, how: str) -> Tensor:
    spatial = tuple(range(2, u.dim()))
    if how == "mean":
        return u.mean(spatial)
    # amax shares the gradient among equal maxima.
    return u.amax(spatial) if how == "max" else (u.mean(spatial) + u.amax(spatial)) / 2


def _linear(v: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(v, w.flatten(1).to(v.dtype), None if b is None else b.to(v.dtype))


def squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    act: str = "relu",
    gate: str | HardSigmoid = "sigmoid",
    squeeze: str = "mean",
    pre_act: str | None = None,
    residual: Tensor | None = None,
    post_act: str | None = None,
    inplace: bool = False,
) -> Tensor:
    """What `se_fused.squeeze_excite` computes, with its arguments; see there for shapes, dtypes and meaning.

    Arguments are not checked. The interior is float32, or float64 for float64 `x`.
    """
    device = x.device.type
    # A context that is not needed would stand in every traced graph.
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if casts else nullcontext():
        u = _activation(pre_act, x.to(torch.promote_types(x.dtype, torch.float32)))
        h = _squeeze(u, squeeze)
        if w1 is not None:
            h = _activation(act, _linear(h, w1, b1))
        s = _activation(gate, _linear(h, w2, b2))
        v = u * s[(..., *(None,) * (x.dim() - 2))]
        if residual is not None:
            v = v + residual
        y = _activation(post_act, v).to(x.dtype)
    return x.copy_(y) if inplace else y
