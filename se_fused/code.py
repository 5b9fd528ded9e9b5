"""What the code of a forward names, read without running it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

# Questions whose answers belong to a call, not to a layer.
_MODES = {
    *("is_grad_enabled", "is_inference_mode_enabled", "is_inference", "is_autocast_enabled", "is_autocast_cpu_enabled"),
    *("get_autocast_dtype", "get_autocast_gpu_dtype", "get_autocast_cpu_dtype"),
}


def functions_of(cls: type[Any]) -> Iterator[tuple[FunctionType, list[CodeType]]]:
    """The forward of a class, the methods and functions that it names, and so on, each with the code of the functions
    inside it. PyTorch's own are left out."""
    names, todo, seen = ["forward"], list[FunctionType](), set[Any]()
    while names or todo:
        function = getattr(cls, names.pop(), None) if names else todo.pop()
        if not isinstance(function, FunctionType) or function in seen or function.__module__.startswith("torch."):
            continue
        seen.add(function)
        codes = [function.__code__]
        for code in codes:  # grows by the functions inside
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
            names += code.co_names
            named = map(function.__globals__.get, code.co_names)
            todo += [each for each in named if isinstance(each, FunctionType)]
        yield function, codes


@functools.cache
def asks_for_modes(cls: type[Any]) -> str | None:
    """The first question for grad mode, inference mode or autocast in the code of a forward; None if there is none."""
    names = (name for _, codes in functions_of(cls) for code in codes for name in code.co_names)
    return next((name for name in names if name in _MODES), None)
