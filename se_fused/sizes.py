"""Whether a layer does the same to maps of every size, told from its operators alone: on maps without memory.

Numbers can only be compared at sizes that are affordable; pooling over a window of 384 positions would not be noticed.
"""

from __future__ import annotations

import math
import weakref
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SIDES = (7, 1, 28, 56, 160, 224, 512, 1024)


def dependence(layer: nn.Module, c: int, dims: int) -> str | None:
    """Why `layer`, on the meta device, is not the same at every size of a map [N, C, *spatial] of `dims` dimensions;
    None if it is."""
    runs = []
    for side in _SIDES:
        # Square and not: with the sides s, s, s and s + 2, s + 1, s.
        for longer in (0, 1):
            shape = (2, c, *(side + longer * i for i in reversed(range(dims - 2))))
            try:
                run = _Run(layer, shape)
            except Exception as error:
                return f"what it does to a map cannot be followed without data: {error}"
            if run.outlived():
                return "a call keeps a tensor that it computed, which others may read"
            runs.append(run)
    differing = next((run for run in runs if not run.equals(runs[0])), None)
    if differing is None:
        return None
    return f"it does not compute on a map of shape {list(differing.shape)} what it does at {list(runs[0].shape)}"


class _Run(TorchDispatchMode):
    """The operators of one run in eval mode, each with its arguments that are no tensors."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape = shape
        self.calls: list[tuple[str, list[Any]]] = []
        self._made: list[weakref.ref[Tensor]] = []
        x = torch.empty(shape, dtype=torch.float64, device="meta")
        with self:
            layer(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs))
        self.calls.append((str(func), [leaf for leaf in given if not isinstance(leaf, Tensor)]))
        tensors = {id(leaf) for leaf in given if isinstance(leaf, Tensor)}
        self._made += [weakref.ref(t) for t in tree_leaves(out) if isinstance(t, Tensor) and id(t) not in tensors]
        return out

    def outlived(self) -> bool:
        """Whether someone holds a tensor that the run made."""
        return any(made() is not None for made in self._made)

    def equals(self, other: _Run) -> bool:
        """Whether operators and numbers are the same, but for sizes and their products."""
        pairs = set(zip(_products(self.shape), _products(other.shape), strict=True))

        def same(a: Any, b: Any) -> bool:
            if a == b or (a, b) in pairs:
                return True
            return isinstance(a, float) and any(math.isclose(a * p, 1) and math.isclose(b * q, 1) for p, q in pairs)

        return len(self.calls) == len(other.calls) and all(
            name == other_name and len(mine) == len(its) and all(map(same, mine, its))
            for (name, mine), (other_name, its) in zip(self.calls, other.calls, strict=True)
        )


def _products(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(some) for k in range(1, len(shape) + 1) for some in combinations(shape, k)]
