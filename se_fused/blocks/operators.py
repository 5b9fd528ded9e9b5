"""What fused.py runs on GPUs: the functions that csrc/fast_path.h has for the CPU, by the operators of a backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import Backend
from ..memory import PLAIN_TYPES, is_channels_last
from ..options import Options

# Weight, bias, mean, variance and epsilon of an eval-mode batch norm; weight and bias may be None.
Norm = tuple["Tensor | None", "Tensor | None", Tensor, Tensor, float]


class Operators:
    """As in csrc/fast_path.h, each function returns None, without having computed anything, for arguments that it does
    not take."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @classmethod
    @functools.cache
    def of(cls, backend: Backend) -> Operators:
        return cls(backend)

    def forward(
        self, x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
        inplace: bool, *rest: Any,
    ) -> Tensor | None:  # fmt: skip
        *options, scale, shift, norm, s = rest
        if s is not None:
            return None
        if norm is not None:
            if not _is_norm_of(x, norm):
                return None
            dtype = torch.promote_types(norm[2].dtype, torch.float32)
            scale, shift = (torch.empty_like(norm[2], dtype=dtype) for _ in range(2))
            self.backend.scale_shift_out(*norm, scale, shift)
        try:
            return ops.call(x, w1, b1, w2, b2, residual, Options(*options), inplace, scale, shift)
        except (TypeError, ValueError):  # such as for a weight of another shape, which the layer itself judges
            return None

    def batch_norm(self, x: Tensor, residual: Tensor | None, inplace: bool, act: int, norm: Norm) -> Tensor | None:
        channels_last = is_channels_last(x)
        if x.numel() == 0 or not (channels_last or x.is_contiguous()) or not _is_norm_of(x, norm):
            return None
        if residual is not None and not _is_like(x, residual):
            return None
        y = x if inplace else torch.empty_like(x)
        self.backend.batch_norm_out(x, residual, *norm, act, channels_last, y)
        return y

    def fold(self, *_: Any) -> None:
        return None


def _is_norm_of(x: Tensor, norm: Norm) -> bool:
    """Whether x is a map [N, C, *spatial], and the kernels can read `norm` beside it."""
    mean = norm[2]
    if type(x) not in PLAIN_TYPES or not 3 <= x.dim() <= 5:
        return False
    if not isinstance(mean, Tensor) or not (mean.dtype is x.dtype or (mean.dtype is torch.float32 and _is_half(x))):
        return False
    for t in norm[:4]:
        if t is not None and not (
            type(t) in PLAIN_TYPES
            and t.dtype is mean.dtype
            and t.shape == x.shape[1:2]
            and t.device == x.device
            and t.is_contiguous()
        ):
            return False
    return norm[3] is not None


def _is_half(x: Tensor) -> bool:
    return x.dtype is torch.float16 or x.dtype is torch.bfloat16


def _is_like(x: Tensor, residual: Tensor) -> bool:
    """Whether `residual` has the shape, dtype, device and order of x."""
    return (
        type(residual) in PLAIN_TYPES
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.device == x.device
        and residual.stride() == x.stride()
    )
