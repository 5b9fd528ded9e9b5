"""A replaced block: a module whose forward computes its SE layers together with their neighbours, in inference."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.autograd import profiler

from ..backends import CPU, forcing
from ..memory import PLAIN_TYPES
from ..observers import observed, under_transform
from ..replaced import Replaced
from ..swap import Swap
from . import fused
from .neighbours import Neighbours
from .program import Program

_training = itemgetter("training")


class BlockSwap(Swap):
    """The `program` of a block, for maps of `dims` dimensions."""

    def __init__(self, block: nn.Module, original: type[Any], program: Program, dims: int) -> None:
        super().__init__(block, original, program, dims)
        self.dims = (dims,)
        self.run = program.bind(block, lambda neighbours: fused.bind(neighbours, block))
        self.neighbours: list[Neighbours] = [call.target for call in program.calls if call.kind == "fused"]
        modules = [module for module in block.modules() if module is not block]
        self._modules = [vars(module) for module in modules]
        self._parameters = [module._parameters for module in (block, *modules)]
        of_modules = [module._buffers for module in (block, *modules)]
        self._buffers = [(buffers, name) for buffers in of_modules for name, t in buffers.items() if t is not None]

    def holds(self, block: nn.Module, x: Tensor) -> bool:
        """Whether the program computes what the block does for `x`: now, on this device, in this mode."""
        if not _is_plain_inference(x) or block.training or any(map(_training, self._modules)):
            return False
        if not self._inside.unchanged(block):
            self.warn_once(block)
            return False
        tensors: list[Tensor | None] = [t for named in self._parameters for t in named.values() if t is not None]
        tensors += [buffers[name] for buffers, name in self._buffers]
        dtype = x.dtype
        for t in tensors:
            # A batch norm whose statistics have become None computes those of the batch.
            if t is None or type(t) not in PLAIN_TYPES or not t.is_cpu:
                return False
            if t.dtype is not dtype and t.is_floating_point():
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
        fused = [] if swap is None else [f"fused: {neighbours}" for neighbours in swap.neighbours]
        return ", ".join(filter(None, (super().extra_repr(), *fused)))

    def _fused_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        swap = self._se_fused_swap
        x = None if swap is None else swap.map_of(args, kwargs)
        if swap is None or x is None or not swap.holds(self, x):
            return None
        return swap.run(x)
