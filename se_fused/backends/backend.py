"""What a backend is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import Options


class Backend:
    """One implementation of the operation, for some devices.

    The methods whose names end in _out take the arguments of the operators of the same names (se_fused/ops.py): dense
    maps in the order [N, C, *spatial] or [N, *spatial, C], dense weights, and the tensors that they fill.
    """

    name: str
    has_batch_norm = False  # whether it has batch_norm_out and scale_shift_out

    def why_not(self, device: torch.device) -> str | None:
        """The reason why this backend cannot run a call on `device`; None if it can."""
        raise NotImplementedError

    def forward_out(self, *args: Any) -> None:
        raise NotImplementedError

    def backward_out(self, *args: Any) -> None:
        raise NotImplementedError

    def batch_norm_out(self, *args: Any) -> None:
        raise NotImplementedError

    def scale_shift_out(self, *args: Any) -> None:
        raise NotImplementedError

    def plan(self, x: Tensor, r: int, options: Options, own_residual: bool, has_scale: bool) -> str | None:
        """A description of the kernels that a forward call launches; None if the backend has no choice of kernels.

        x: [N, C, *spatial]; only its shape, dtype, strides and device are read. r: R, or 0 in the one-FC form.
        own_residual: whether there is a residual other than x. has_scale: whether there are scale and shift.
        """
        return None


class Compiled(Backend):
    """A backend whose library registers the operators with PyTorch's dispatcher for one type of device."""

    _unusable: str | None = None  # the reason why no call can use this backend

    def load(self) -> None:
        """Load the library, building it if necessary. After a failure, `why_not` gives the reason."""
        raise NotImplementedError

    def leave_out(self, reason: str) -> None:
        """Make `why_not` give this reason for every device."""
        self._unusable = reason

    def why_not(self, device: torch.device) -> str | None:
        if self._unusable is None and device.type != self.name:
            return f"it runs on {self.name.upper()} tensors; x is on {device}"
        return self._unusable

    def forward_out(self, *args: Any) -> None:
        torch.ops.se_fused.forward_out.default(*args)

    def backward_out(self, *args: Any) -> None:
        torch.ops.se_fused.backward_out.default(*args)

    def batch_norm_out(self, *args: Any) -> None:
        torch.ops.se_fused.batch_norm_out.default(*args)

    def scale_shift_out(self, *args: Any) -> None:
        torch.ops.se_fused.scale_shift_out.default(*args)
