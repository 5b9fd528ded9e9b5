"""A module's forward as a list of calls: read off by `trace`, rewritten by `neighbours`, and made a function again.

A Program is plain data. It names modules by their paths, so that it fits every copy of the module that it was read off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Value:
    """The result of the call of this number; x itself is number 0."""

    number: int


@dataclass(frozen=True)
class Call:
    """One call of a forward, whose result is the value of the same number.

    kind: what `target` is: "module" (a path), "attribute" (a path), "method" (a name), "function" (the function), or
    "fused" (the data that `Program.bind` is given a function for).
    """

    number: int
    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def values(self) -> list[Value]:
        return list(values_of((self.args, self.kwargs)))


@dataclass(frozen=True)
class Number:
    """Stands for every number of a type that an argument of a forward may be: for 0, or for all others."""

    of: type[int] | type[float]
    is_zero: bool

    @property
    def example(self) -> int | float:
        return self.of(0) if self.is_zero else {int: 3, float: 0.3}[self.of]


@dataclass(frozen=True)
class Program:
    """The calls of a forward of x, in order, and what it returns (values in tuples, lists and dicts).

    numbers: how many further arguments are values, which have the numbers 1, 2, ...
    """

    calls: tuple[Call, ...]
    result: Any
    numbers: int = 0

    def uses(self) -> Counter[int]:
        """How often each value is used, by number."""
        used = [value for call in self.calls for value in call.values()] + list(values_of(self.result))
        return Counter(value.number for value in used)

    def bind(self, root: nn.Module, fused: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any]:
        """The function of x, and of the numbers, that makes these calls with the modules of `root`.

        It is Python source, run once, and drops each value after its last use, as the forward itself would. It refers
        to the modules of `root` but not to `root`.
        """
        last: dict[int, int] = {}
        for call in self.calls:
            last |= {value.number: call.number for value in call.values()}
        kept = {value.number for value in values_of(self.result)}
        names: dict[str, Any] = {}
        lines = [f"def forward({', '.join(f'v{i}' for i in range(1 + self.numbers))}):"]
        for call in self.calls:
            target = f"f{call.number}"
            names[target] = _bound(call, root, fused)
            keywords = [f"{name}={_source(value, names)}" for name, value in call.kwargs]
            arguments = ", ".join([_source(value, names) for value in call.args] + keywords)
            lines.append(f"    v{call.number} = {target}({arguments})")
            ended = [n for n, at in last.items() if at == call.number and n not in kept]
            if call.number not in last and call.number not in kept:
                ended.append(call.number)
            if ended:
                lines.append(f"    del {', '.join(f'v{n}' for n in ended)}")
        lines.append(f"    return {_source(self.result, names)}")
        exec("\n".join(lines), names)
        return names.pop("forward")  # type: ignore[no-any-return]


def _bound(call: Call, root: nn.Module, fused: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any]:
    if call.kind == "module":
        return root.get_submodule(call.target)
    if call.kind == "fused":
        return fused(call.target)
    if call.kind == "method":
        name = call.target
        return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)
    if call.kind == "attribute":
        path, _, leaf = call.target.rpartition(".")
        owner = vars(root.get_submodule(path))  # not root itself, which would be a cycle
        holder = "_parameters" if leaf in owner["_parameters"] else "_buffers"
        return lambda: owner[holder][leaf]
    return call.target  # type: ignore[no-any-return]


def _source(value: Any, names: dict[str, Any]) -> str:
    """`value` as Python source; what has none becomes a name in `names`."""
    if isinstance(value, Value):
        return f"v{value.number}"
    if type(value) is tuple:
        return f"({''.join(_source(each, names) + ', ' for each in value)})"
    if type(value) is list:
        return f"[{', '.join(_source(each, names) for each in value)}]"
    if type(value) is dict:
        return f"{{{', '.join(f'{key!r}: {_source(each, names)}' for key, each in value.items())}}}"
    if type(value) is slice:
        return f"slice({', '.join(_source(each, names) for each in (value.start, value.stop, value.step))})"
    name = f"c{len(names)}"
    names[name] = value
    return name


def renumbered(tree: Any, numbers: Mapping[int, Value]) -> Any:
    """`tree`, a call or what stands in one, with other values in place of those of these numbers."""
    if isinstance(tree, Value):
        return numbers.get(tree.number, tree)
    if isinstance(tree, Call):
        return replace(tree, args=renumbered(tree.args, numbers), kwargs=renumbered(tree.kwargs, numbers))
    if type(tree) is slice:
        return slice(*(renumbered(each, numbers) for each in (tree.start, tree.stop, tree.step)))
    if type(tree) in (tuple, list):
        return type(tree)(renumbered(each, numbers) for each in tree)
    if type(tree) is dict:
        return {key: renumbered(each, numbers) for key, each in tree.items()}
    return tree


def values_of(tree: Any) -> Iterator[Value]:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, slice):
        yield from values_of((tree.start, tree.stop, tree.step))
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from values_of(each)
    elif isinstance(tree, dict):
        yield from values_of(list(tree.values()))


def no_fused(target: Any) -> Any:
    """For `Program.bind`, where no call is "fused"."""
    raise ValueError(f"{target} is no call of a forward")
