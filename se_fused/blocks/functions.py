"""Functions of foreign code that a trace calls whole, because torch.fx cannot follow them: stochastic depth, for
example, which draws a tensor of a size that depends on the map's."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

_OWN = ("torch", __name__.partition(".")[0])


def function_of(error: BaseException) -> FunctionType | None:
    """The innermost function of a module's top level in which `error` was raised; None if there is none."""
    found, at = None, error.__traceback__
    while at is not None:
        names, code = at.tb_frame.f_globals, at.tb_frame.f_code
        function = names.get(code.co_name)
        if isinstance(function, FunctionType) and function.__code__ is code:
            found = None if _is_own(function) else function
        at = at.tb_next
    return found


def _is_own(function: FunctionType) -> bool:
    return function.__module__.partition(".")[0] in _OWN


@contextmanager
def calling_whole(functions: Collection[FunctionType]) -> Iterator[None]:
    """Inside this block, a call of one of `functions` with a proxy of torch.fx becomes one call of the graph."""
    changed: list[tuple[dict[str, Any], str, FunctionType]] = []
    try:
        for function in functions:
            # Whoever calls it has imported it under some name.
            for module in list(sys.modules.values()):
                names = getattr(module, "__dict__", None) or {}
                for name in [name for name, value in names.items() if value is function]:
                    changed.append((names, name, function))
                    names[name] = _one_call(function)
        yield
    finally:
        for names, name, function in changed:
            names[name] = function


@dataclass(frozen=True)
class Apply:
    """The call of a torch.autograd.Function: its forward runs without gradients, where no call can be recorded."""

    function: type[torch.autograd.Function]
    __name__ = "apply"

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)


@contextmanager
def calling_functions_of_autograd_whole() -> Iterator[None]:
    """`calling_whole` for every torch.autograd.Function."""
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any) -> Any:
        return _recorded(original.__get__(None, cls), Apply(cls), args)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def _one_call(function: FunctionType) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _recorded(function, function, args, kwargs)

    return call


def _recorded(function: Callable[..., Any], target: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
    """What `function` returns, or if a proxy is among the arguments, that of a call of `target` in the graph."""
    kwargs = kwargs or {}
    proxy = next((each for each in tree_leaves((args, kwargs)) if isinstance(each, fx.Proxy)), None)
    return (
        function(*args, **kwargs) if proxy is None else proxy.tracer.create_proxy("call_function", target, args, kwargs)
    )
