"""A module's forward as a list of calls: read off by torch.fx, rewritten by `neighbours`, and made a function again.

A Program is plain data. It names modules by their paths, so that it fits every copy of the module that it was read off.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode


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
        return list(_values((self.args, self.kwargs)))


@dataclass(frozen=True)
class Program:
    """The calls of a forward of one argument x, in order, and what it returns (values in tuples, lists and dicts)."""

    calls: tuple[Call, ...]
    result: Any

    def uses(self) -> Counter[int]:
        """How often each value is used, by number."""
        used = [value for call in self.calls for value in call.values()] + list(_values(self.result))
        return Counter(value.number for value in used)

    def bind(self, root: nn.Module, fused: Callable[[Any], Callable[..., Any]]) -> Callable[[Tensor], Any]:
        """The function of x that makes these calls with the modules of `root`.

        It is Python source, run once, and drops each value after its last use, as the forward itself would. It refers
        to the modules of `root` but not to `root`.
        """
        last: dict[int, int] = {}
        for call in self.calls:
            last |= {value.number: call.number for value in call.values()}
        kept = {value.number for value in _values(self.result)}
        names: dict[str, Any] = {}
        lines = ["def forward(v0):"]
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


def _values(tree: Any) -> Iterator[Value]:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, slice):
        yield from _values((tree.start, tree.stop, tree.step))
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from _values(each)
    elif isinstance(tree, dict):
        yield from _values(list(tree.values()))


class _Proxy(fx.Proxy):
    """Refuses questions whose answers depend on the call and would become constants of the program."""

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "device", "layout", "requires_grad", "grad_fn", "is_cpu", "is_cuda"):
            raise ValueError(f"its forward reads the {name} of a map")
        return super().__getattr__(name)


class _NoTensors(TorchDispatchMode):
    """Refuses operators on tensors with numbers: what is computed of them would become a constant of the program."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        raise ValueError(f"its forward computes {func} outside of the calls")


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


class _Tracer(fx.Tracer):
    """It looks into modules that have children, but not into batch norms, SE layers and replaced blocks."""

    proxy_buffer_attributes = True

    def __init__(self, leaves: Collection[nn.Module]) -> None:
        super().__init__()
        self._leaves, self._modes = leaves, _modes()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise ValueError("its forward changes grad mode or autocast")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = not m._modules or isinstance(m, _BatchNorm) or m in self._leaves
        return own or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module, leaves: Collection[nn.Module]) -> Program:
    """Read the forward of `module` off, for one argument x and its defaults for the others. Modules in `leaves` are
    called whole.

    Raises:
        Exception: whatever torch.fx or the forward raises where the calls depend on the numbers or sizes of x.
        ValueError: if the forward uses a tensor that is no parameter or buffer of it, computes with one, or depends on
            dtype, device or modes.
    """
    original = type(module)
    first, *others = list(inspect.signature(original.forward).parameters.values())[1:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others):
        raise ValueError("its forward takes several inputs")
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise ValueError("its forward takes any inputs")
    # fx traces the forward of the class. This one has a single argument, so that fx keeps the defaults of the others.
    module.__class__ = type(original.__name__, (original,), {"forward": lambda self, x: original.forward(self, x)})
    try:
        with _NoTensors():  # type: ignore[no-untyped-call]
            graph = _Tracer(leaves).trace(module)
    finally:
        module.__class__ = original
    numbers: dict[fx.Node, Value] = {}
    counter = itertools.count()
    calls: list[Call] = []
    result: Any = None
    known = {name for name, _ in itertools.chain(module.named_parameters(), module.named_buffers())}
    kinds = {
        "call_module": "module",
        "call_function": "function",
        "call_method": "method",
        "get_attr": "attribute",
    }
    for node in graph.nodes:
        args, kwargs = (fx.node.map_arg(each, numbers.get) for each in (node.args, node.kwargs))  # type: ignore[arg-type]
        if node.op == "output":
            (result,) = args
            continue
        numbers[node] = Value(next(counter))
        if node.op == "placeholder":
            continue
        if node.op == "get_attr" and node.target not in known:
            raise ValueError(f"it uses a tensor that is no parameter or buffer of it: {node.target}")
        target = str(node.target) if isinstance(node.target, str) else node.target
        calls.append(Call(numbers[node].number, kinds[node.op], target, _plain(args), tuple(_plain(kwargs).items())))
    return Program(tuple(calls), _plain(result))


def _plain(tree: Any) -> Any:
    """`tree` with the immutable lists and dicts of torch.fx as tuples, lists and dicts."""
    if type(tree) is tuple:
        return tuple(map(_plain, tree))
    if isinstance(tree, list):
        return [_plain(each) for each in tree]
    if isinstance(tree, dict):
        return {key: _plain(each) for key, each in tree.items()}
    if isinstance(tree, slice):
        return slice(*map(_plain, (tree.start, tree.stop, tree.step)))
    return tree
