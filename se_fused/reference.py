"""The formula in plain differentiable PyTorch. Every backend is tested against it.

    u = pre_act(scale * x + shift)     x [N, C, *spatial], scale and shift [C] or none
    z = squeeze(u)                     [N, C]   over the spatial positions
    h = act(W1 z + b1)                 [N, R]   w1 [R, C], b1 [R]; absent in the one-FC form
    s = gate(W2 h + b2)                [N, C]   w2 [C, R], b2 [C]; one-FC form: w2 [C, C]
    y = post_act(u * s + residual)

Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", section 3: z is equation 2, s equation 3, y equation 4;
the one-FC form is eSE of Lee and Park, "CenterMask", section 3.3.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import FUNCTIONS, SQUEEZES, OptionNames, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _squeeze(u: Tensor, how: str) -> Tensor:
    spatial = tuple(range(2, u.dim()))
    if how == "mean":
        return u.mean(spatial)
    # amax divides the gradient equally among equal maxima.
    return u.amax(spatial) if how == "max" else (u.mean(spatial) + u.amax(spatial)) / 2


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """scale * x + shift by channel, or without them x, in float32, or in float64 for float64 `x`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is None or shift is None:
        return wide
    scale, shift = (t.to(wide.dtype)[(..., *(None,) * (x.dim() - 2))] for t in (scale, shift))
    return wide * scale + shift


def before_gate(
    u: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute z [N, C], W1 z + b1 [N, R] (None in the one-FC form) and W2 h + b2 [N, C]."""
    z = _squeeze(u, SQUEEZES[options.squeeze])
    p1 = None if w1 is None else _linear(z, w1, b1)
    return z, p1, _linear(z if p1 is None else FUNCTIONS[options.act](p1), w2, b2)


def _linear(v: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(v, w.flatten(1).to(v.dtype), None if b is None else b.to(v.dtype))


def squeeze_excite(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    *, scale: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None, inplace: bool = False,
    out: Tensor | None = None, **options: Unpack[OptionNames],
) -> Tensor:  # fmt: skip
    """Compute `se_fused.squeeze_excite` in plain PyTorch; see there for the arguments, their shapes and dtypes.

    Options are checked, tensors are not. The interior is float32, or float64 for float64 `x`.

    Raises:
        ValueError: for an option with an unknown name.
    """
    target = x if inplace else out
    return compute(x, w1, b1, w2, b2, residual, scale, shift, options=Options.of(**options), out=target)


def compute(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
    scale: Tensor | None = None, shift: Tensor | None = None, *, options: Options, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`squeeze_excite` with its options already encoded as `Options`. out: where the result is written; may be x."""
    device = x.device.type
    # Without this condition, every traced graph would contain the context.
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if casts else nullcontext():
        u = FUNCTIONS[options.pre_act](affine(x, scale, shift))
        _, _, p2 = before_gate(u, w1, b1, w2, b2, options)
        v = u * options.apply_gate(p2)[(..., *(None,) * (x.dim() - 2))]
        if residual is not None:
            v = v + residual
        y = FUNCTIONS[options.post_act](v).to(x.dtype)
    return y if out is None else out.copy_(y)
