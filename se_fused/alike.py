"""Examines modules of the same structure once: most networks repeat their blocks.

An examination runs a copy whose parameters and batch-norm statistics are random. What it finds can depend on everything
else in the copy, and that is the structure. What is not known to be the same is another structure, or none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .recognise import COPYING

_VALUES = (bool, int, float, complex, str, bytes, type(None))
_NAMED = (
    *(type, Enum, FunctionType, BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_SEQUENCES = (list, set, tuple, torch.Size)
_DICTS = (dict, OrderedDict)
# Objects and numbers of one structure. A block of timm's seresnet50 has 445, a stage of its legacy_senet154 9,939; a
# model may hold a table of millions.
_MOST = 10_000
Found = TypeVar("Found")


class Alike:
    """Remembers what examinations of one model found, by the structure of the module that was examined."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}  # of the structures
        self._structures: dict[nn.Module, int | None] = {}
        self._found: dict[Hashable, Any] = {}

    def once(self, examine: Callable[..., Found], module: nn.Module, *args: Any, facts: Hashable = ()) -> Found:
        """`examine(module, *args)`, or what it returned for a module of the same structure and the same facts.

        facts: all that `args` say. The result must not depend on anything else.
        """
        if module not in self._structures:
            structure = structure_of(module)
            number = None if structure is None else self._numbers.setdefault(structure, len(self._numbers))
            self._structures[module] = number
        number = self._structures[module]
        if number is None:
            return examine(module, *args)
        key = examine, number, facts
        if key not in self._found:
            self._found[key] = examine(module, *args)
        found: Found = self._found[key]
        return found


def paths_of(modules: Collection[nn.Module], root: nn.Module) -> tuple[str, ...]:
    """The names in `root` of those of `modules` that are in it."""
    return tuple(name for name, module in root.named_modules(remove_duplicate=False) if module in modules)


def structure_of(module: nn.Module) -> Hashable | None:
    """Everything that a copy of `module` with random parameters and batch-norm statistics consists of: classes,
    attributes, the shapes, strides and dtypes of tensors, and the numbers of other tensors. None if it is large, or
    holds an object that cannot be compared."""
    try:
        structure = _Structure(module).of(module)
        hash(structure)
    except Exception:  # foreign objects may fail in any way
        return None
    return structure


class _Opaque(Exception):
    pass


class _Same:
    """Equal for the same object alone, whatever its class says."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


class _Structure:
    def __init__(self, root: nn.Module) -> None:
        # The numbers of the objects that were met: which of them are the same is part of the structure.
        self._met: dict[int, int] = {}
        self._left = _MOST
        modules = list(root.modules())
        self._modules = set(map(id, modules))
        self._random = {id(p) for each in modules for p in each._parameters.values()}
        for norm in modules:
            if isinstance(norm, _BatchNorm):
                self._random |= {id(norm.running_mean), id(norm.running_var)}

    def of(self, value: Any) -> Hashable:
        if id(value) in self._met:
            return self._met[id(value)]
        self._met[id(value)] = len(self._met)
        self._spend(1)
        cls = type(value)
        return (_Same(cls), *self._parts(cls, value))

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _Opaque

    def _parts(self, cls: type, value: Any) -> tuple[Hashable, ...]:
        if cls in _VALUES:
            return (repr(value),)  # which tells 0.0 from -0.0
        if isinstance(value, _NAMED):
            return (_Same(value),)
        if isinstance(value, Tensor):
            return self._of_tensor(cls, value)
        if isinstance(value, nn.Module):
            return self._of_module(cls, value)
        if getattr(value, "__dict__", None):
            raise _Opaque
        if cls in _SEQUENCES or (cls.__base__ is tuple and hasattr(cls, "_fields")):
            return tuple(map(self.of, value))
        if cls in _DICTS:
            return tuple((self.of(key), self.of(each)) for key, each in value.items())
        raise _Opaque

    def _of_module(self, cls: type, module: nn.Module) -> tuple[Hashable, ...]:
        own_copying = any(getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in COPYING)
        has_slots = any(vars(base).get("__slots__") for base in cls.__mro__)
        if id(module) not in self._modules or own_copying or has_slots:
            raise _Opaque
        return tuple((name, self.of(each)) for name, each in vars(module).items())

    def _of_tensor(self, cls: type, t: Tensor) -> tuple[Hashable, ...]:
        facts = _Same(t.dtype), _Same(t.layout), str(t.device), t.shape, t.stride(), t.requires_grad
        if id(t) in self._random and cls in (Tensor, nn.Parameter):
            return facts
        if cls is not Tensor or vars(t) or t.requires_grad or t.layout is not torch.strided:
            raise _Opaque
        self._spend(t.numel())
        return (*facts, None if t.is_meta else repr(t.tolist()))
