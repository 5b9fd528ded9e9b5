"""What a backend is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import Options


class Backend:
    """One implementation of the operation, for some devices.

    forward_out and backward_out take the arguments of the operators of these names (se_fused/ops.py): every map dense,
    in the order [N, C, *spatial] or [N, *spatial, C], every weight dense, and the memory that they fill.
    """

    name: str

    def why_not(self, device: torch.device) -> str | None:
        """The reason why this backend cannot run a call on `device`; None if it can."""
        raise NotImplementedError

    def forward_out(self, *args: Any) -> None:
        raise NotImplementedError

    def backward_out(self, *args: Any) -> None:
        raise NotImplementedError

    def plan(self, x: Tensor, r: int, options: Options, own_residual: bool) -> str | None:
        """The kernels that a forward call launches, in words; None if there is nothing to choose.

        x: [N, C, *spatial], of which only shape, dtype, strides and device count. r: R, or 0 in the one-FC form.
        own_residual: whether there is a residual that is not x.
        """
        return None


class Compiled(Backend):
    """A backend whose library registers the operators with PyTorch's dispatcher for one type of device."""

    _unusable: str | None = None  # why no call can use it

    def load(self) -> None:
        """Load the library, building it if need be. A failure leaves its reason for `why_not`."""
        raise NotImplementedError

    def leave_out(self, reason: str) -> None:
        """Let `why_not` give this reason for every device."""
        self._unusable = reason

    def why_not(self, device: torch.device) -> str | None:
        if self._unusable is None and device.type != self.name:
            return f"it serves {self.name.upper()} tensors; x is on {device}"
        return self._unusable

    def forward_out(self, *args: Any) -> None:
        torch.ops.se_fused.forward_out.default(*args)

    def backward_out(self, *args: Any) -> None:
        torch.ops.se_fused.backward_out.default(*args)
