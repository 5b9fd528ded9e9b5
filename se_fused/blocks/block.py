"""A replaced block: a module whose forward computes its SE layers together with their neighbours, in inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.autograd import profiler

from .. import backends
from ..backends import CPU, forcing
from ..observers import observed, under_transform
from ..replaced import Replaced
from ..swap import Swap
from . import fused
from .forwards import Kind
from .inline import Inline
from .neighbours import Neighbours, Norm
from .operators import operators_of
from .program import Program

_training = itemgetter("training")


class BlockSwap(Swap):
    """The programs of a block, for maps of `dims` dimensions.

    joined: by the kind of the call, the program in which layers are joined with their neighbours, for inference.
    inline: the program in which each SE layer that is written into the forward is one call. inplace: whether these may
    overwrite their maps.
    """

    def __init__(
        self, block: nn.Module, original: type[Any], joined: dict[Kind, Program], inline: dict[Kind, Program],
        dims: int, inplace: bool,
    ) -> None:  # fmt: skip
        super().__init__(block, original, joined, inline, dims, inplace)
        self.dims = (dims,)
        self._joined, self._inline = joined, inline
        # The kernels are those of the device of x. The parameters are looked up now, when they are what was compared.
        self._hows = {
            id(program): replace(fused.How.of(program, block, None), inplace=inplace)
            for program in (*joined.values(), *inline.values())
        }
        self._functions: dict[Any, Callable[..., Any]] = {}  # by program and kernels
        self.on_convolution: Callable[[str, str], None] | None = None
        first = next(iter((*joined.values(), *inline.values())))
        self.calls: list[Neighbours | Norm | Inline] = [call.target for call in first.calls if call.kind == "fused"]
        self._modules = [module for module in block.modules() if module is not block]
        self.has_inline = bool(inline)
        self._parents = [module for module in self._modules if module._modules]

    def function_for(self, block: nn.Module, x: Tensor, given: dict[str, Any]) -> Callable[[], Any] | None:
        """The function that computes what the block does for x and the further arguments that were `given`: now, on
        this device, in this mode; None if the block must compute as the original does."""
        training = block.training
        kind, numbers = Kind.of(training, given, self._defaults)
        joined, inline = self._joined.get(kind), self._inline.get(kind)
        if joined is not None and (not _is_plain_inference(x) or any(map(_training, map(vars, self._modules)))):
            joined = None
        # A module without children may be in any mode: it computes by itself, and forwards.py has seen that the forward
        # does not read that mode.
        if inline is not None and any(_training(vars(each)) is not training for each in self._parents):
            inline = None
        if joined is None and inline is None:
            return None
        if not self._inside.unchanged(block):
            self.warn_once(block)
            return None
        kernels = None if joined is None else _kernels_for(x)
        program = inline if kernels is None else joined
        return None if program is None else partial(self._function(block, program, kernels), x, *numbers)

    def _function(self, block: nn.Module, program: Program, kernels: Any) -> Callable[..., Any]:
        if self.on_convolution is not None:
            return self._bind(block, program, kernels)
        key = id(program), kernels
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self._bind(block, program, kernels)
        return function

    def _bind(self, block: nn.Module, program: Program, kernels: Any) -> Callable[..., Any]:
        how = replace(self._hows[id(program)], kernels=kernels, on_convolution=self.on_convolution)
        return program.bind(block, partial(fused.bind, root=block, how=how))


def _is_plain_inference(x: Tensor) -> bool:
    """Whether nothing but the kernels has to see a call with `x`."""
    return not (
        torch.is_grad_enabled()
        or not (x.is_cpu or x.is_cuda)
        or x.numel() == 0
        or observed()
        or _C._len_torch_function_stack() > 0
        or under_transform()
        or torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda")
    )


def _kernels_for(x: Tensor) -> Any:
    """The kernels for `x` (fused.py), or None."""
    if x.is_cpu and (forcing.idle or forcing.current().allows(CPU)):
        # A profiler would not see the kernels, which are called around the dispatcher.
        return None if profiler._is_profiler_enabled or not CPU.has_fast_path() else CPU.unchecked
    backend = backends.select(x.device)
    return operators_of(backend) if backend.has_batch_norm else None


class FusedBlock(Replaced):
    """The first base of a replaced block's class."""

    _se_fused_swap: BlockSwap | None = None

    def extra_repr(self) -> str:
        swap = self._se_fused_swap
        fused = [] if swap is None else [f"fused: {call}" for call in swap.calls]
        return ", ".join(filter(None, (super().extra_repr(), *fused)))

    def _fused_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        swap = self._se_fused_swap
        found = None if swap is None else swap.arguments_of(args, kwargs)
        if swap is None or found is None:
            return None
        function = swap.function_for(self, *found)
        return None if function is None else function()


def ways_of_convolutions(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Run `model` on x, and return how the blocks in it compute their joined 1x1 convolutions (cost.py), by name."""
    found: dict[str, str] = {}
    blocks = [(name, each._se_fused_swap) for name, each in model.named_modules() if isinstance(each, FusedBlock)]
    swaps = [(name, swap) for name, swap in blocks if swap is not None]

    def note(block: str, path: str, how: str) -> None:
        found[f"{block}.{path}".lstrip(".")] = how

    try:
        for name, swap in swaps:
            swap.on_convolution = partial(note, name)
        with torch.inference_mode():
            model(x)
    finally:
        for _, swap in swaps:
            swap.on_convolution = None
    return found
