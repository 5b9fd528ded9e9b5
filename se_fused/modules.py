"""`SqueezeExcite`: the operation as a layer."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .options import HardSigmoid, Options, encode, refuse


def _size(name: str, value: Any) -> int:
    wanted = "an int of 1 or more"
    try:
        size = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        size = None
    if size is None:
        refuse(TypeError, name, repr(value), wanted, "SqueezeExcite")
    if size < 1:
        refuse(ValueError, name, repr(value), wanted, "SqueezeExcite")
    return size


class SqueezeExcite(nn.Module):
    """Squeeze-and-Excitation (Hu et al., section 3) over [N, C, *spatial] maps of 1 to 3 spatial dimensions.

    Args:
        channels: C.
        reduction: C / R; R = max(1, channels // reduction).
        hidden: R itself; takes precedence over `reduction`.
        bias: whether the two fully connected layers have biases.
        act, gate, squeeze, pre_act, post_act: as in `se_fused.squeeze_excite`.
        inplace: write the result over the input while grad mode is off.
        device, dtype: of the parameters; None: PyTorch's defaults.

    The five options can be read as attributes, and are fixed when the layer is made.
    Parameters: `w1` [R, C], `b1` [R], `w2` [C, R], `b2` [C], initialised as `nn.Linear` does.

    Raises:
        TypeError: for a size that is not an int, or a `bias` or `inplace` that is not a bool.
        ValueError: for a size below 1, or an option with an unknown name.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        hidden: int | None = None,
        bias: bool = True,
        act: str = "relu",
        gate: str | HardSigmoid = "sigmoid",
        squeeze: str = "mean",
        pre_act: str | None = None,
        post_act: str | None = None,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels, reduction = _size("channels", channels), _size("reduction", reduction)
        r = max(1, channels // reduction) if hidden is None else _size("hidden", hidden)
        for name, value in (("bias", bias), ("inplace", inplace)):
            if not isinstance(value, bool):
                refuse(TypeError, name, repr(value), "True or False", "SqueezeExcite")
        self.options = Options(*encode("SqueezeExcite", act, gate, squeeze, pre_act, post_act))
        self.w1 = nn.Parameter(torch.empty(r, channels, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(channels, r, device=device, dtype=dtype))
        self.b1 = nn.Parameter(torch.empty(r, device=device, dtype=dtype)) if bias else None
        self.b2 = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.inplace = inplace
        self.reset_parameters()

    act = property(lambda self: self.options.names()["act"])
    gate = property(lambda self: self.options.names()["gate"])
    squeeze = property(lambda self: self.options.names()["squeeze"])
    pre_act = property(lambda self: self.options.names()["pre_act"])
    post_act = property(lambda self: self.options.names()["post_act"])

    def reset_parameters(self) -> None:
        """Draw the parameters as `nn.Linear` does: uniform within 1 / sqrt(inputs)."""
        for w, b in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(w.shape[1])
            nn.init.uniform_(w, -bound, bound)
            if b is not None:
                nn.init.uniform_(b, -bound, bound)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        # Under autocast, a residual of a wider dtype makes the result wider than x.
        inplace = self.inplace and not torch.is_grad_enabled() and (residual is None or residual.dtype == x.dtype)
        return ops.call(x, self.w1, self.b1, self.w2, self.b2, residual, self.options, inplace)

    def extra_repr(self) -> str:
        r, c = self.w1.shape
        options = "".join(f", {name}={value!r}" for name, value in self.options.names().items() if value is not None)
        return f"{c}, hidden={r}, bias={self.b1 is not None}{options}" + (", inplace=True" if self.inplace else "")
