"""A replaced block: a module whose forward computes its SE layers together with their neighbours, in inference."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.autograd import profiler

from ..backends import CPU, forcing
from ..observers import observed, under_transform
from ..replaced import Replaced
from ..swap import Swap
from . import fused
from .neighbours import Neighbours, Norm
from .program import Program

_training = itemgetter("training")


class BlockSwap(Swap):
    """The `program` of a block, for maps of `dims` dimensions."""

    def __init__(self, block: nn.Module, original: type[Any], program: Program, dims: int) -> None:
        super().__init__(block, original, program, dims)
        self.dims = (dims,)
        self.run = program.bind(block, lambda call: fused.bind(call, block))
        self.joined: list[Neighbours | Norm] = [call.target for call in program.calls if call.kind == "fused"]
        self._modules = [module for module in block.modules() if module is not block]

    def holds(self, block: nn.Module, x: Tensor) -> bool:
        """Whether the program computes what the block does for `x`: now, on this device, in this mode."""
        if not _is_plain_inference(x) or block.training or any(map(_training, map(vars, self._modules))):
            return False
        if not self._inside.unchanged(block):
            self.warn_once(block)
            return False
        return True


def _is_plain_inference(x: Tensor) -> bool:
    """Whether the fast path of the CPU backend serves calls with `x`, and nothing else has to see them."""
    return not (
        torch.is_grad_enabled()
        or not x.is_cpu
        or x.numel() == 0
        or observed()
        or profiler._is_profiler_enabled
        or _C._len_torch_function_stack() > 0
        or under_transform()
        or torch.is_autocast_enabled("cpu")
        or not CPU.has_fast_path()
        or not (forcing.idle or forcing.current().allows(CPU))
    )


class FusedBlock(Replaced):
    """The first base of a replaced block's class."""

    _se_fused_swap: BlockSwap | None = None

    def extra_repr(self) -> str:
        swap = self._se_fused_swap
        fused = [] if swap is None else [f"fused: {call}" for call in swap.joined]
        return ", ".join(filter(None, (super().extra_repr(), *fused)))

    def _fused_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        swap = self._se_fused_swap
        x = None if swap is None else swap.map_of(args, kwargs)
        if swap is None or x is None or not swap.holds(self, x):
            return None
        return swap.run(x)
