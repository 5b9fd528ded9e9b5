"""The operators of se_fused/ops.py that fill memory, in Triton: scratch memory, grids and launches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..options import Options
from . import backward, batch_norm, forward, weights
from .plan import WEIGHT_TILE, Plan, plan
from .tiles import MAP, MEAN, MEAN_MAX, NO_RESIDUAL, X_ITSELF

# Whether a barrier in a program orders its stores to global memory. Not on AMD, where Triton's barrier waits for shared
# memory only (`s_waitcnt lgkmcnt(0)`).
ORDERED = torch.version.hip is None
# Without this limit, ptxas spills a few registers to reach the next step of occupancy.
REGISTERS = {} if torch.version.hip else {"maxnreg": 255}


class Problem:
    """One call, forward or backward: its sizes, its plan, and the arguments that several kernels have in common."""

    def __init__(
        self, x: Tensor, w1: Tensor | None, residual: Tensor | None, options: tuple[Any, ...], channels_last: bool,
        *, backward: bool,
    ) -> None:  # fmt: skip
        self.n, self.c = x.shape[:2]
        self.l = x.numel() // (self.n * self.c)
        self.r = 0 if w1 is None else w1.shape[0]
        # With L = 1 both memory orders are the same. Taken as channels_last, the contiguous extent is C instead of 1.
        channels_last = self.l == 1 or (channels_last and self.c > 1)
        self.x = x
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.options = options
        self.squeeze = Options(*options).squeeze
        self.plan = p = plan(
            self.n, self.c, self.r, self.l, channels_last, x.element_size(), backward=backward, ordered=ORDERED
        )
        kind = NO_RESIDUAL
        if residual is not None:
            kind = X_ITSELF if residual.data_ptr() == x.data_ptr() else MAP
        self.residual = residual if kind is MAP else None
        self.tile_args = {
            "OPTIONS": options, "CHANNELS_LAST": channels_last, "ALIGNMENT": p.alignment,
            "BLOCK_C": p.block_c, "BLOCK_L": p.block_l,
        }  # fmt: skip
        self.scale_args = {**self.tile_args, "RESIDUAL": kind.value}
        self.sample_args = {"BLOCK_R": p.block_r, "BLOCK_K1": p.block_k1, "BLOCK_K2": p.block_k2}
        # With a maximum there are no fused multiply-adds: they can round u differently in two kernels, and then no
        # position would equal the maximum.
        self.launch_args = {"num_warps": p.warps, "enable_fp_fusion": self.squeeze == MEAN.value, **REGISTERS}

    def scratch(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=self.dtype)

    def partial(self, kinds: int) -> tuple[Tensor, ...]:
        return self.scratch(kinds, self.plan.splits, self.n, self.c).unbind()

    @property
    def map_grid(self) -> tuple[int, int]:
        return _map_grid(self.n, self.c, self.plan)

    @property
    def hidden_grid(self) -> tuple[int, int]:
        return _divide_up(self.n, self.plan.block_n), _divide_up(max(self.r, 1), self.plan.block_r)


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _map_grid(n: int, c: int, p: Plan) -> tuple[int, int]:
    return _divide_up(n, p.block_n) * _divide_up(c, p.block_c), p.splits


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of x the current one, because Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward_out(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
    scale: Tensor | None, shift: Tensor | None,
    act: int, gate: int, slope: float, offset: float, squeeze: int, pre_act: int, post_act: int, channels_last: bool,
    y: Tensor, z: Tensor | None, p1: Tensor | None, p2: Tensor | None,
) -> None:  # fmt: skip
    """Writes y, which may be x, and those of z, p1 and p2 that are given. `Forward` in csrc/se.h describes them."""
    options = (act, gate, slope, offset, squeeze, pre_act, post_act)
    p = Problem(x, w1, residual, options, channels_last, backward=False)
    n, c, l, tiling = p.n, p.c, p.l, p.plan
    r = max(p.r, 1)
    partial = p.partial(2 if squeeze == MEAN_MAX.value else 1)
    sums, maxima = partial[0], partial[-1]
    z = p.scratch(n, c) if z is None else z
    p1 = None if w1 is None else p.scratch(n, r) if p1 is None else p1
    with _on_device(x):
        if tiling.one_launch:
            forward.forward_sample_kernel[(n,)](
                x, p.residual, scale, shift, w1, b1, w2, b2, sums, maxima, z, p1, p2, y, n, c, r, l,
                **p.sample_args, **p.scale_args, **p.launch_args,
            )  # fmt: skip
            return
        forward.squeeze_kernel[p.map_grid](
            x, scale, shift, sums, maxima, n, c, l, tiling.steps,
            BLOCK_N=tiling.block_n, **p.tile_args, **p.launch_args,
        )  # fmt: skip
        forward.hidden_kernel[p.hidden_grid](
            sums, maxima, z, w1, b1, p1, tiling.splits, n, c, r, l, options,
            BLOCK_N=tiling.block_n, BLOCK_R=tiling.block_r, BLOCK_K=tiling.block_k1, **p.launch_args,
        )  # fmt: skip
        forward.scale_kernel[p.map_grid](
            x, p.residual, scale, shift, z, p1, w2, b2, p2, y, n, c, r, l, tiling.steps,
            BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k2, **p.scale_args, **p.launch_args,
        )  # fmt: skip


def backward_out(
    g: Tensor, x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
    z: Tensor, saved_p1: Tensor, p2: Tensor,
    act: int, gate: int, slope: float, offset: float, squeeze: int, pre_act: int, post_act: int, channels_last: bool,
    residual_is_x: bool,
    dx: Tensor | None, dw1: Tensor | None, db1: Tensor | None, dw2: Tensor | None, db2: Tensor | None,
    dresidual: Tensor | None,
) -> None:  # fmt: skip
    """Writes the gradients that are not None. `Backward` in csrc/se.h describes them."""
    options = (act, gate, slope, offset, squeeze, pre_act, post_act)
    p = Problem(x, w1, residual, options, channels_last, backward=True)
    n, c, l, tiling = p.n, p.c, p.l, p.plan
    r = max(p.r, 1)
    p1, dp1 = (None, None) if w1 is None else (saved_p1, p.scratch(n, r))
    ds, maxima, ties = p.partial(1) * 3 if squeeze == MEAN.value else p.partial(3)
    dp2 = p.scratch(n, c)
    apply_args = {**p.scale_args, "RESIDUAL_IS_X": residual_is_x}
    with _on_device(x):
        if tiling.one_launch:
            backward.backward_sample_kernel[(n,)](
                g, x, p.residual, p1, p2, w1, w2, ds, maxima, ties, dp1, dp2, dx, dresidual, n, c, r, l,
                **p.sample_args, **apply_args, **p.launch_args,
            )  # fmt: skip
        else:
            backward.backward_reduce_kernel[p.map_grid](
                g, x, p.residual, p2, ds, maxima, ties, n, c, l, tiling.steps,
                BLOCK_N=tiling.block_n, **p.scale_args, **p.launch_args,
            )  # fmt: skip
            backward.backward_hidden_kernel[p.hidden_grid](
                ds, p1, p2, w2, dp1, dp2, tiling.splits, n, c, r, options,
                BLOCK_N=tiling.block_n, BLOCK_R=tiling.block_r, BLOCK_K=tiling.block_k1, **p.launch_args,
            )  # fmt: skip
            if dx is not None or dresidual is not None:
                backward.backward_apply_kernel[p.map_grid](
                    g, x, p.residual, p2, dp1, dp2, w1, w2, maxima, ties, dx, dresidual,
                    tiling.splits, n, c, r, l, tiling.steps,
                    BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k2, **apply_args, **p.launch_args,
                )  # fmt: skip
        if not all(grad is None for grad in (dw1, db1, dw2, db2)):
            block_n, block_i, block_j = WEIGHT_TILE
            tiles2 = 0 if dw2 is None and db2 is None else _divide_up(c, block_i) * _divide_up(p.r or c, block_j)
            tiles1 = 0 if dw1 is None and db1 is None else _divide_up(r, block_i) * _divide_up(c, block_j)
            weights.weight_gradients_kernel[(tiles2 + tiles1,)](
                dp1, dp2, z, p1, dw1, db1, dw2, db2, tiles2, n, c, r, options,
                BLOCK_N=block_n, BLOCK_I=block_i, BLOCK_J=block_j, **REGISTERS,
            )  # fmt: skip


def batch_norm_out(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor,
    eps: float, act: int, channels_last: bool, y: Tensor,
) -> None:  # fmt: skip
    """Writes y = act(norm(x) + residual), which may be x."""
    n, c = x.shape[:2]
    l = x.numel() // (n * c)
    channels_last = l == 1 or (channels_last and c > 1)
    # Planned as forward with few weights (r = 1) in several launches, where the map alone decides the tiles.
    p = plan(n, c, 1, l, channels_last, x.element_size(), backward=False, ordered=False)
    with _on_device(x):
        batch_norm.batch_norm_kernel[_map_grid(n, c, p)](
            x, residual, weight, bias, mean, variance, y, n, c, l, p.steps, float(eps), act, channels_last, p.alignment,
            p.block_n, p.block_c, p.block_l, num_warps=p.warps, **REGISTERS,
        )  # fmt: skip


def scale_shift_out(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float, scale: Tensor, shift: Tensor
) -> None:
    """Writes scale and shift of an eval-mode batch norm."""
    block, c = 256, len(mean)
    with _on_device(mean):
        batch_norm.scale_shift_kernel[(_divide_up(c, block),)](
            weight, bias, mean, variance, scale, shift, c, float(eps), block
        )
