"""What fused.py runs on GPUs: the functions that csrc/fast_path.h has for the CPU, by the operators of a backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import implementation
from ..arguments import check
from ..backends import Backend
from ..memory import PLAIN_TYPES, is_channels_last
from ..options import SQUEEZES
from ..weights import NormVectors


class Operators:
    """As in csrc/fast_path.h, each function returns None, without having computed anything, for arguments that it does
    not take."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def forward(
        self, x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
        out: Tensor | None, act: int, gate: int, slope: float, offset: float, squeeze: int, pre_act: int, post_act: int,
        scale: Tensor | None, shift: Tensor | None, norm: NormVectors | None, s: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        if s is not None or not _are_maps(x, residual) or not (norm is None or _is_norm_of(x, norm)):
            return None
        try:
            # Not out: it is None, or x, which is known to have its memory for itself.
            check(x, w1, b1, w2, b2, residual, scale, shift, SQUEEZES[squeeze])
        except (TypeError, ValueError):  # such as for a weight of another shape, which the layer itself judges
            return None
        if norm is not None:
            dtype = torch.promote_types(norm[2].dtype, torch.float32)
            scale, shift = (torch.empty_like(norm[2], dtype=dtype) for _ in range(2))
            self.backend.scale_shift_out(*norm, scale, shift)
        options = act, gate, slope, offset, squeeze, pre_act, post_act
        return implementation.forward(self.backend, x, w1, b1, w2, b2, residual, scale, shift, *options, out=out)

    def batch_norm(
        self, x: Tensor, residual: Tensor | None, inplace: bool, act: int, norm: NormVectors
    ) -> Tensor | None:
        if not _are_maps(x, residual) or not _is_norm_of(x, norm):
            return None
        y = x if inplace else torch.empty_like(x)
        self.backend.batch_norm_out(x, residual, *norm, act, is_channels_last(x), y)
        return y

    def fold(self, *_: Any) -> None:
        return None


@functools.cache
def operators_of(backend: Backend) -> Operators:
    return Operators(backend)


def _are_maps(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the kernels can read x [N, C, *spatial] and the residual where they are."""
    if type(x) not in PLAIN_TYPES or not 3 <= x.dim() <= 5 or x.numel() == 0:
        return False
    if not (x.is_contiguous() or is_channels_last(x)):
        return False
    return residual is None or (
        type(residual) in PLAIN_TYPES
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.device == x.device
        and all(a == b or size == 1 for size, a, b in zip(x.shape, x.stride(), residual.stride(), strict=True))
    )


def _is_norm_of(x: Tensor, norm: NormVectors) -> bool:
    """Whether the kernels can read `norm` beside x."""
    *vectors, mean, variance, _ = norm
    if not isinstance(mean, Tensor) or variance is None:
        return False
    is_half = x.dtype is torch.float16 or x.dtype is torch.bfloat16
    if not (mean.dtype is x.dtype or (is_half and mean.dtype is torch.float32)):
        return False
    return all(
        type(t) in PLAIN_TYPES
        and t.dtype is mean.dtype
        and t.shape == x.shape[1:2]
        and t.device == x.device
        and t.is_contiguous()
        for t in (*vectors, mean, variance)
        if t is not None
    )
