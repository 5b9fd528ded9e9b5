"""Restores the state of the process after foreign code has run, so that examining a model has no side effects."""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .inside import GLOBAL_HOOKS, is_torch_or_builtin

_CONTAINERS = (list, dict, set, deque)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[list[str]]:
    """Run copies of `model` inside this block. Afterwards its classes, the containers that its code names, the random
    states and the number of threads are as before.

    Yields a list to which the end of the block adds the names of what it had to restore. Inside the block, global
    module hooks are not called, and PyTorch uses one thread, because a process forked later would hang in an OpenMP
    pool that was started here. TorchScript functions are not optimised, because TorchScript's fuser fails on the meta
    device.
    """
    classes = {cls: dict(vars(cls)) for module in model.modules() for cls in type(module).__mro__}
    containers = {id(each): (name, each, _contents(each)) for name, each in _reachable(classes)}
    hooks = [(each, _contents(each)) for each in GLOBAL_HOOKS]
    draws, threads = random_states(), torch.get_num_threads()
    changed: list[str] = []
    for each in GLOBAL_HOOKS:
        each.clear()
    torch.set_num_threads(1)
    try:
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            yield changed
    finally:
        torch.set_num_threads(threads)
        for each, contents in hooks:
            _restore_container(each, contents)
        torch.set_rng_state(draws[0])
        random.setstate(draws[1])
        if draws[2] is not None:
            sys.modules["numpy.random"].set_state(pickle.loads(draws[2]))
        for cls, attributes in classes.items():
            changed += _restore_class(cls, attributes)
        for name, each, contents in containers.values():
            if not _is_same(_contents(each), contents):
                _restore_container(each, contents)
                changed.append(name)


@contextmanager
def undisturbed_inference(model: nn.Module) -> Iterator[list[str]]:
    """`undisturbed`, with gradients, inference mode and autocast off, whatever the caller has on."""
    with (
        undisturbed(model) as changed,
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield changed


def random_states() -> tuple[Any, Any, Any]:
    """The random states of torch (on the CPU), Python, and NumPy if it is loaded."""
    numpy = sys.modules.get("numpy.random")
    # As bytes, which are compared faster than the array of 624 numbers in it.
    own = pickle.dumps(numpy.get_state(legacy=False)) if numpy else None
    return torch.get_rng_state(), random.getstate(), own


def are_equal(states: tuple[Any, Any, Any], others: tuple[Any, Any, Any]) -> bool:
    return torch.equal(states[0], others[0]) and states[1:] == others[1:]


def _restore_class(cls: type, attributes: dict[str, Any]) -> Iterator[str]:
    for name in {*vars(cls), *attributes}:
        if name not in attributes:
            delattr(cls, name)
        elif vars(cls).get(name, attributes) is not attributes[name]:
            setattr(cls, name, attributes[name])
        else:
            continue
        if name != "__slotnames__":  # a cache of the copy module
            yield f"{cls.__name__}.{name}"


def _reachable(classes: dict[type, dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The lists, dicts, sets and deques that the code of these classes can name, with their names: the attributes of
    the classes, and the globals, closures and defaults of their functions. PyTorch's classes are left out."""
    seen: set[int] = set()
    for cls, attributes in classes.items():
        if is_torch_or_builtin(cls):
            continue
        for name, value in attributes.items():
            if name.startswith("__") and not isinstance(value, FunctionType):
                continue
            yield from _named(f"{cls.__name__}.{name}", value, cls.__module__, seen)


def _named(name: str, value: Any, module: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (staticmethod, classmethod, property)):
        value = value.fget if isinstance(value, property) else value.__func__
    if isinstance(value, _CONTAINERS):
        yield name, value
    elif isinstance(value, FunctionType) and value.__module__ == module and id(value) not in seen:
        seen.add(id(value))
        for used in value.__code__.co_names:
            yield from _named(used, value.__globals__.get(used), module, seen)
        for used, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield from _named(used, cell.cell_contents, module, seen)
            except ValueError:  # the cell is empty
                continue
        for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            yield from _named(f"a default of {name}", default, module, seen)


def _contents(container: Any) -> list[Any]:
    return list(container.items() if isinstance(container, dict) else container)


def _is_same(contents: list[Any], others: list[Any]) -> bool:
    def flat(each: list[Any]) -> list[int]:
        return [id(part) for item in each for part in (item if isinstance(item, tuple) else (item,))]

    return flat(contents) == flat(others)


def _restore_container(container: Any, contents: list[Any]) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(contents)
