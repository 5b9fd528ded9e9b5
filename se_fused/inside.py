"""A snapshot of the inside of a layer, taken when it is examined, so that later changes are noticed.

For the layer and each module below it, the snapshot covers the class, the members of the class, attributes, children
and their order, hooks (but not the layer's own, which are still called), and which parameters and buffers exist. It
does not cover the values of parameters and buffers, PyTorch's own classes except their `forward`, and the inside of an
attribute that is neither a module nor a list, tuple, dict, set or deque.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections import deque
from collections.abc import Mapping
from operator import attrgetter, itemgetter
from typing import Any

from torch import nn
from torch.nn.modules import module as _nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(_nn, f"_global{hooks}") for hooks in HOOKS)
SWAP = "_se_fused_swap"  # the attribute of a replaced layer that holds its Swap
# Attributes of nn.Module that its forward does not read; hooks and parameters are checked separately.
_IGNORED = {
    *("training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_is_full_backward_hook", SWAP, *HOOKS),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
}
# What Python itself notes in a class.
_NOTES_IN_CLASS = {
    *("__slotnames__", "__doc__", "__annotations__", "__annotations_cache__", "__abstractmethods__", "_abc_impl"),
}
# Attributes by which libraries mark modules.
_LIBRARY_MARKS = {"_is_hf_initialized", "_is_fsdp_managed_module", "_fsdp_use_orig_params"}
# Attributes that are dicts of modules, parameters or tensors.
_CONTENTS = ("_modules", "_parameters", "_buffers")
_NAMES = {"_modules": "children"}
_forward = attrgetter("forward")
_hooks = itemgetter(*HOOKS)
_parameters = itemgetter("_parameters")
_buffers = itemgetter("_buffers")


def _snapshot(value: Any) -> Any:
    """`value`, with containers copied, because they may be changed in place."""
    if type(value) in (list, tuple):
        return type(value)(map(_snapshot, value))
    if isinstance(value, dict):
        return {key: _snapshot(inner) for key, inner in value.items()}
    return copy.copy(value) if isinstance(value, (list, set, deque)) else value


class _Watched:
    """The watched attributes of one module or class: their names and values, and the number of all its attributes."""

    def __init__(self, whose: str, attributes: Mapping[str, Any], names: list[str]) -> None:
        self.whose, self.names = whose, names
        self.get = itemgetter(*names) if len(names) > 1 else lambda these: tuple(these[name] for name in names)
        values = self.get(attributes)
        self.values = tuple(map(_snapshot, values))
        self.count = len(attributes)


def _members(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if name not in _NOTES_IN_CLASS}


def _watched_in_module(attributes: Mapping[str, Any]) -> list[str]:
    return [name for name in attributes if name not in _IGNORED]


def _watched_in_class(attributes: Mapping[str, Any]) -> list[str]:
    return [name for name in attributes if not name.startswith("__") or name in ("__call__", "__getattr__")]


class Inside:
    """A snapshot of the inside of `layer`, whose class was `original`. It holds no reference to `layer` itself."""

    def __init__(self, layer: nn.Module, original: type[Any]) -> None:
        below = dict(layer.named_modules())
        del below[""]
        self._names, self._below = list(below), tuple(below.values())
        self._types = tuple(map(type, self._below))
        self._own_type = type(layer)
        self._versioned = tuple(dict.fromkeys((self._own_type, original, *self._types)))
        self._bases = [cls.__mro__ for cls in self._versioned]
        self._members = {cls: _members(cls) for bases in self._bases for cls in bases if cls is not object}
        own = [cls for each in (original, *self._types) for cls in each.__mro__ if not is_torch_or_builtin(cls)]
        self._classes = [vars(cls) for cls in dict.fromkeys(own)]
        self._torch_classes = tuple(cls for cls in dict.fromkeys(self._types) if is_torch_or_builtin(cls))
        self._forwards = tuple(map(_forward, self._torch_classes))
        modules = list(map(vars, (layer, *self._below)))
        self._watched = [
            *(
                _Watched(f"of its {name}" if name else "of it", attributes, _watched_in_module(attributes))
                for name, attributes in zip(["", *below], modules, strict=True)
            ),
            *(_Watched(f"of {cls.__name__}", vars(cls), _watched_in_class(vars(cls))) for cls in dict.fromkeys(own)),
        ]
        self._update_columns()
        containers = [module._modules for module in (layer, *self._below) if module._modules]
        self._containers, self._order = containers, list(map(list, containers))
        parameters = [module._parameters for module in (layer, *self._below)]
        self._parameters = list(map(list, parameters))
        self._buffers = list(map(list, map(_buffers, modules)))
        self._absent = [
            (i, kind, name)
            for i, attributes in enumerate(modules)
            for kind in ("_parameters", "_buffers")
            for name, value in attributes[kind].items()
            if value is None
        ]
        self._note_items(layer)

    def _note_items(self, layer: nn.Module) -> None:
        """Note the attributes of all modules by identity, and the versions of their classes, for a first comparison in
        C++, which takes less time.

        Where an attribute is a container, whose contents may change, only the versions are compared.
        """
        self._extension: Any = sys.modules.get("se_fused._C")
        modules = list(map(vars, (layer, *self._below)))
        of_classes = itertools.chain.from_iterable(self._values[len(modules) :])
        self._has_containers = any(map(_is_mutable, of_classes))
        self._versions = [] if self._extension is None else self._extension.versions(self._versioned)
        self._inner: list[dict[str, Any]] = []
        self._items: list[tuple[Any, ...]] = []
        contents: list[tuple[Any, ...]] = []
        for i, attributes in enumerate(modules):
            expected = dict(attributes)
            for name, value in attributes.items():
                if name in _CONTENTS or (i > 0 and name in HOOKS):
                    self._inner.append(value)
                    # Parameters and buffers may have any value, but one that is None stays None.
                    any_value = name in ("_parameters", "_buffers")
                    found = {key: ... if any_value and each is not None else each for key, each in value.items()}
                    contents.append(_flat(found))
                elif name in _IGNORED:
                    expected[name] = ...
                elif _is_mutable(value):
                    self._has_containers = True
            self._items.append(_flat(expected))
        self._items += contents

    def _update_columns(self) -> None:
        """List the parts of `_watched` for `unchanged`, whose comparisons take whole lists."""
        self._getters = [each.get for each in self._watched]
        self._values = [each.values for each in self._watched]
        self._counts = [each.count for each in self._watched]

    def unchanged(self, layer: nn.Module) -> bool:
        """Whether `change` would find nothing. Every forward asks this, so the comparisons are ones that run in C."""
        if type(layer) is not self._own_type or (self._below and any(GLOBAL_HOOKS)):
            return False
        extension, modules = self._extension, list(map(vars, (layer, *self._below)))
        if extension is not None:
            if not extension.same_types(self._below, self._types, self._versioned, self._versions):
                if self._class_change() is not None:
                    return False
                self._versions = extension.versions(self._versioned)
            elif not self._has_containers and extension.same_items([*modules, *self._inner], self._items):
                return True
        watched = [*modules, *self._classes]
        try:
            return not (
                tuple(map(type, self._below)) != self._types
                or tuple(map(_forward, self._torch_classes)) != self._forwards
                or [get(each) for get, each in zip(self._getters, watched)] != self._values  # noqa: B905
                or (list(map(len, watched)) != self._counts and self.change(layer) is not None)
                or any(map(any, map(_hooks, modules[1:])))
                or list(map(list, self._containers)) != self._order
                or list(map(list, map(_parameters, modules))) != self._parameters
                or list(map(list, map(_buffers, modules))) != self._buffers
                or any(modules[i][kind][name] is not None for i, kind, name in self._absent)
            )
        except Exception:  # an attribute is gone, or objects of a foreign type cannot be compared
            return False

    def change(self, layer: nn.Module, marks: bool = False) -> str | None:
        """Describe the first change; None if there is none. `marks`: the marks of libraries count as changes."""
        if self._below and any(GLOBAL_HOOKS):
            return "a hook for all modules was registered"
        for name, module, cls in zip(self._names, self._below, self._types, strict=True):
            if type(module) is not cls:
                return f"the class of its {name} is {type(module).__name__}"
            if any(_hooks(vars(module))):
                return f"its {name} has hooks"
        for cls, forward in zip(self._torch_classes, self._forwards, strict=True):
            if _forward(cls) is not forward:
                return f"the forward of {cls.__name__} was replaced"
        modules = list(map(vars, (layer, *self._below)))
        for i, (each, attributes) in enumerate(zip(self._watched, [*modules, *self._classes], strict=True)):
            for name, value in zip(each.names, each.values, strict=True):
                if name not in attributes or not _equal(attributes[name], value):
                    return f"the {_NAMES.get(name, name)} {each.whose} changed"
            of_class = not isinstance(attributes, dict)
            watched = (_watched_in_class if of_class else _watched_in_module)(attributes)
            for name in watched:
                if name not in each.names and (marks or name not in _LIBRARY_MARKS):
                    return f"the {name} {each.whose} is new"
            if len(attributes) != each.count:
                # Only attributes that do not count as changes came or went. Record the present ones, so that their
                # removal is noticed too.
                self._watched[i] = _Watched(each.whose, attributes, watched)
                self._update_columns()
                self._note_items(layer)
        if list(map(list, self._containers)) != self._order:
            return "the order of children changed"
        if list(map(list, map(_parameters, modules))) != self._parameters:
            return "a parameter is new, or gone"
        if list(map(list, map(_buffers, modules))) != self._buffers:
            return "a buffer is new, or gone"
        for i, kind, name in self._absent:
            if modules[i][kind][name] is not None:
                return f"the {name} {self._watched[i].whose} is new where there was none"
        if type(layer) is not self._own_type:
            return f"its class is {type(layer).__name__}"
        return self._class_change()

    def _class_change(self) -> str | None:
        """A change of a class, or of one that it inherits from; None if there is none."""
        for cls, bases in zip(self._versioned, self._bases, strict=True):
            if cls.__mro__ != bases:
                return f"the bases of {cls.__name__} changed"
        for cls, before in self._members.items():
            now = _members(cls)
            if now.keys() != before.keys() or any(now[name] is not value for name, value in before.items()):
                return f"the class {cls.__name__} changed"
        return None


def _is_mutable(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_is_mutable, value))
    return isinstance(value, (list, dict, set, deque))


def _flat(items: dict[str, Any]) -> tuple[Any, ...]:
    """(key, value, key, value, ...), as `same_items` of csrc/python.cpp takes it."""
    return tuple(part for pair in items.items() for part in pair)


def is_torch_or_builtin(cls: type) -> bool:
    """Whether a class belongs to PyTorch or is one of Python's builtins."""
    return cls.__module__.split(".")[0] in ("torch", "builtins")


def _equal(value: Any, snapshot: Any) -> bool:
    try:
        return value is snapshot or bool(value == snapshot)
    except Exception:  # from a foreign __eq__, such as that of arrays, whose truth value is ambiguous
        return False
