"""Checks that a layer runs the same operators on every map, whatever its size, mode, dtype and strides.

The layer runs on the meta device, which computes no numbers, so large maps cost nothing. A comparison of numbers is
limited to affordable sizes: it would not notice pooling over a window of 384 positions.
"""

from __future__ import annotations

import copy
import math
import weakref
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import tracing
from .recognised import Recognised

# Batch and longest side. There is no batch of 1, for which einsum chooses other operators.
_SIZES = ((2, 7), (3, 1), (5, 28), (4, 56), (2, 160), (8, 224), (16, 512), (64, 1024))
_aten = torch.ops.aten
# The results of these have the shape, strides and dtype of that of sigmoid.
_LIKE_SIGMOID = {
    *(_aten.relu.default, _aten.leaky_relu.default, _aten.gelu.default, _aten.mish.default, _aten.softplus.default),
    *(_aten.hardsigmoid.default, _aten.hardswish.default, _aten.hardtanh.default, _aten.clamp.default),
}


def violation(layer: nn.Module, recognised: Recognised, dims: int) -> str | None:
    """How the operators of `layer`, on the meta device, depend on the map of `dims` dimensions, on the mode (except
    that of batch norms) or on the dtype; None if they do not."""
    c = recognised.channels
    # Each size twice: with the sides s, s, s and with s + 2, s + 1, s. And sides of C, which a layer could take for the
    # channels.
    sides = [(n, [s + i * k for i in reversed(range(dims - 2))]) for n, s in _SIZES for k in (0, 1)]
    sides[2:2] = [(2, [5] * (dims - 3) + [c]), (2, [c] * (dims - 2))]
    shapes = [(n, *spatial, c) if recognised.channels_last else (n, c, *spatial) for n, spatial in sides]
    others = [copy.deepcopy(layer).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    try:
        for training, grad in product((True, False), (True, False)):
            for each in (layer, *others):
                tracing.set_mode(each, training)
            first = _Run(layer, shapes[0], grad)
            # All sizes in the two usual cases: training with gradients, inference without.
            runs = [(layer, shape) for shape in (shapes if training == grad else shapes[-2:])]
            runs += [(other, shapes[1]) for other in others]
            found = next(filter(None, (_difference(_Run(*run, grad), first) for run in runs)), None)
            if found is not None:
                return found
        run = _Run(layer, shapes[1], moves=(-1, 1) if recognised.channels_last else (1, -1)) if dims > 3 else None
    except Exception as error:
        return f"what it does to a map cannot be followed without data: {error}"
    return "it changes the memory format of its map" if run is not None and not run.keeps_strides else None


def _difference(run: _Run, first: _Run) -> str | None:
    if run.stranger:
        return "it uses a tensor that is no parameter of it"
    if run.outlived():
        return "a call keeps a tensor that it computed, which others may read"
    if not run.keeps_dtype:
        return f"it changes the dtype of a map of {run.dtype}"
    if run.equals(first):
        return None
    return f"it does not compute on a map of {run.text} what it does on one of {first.text}"


class _Run(TorchDispatchMode):
    """One run of a layer: its operators, each with its arguments other than tensors. moves: x is contiguous after
    `movedim` with these arguments; None for a contiguous x."""

    def __init__(
        self, layer: nn.Module, shape: tuple[int, ...], grad: bool = False, moves: tuple[int, int] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.dtype = shape, next(layer.parameters()).dtype
        self.text = f"shape {list(shape)}, {self.dtype}, in {'train' if layer.training else 'eval'} mode"
        self.calls: list[tuple[str, list[Any]]] = []
        self.stranger = False
        self._made: list[weakref.ref[Tensor]] = []
        x = torch.empty(shape, dtype=self.dtype, device="meta")
        if moves is not None:
            x = x.movedim(*moves).contiguous().movedim(*reversed(moves))
        self._known = {id(t) for t in (x, *layer.parameters(), *layer.buffers())}
        with torch.set_grad_enabled(grad), self:
            y = layer(x)
        self.keeps_dtype = y.dtype is self.dtype
        self.keeps_strides = y.stride() == x.stride()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = _on_meta(func, args, kwargs or {})
        given = tree_leaves((args, kwargs))
        self.calls.append((str(func), [leaf for leaf in given if not isinstance(leaf, Tensor)]))
        tensors = {id(leaf) for leaf in given if isinstance(leaf, Tensor)}
        # torch.tensor makes a new tensor through lift_fresh, so that one is no stranger.
        self.stranger |= "lift_fresh" not in str(func) and not tensors <= self._known
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and id(t) not in tensors]
        self._known |= {id(t) for t in made}
        self._made += map(weakref.ref, made)
        return out

    def outlived(self) -> bool:
        """Whether anyone still holds a tensor that the run made."""
        return any(made() is not None for made in self._made)

    def equals(self, other: _Run) -> bool:
        """Whether both runs have the same operators and arguments. Dtypes, sizes and products of sizes may differ."""
        pairs = set(zip(_products(self.shape), _products(other.shape), strict=True))

        def same(a: Any, b: Any) -> bool:
            if a == b or (a, b) in pairs or (isinstance(a, torch.dtype) and isinstance(b, torch.dtype)):
                return True
            return isinstance(a, float) and any(math.isclose(a * p, 1) and math.isclose(b * q, 1) for p, q in pairs)

        return len(self.calls) == len(other.calls) and all(
            name == other_name and len(mine) == len(its) and all(map(same, mine, its))
            for (name, mine), (other_name, its) in zip(self.calls, other.calls, strict=True)
        )


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """The result of an operator on the meta device, or that of a quicker one with the same shape, strides and dtype.

    PyTorch decomposes many operators in Python there, which takes 0.2 to 1.6 ms; sigmoid takes 0.03 ms.
    """
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        if func in _LIKE_SIGMOID:
            return args[0].sigmoid()
        if func is _aten.mean.dim:
            return args[0].sum(*args[1:], **kwargs)
        if func is _aten.addmm.default and args[0].dtype is args[1].dtype and args[0].shape == args[2].shape[1:]:
            return args[1].mm(args[2])
    return func(*args, **kwargs)


def _products(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(some) for k in range(1, len(shape) + 1) for some in combinations(shape, k)]
