"""Examines modules of the same structure once: most networks repeat their blocks."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_VALUES = (bool, int, float, complex, str, bytes, type(None))
# Equal only if they are the same, or as good as that.
_NAMED = (
    *(type, Enum, FunctionType, BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_TUPLES, _LISTS = (tuple, torch.Size), (list, deque)
_DICTS = (dict, OrderedDict)
# Of a tensor that is the same in the copy. To read so many takes 1 ms.
_MOST_NUMBERS = 10_000
Found = TypeVar("Found")


class Alike:
    """Remembers what examinations of one model found, by the structure of the module that was examined."""

    def __init__(self) -> None:
        self._structures: dict[nn.Module, Hashable] = {}
        self._found: dict[Hashable, Any] = {}

    def once(self, examine: Callable[..., Found], module: nn.Module, *args: Any, facts: Hashable = ()) -> Found:
        """`examine(module, *args)`, or what it returned for a module of the same structure and the same facts.

        facts: all that `args` say. The result must not depend on anything else.
        """
        if module not in self._structures:
            self._structures[module] = structure_of(module)
        structure = self._structures[module]
        if structure is None:
            return examine(module, *args)
        key = examine, structure, facts
        if key not in self._found:
            self._found[key] = examine(module, *args)
        found: Found = self._found[key]
        return found


def paths_of(modules: Collection[nn.Module], root: nn.Module) -> tuple[str, ...]:
    """The names in `root` of those of `modules` that are in it."""
    return tuple(name for name, module in root.named_modules(remove_duplicate=False) if module in modules)


def structure_of(module: nn.Module) -> Hashable | None:
    """Everything that a copy of `module` with random parameters and batch norms consists of: classes, attributes, the
    shapes, strides and dtypes of tensors, and the numbers of other tensors. None if it holds large ones of these, or
    objects that cannot be compared."""
    try:
        return _Structure().of(module)
    except _Opaque:
        return None


class _Opaque(Exception):
    pass


class _Structure:
    def __init__(self) -> None:
        # The numbers of the objects that were met: which of them are the same is part of the structure.
        self._met: dict[int, int] = {}
        self._random: set[int] = set()  # the ids of the buffers of batch norms that are random in the copy

    def of(self, value: Any) -> Hashable:
        cls = type(value)
        if cls in _VALUES:
            return cls, repr(value)  # which tells 0.0 from -0.0
        if isinstance(value, _NAMED):
            return value
        if cls in _TUPLES or (isinstance(value, tuple) and hasattr(cls, "_fields")):
            return cls, tuple(map(self.of, value))
        if id(value) in self._met:
            return "met", self._met[id(value)]
        self._met[id(value)] = len(self._met)
        if cls in _LISTS:
            return cls, tuple(map(self.of, value))
        if cls is set:
            return cls, frozenset(map(self.of, value))
        if cls in _DICTS:
            return cls, tuple((self.of(key), self.of(each)) for key, each in value.items())
        if cls is nn.Parameter or id(value) in self._random:
            return cls, value.dtype, value.layout, value.device, value.shape, value.stride(), value.requires_grad
        if cls is Tensor and value.numel() <= _MOST_NUMBERS:
            numbers = None if value.is_meta else repr(value.tolist())
            return cls, value.dtype, value.layout, value.device, value.shape, value.stride(), numbers
        if isinstance(value, nn.Module) and not any(vars(base).get("__slots__") for base in cls.__mro__):
            if isinstance(value, _BatchNorm):
                self._random |= {id(value.running_mean), id(value.running_var)} - {id(None)}
            return cls, tuple((name, self.of(each)) for name, each in vars(value).items())
        raise _Opaque
