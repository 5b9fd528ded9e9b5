"""What the code of a forward names, read without running it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

# Questions whose answers belong to a call, not to a layer.
_MODES = {
    *("is_grad_enabled", "is_inference_mode_enabled", "is_inference", "is_autocast_enabled", "is_autocast_cpu_enabled"),
    *("get_autocast_dtype", "get_autocast_gpu_dtype", "get_autocast_cpu_dtype"),
}
# Of functions that are not read.
_OWN = ("torch.", f"{__package__}.")


def functions_of(cls: type[Any]) -> Iterator[tuple[FunctionType, list[CodeType]]]:
    """The forward of a class and of the classes that it inherits from, the methods, properties and functions that they
    name, and so on, each with the code of the functions inside it. Those of PyTorch and of se_fused are left out."""
    names, todo, seen = ["forward"], list[Any](), set[Any]()
    while names or todo:
        if names:
            name = names.pop()
            todo += [vars(base)[name] for base in cls.__mro__ if name in vars(base)]
            continue
        function = todo.pop()
        if isinstance(function, (property, staticmethod, classmethod)):
            function = function.fget if isinstance(function, property) else function.__func__
        if not isinstance(function, FunctionType) or function in seen or function.__module__.startswith(_OWN):
            continue
        seen.add(function)
        codes = [function.__code__]
        for code in codes:  # grows by the functions inside
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
            names += code.co_names
            todo += map(function.__globals__.get, code.co_names)
        for cell in function.__closure__ or ():  # as that of a decorator
            with contextlib.suppress(ValueError):  # it is empty
                todo.append(cell.cell_contents)
        yield function, codes


def asks_for_modes(cls: type[Any]) -> str | None:
    """The first question for grad mode, inference mode or autocast in the code of a forward; None if there is none."""
    names = (name for _, codes in functions_of(cls) for code in codes for name in code.co_names)
    return next((name for name in names if name in _MODES), None)
