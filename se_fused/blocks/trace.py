"""Reads a module's forward off as a Program, by torch.fx.

It must hold for every x of one rank. What a forward asks while it is traced would become a constant of the program:

    numbers and sizes of a map, in an `if` or a loop         refused by torch.fx
    the same, looked up or as text; dtype, device            refused by _Proxy
    the rank of a map                                        known from a sample
    tensors that are computed outside of the calls           refused by _NoTensors
    grad mode, autocast, checkpoints, changed inside         refused by _Tracer
    random numbers, tensors of others, devices               refused by `trace`
    dtype, grad mode, inference mode, autocast, as found     compared by `read` of examine.py
    modes of modules inside                                  refused by _Unreadable
    grad mode and autocast, by name                          refused by `obstacle` of examine.py
    arguments                                                compared by forwards.py
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Collection, Iterator, Mapping
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..undisturbed import are_equal, random_states
from .functions import calling_functions_of_autograd_whole, calling_whole, function_of
from .program import Call, Number, Program, Value, no_fused


class _AsksRank(Exception):
    """A forward asks for the rank of a value, by number, or for the length of a size. calls: those before it."""

    def __init__(self, calls: tuple[Call, ...], number: int) -> None:
        super().__init__("its forward asks for the rank of a map")
        self.calls, self.number = calls, number


class _Proxy(fx.Proxy):
    """Refuses questions whose answers depend on the call and would become constants of the program."""

    tracer: _Tracer

    def _refuse(self, *_: Any) -> Any:
        raise ValueError("its forward looks a map or a size up, or writes it as text")

    __hash__ = __str__ = __repr__ = __format__ = _refuse

    def dim(self) -> int:
        return self.tracer.rank_of(self.node)

    ndim = property(dim)

    def __len__(self) -> int:
        return self.tracer.rank_of(self.node) if _is_size(self.node) else int(super().__len__())

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "device", "layout", "requires_grad", "grad_fn", "is_cpu", "is_cuda"):
            raise ValueError(f"its forward reads the {name} of a map")
        return _Attribute(self, name)


class _Attribute(_Proxy, fx.proxy.Attribute):
    pass


def _is_size(node: Any) -> bool:
    """Whether the value is the size of a map, or a part of one."""
    if node.target is operator.getitem:
        return isinstance(node.args[1], slice) and _is_size(node.args[0])
    return (node.target is getattr and node.args[1] == "shape") or (
        node.op == "call_method" and node.target == "size" and len(node.args) == 1
    )


class _NoTensors(TorchDispatchMode):
    """Refuses operators on tensors with numbers: what is computed of them would become a constant of the program."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        raise ValueError(f"its forward computes {func} outside of the calls")


def _modes() -> tuple[Any, ...]:
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    # Checkpoints and offloading are such hooks.
    return torch.is_grad_enabled(), autocast, torch._C._autograd._top_saved_tensors_default_hooks(True)


class _Tracer(fx.Tracer):
    """It looks into modules that have children, but not into batch norms, SE layers and replaced blocks."""

    proxy_buffer_attributes = True

    def __init__(self, leaves: Collection[nn.Module], ranks: Mapping[int, int]) -> None:
        super().__init__()
        self._leaves, self._modes, self._ranks = leaves, _modes(), ranks
        self._numbers: dict[fx.Node, Number] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def argument(self, name: str, value: Any) -> Any:
        """`value` as an argument of the forward: a further value of the program in place of a Number."""
        if not isinstance(value, Number):
            return value
        proxy = self.create_proxy("placeholder", name, (), {})
        self._numbers[proxy.node] = value
        return proxy

    def rank_of(self, node: Any) -> int:
        number = list(self.graph.nodes).index(node)
        if number not in self._ranks:
            raise _AsksRank(_calls(self.graph)[0], number)
        return self._ranks[number]

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return map(obj.__getitem__, range(self.rank_of(obj.node))) if _is_size(obj.node) else super().iter(obj)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # One that the forward has just made has no path.
        if m not in self._own:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self._own = set(root.modules())
        return super().trace(root, concrete_args)

    def to_bool(self, obj: fx.Proxy) -> bool:
        number = self._numbers.get(obj.node)
        return super().to_bool(obj) if number is None else not number.is_zero

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise ValueError("its forward changes grad mode, autocast or what is saved for backward")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = not m._modules or isinstance(m, _BatchNorm) or m in self._leaves
        return own or super().is_leaf_module(m, module_qualified_name)


def trace(
    module: nn.Module,
    leaves: Collection[nn.Module],
    extras: Mapping[str, Any] = MappingProxyType({}),
    sample: Tensor | None = None,
    modeless: Collection[nn.Module] = (),
    whole: list[FunctionType] | None = None,
) -> Program:
    """Read the forward of `module` off, for one argument x. Modules in `leaves` are called whole, and so are functions
    that torch.fx cannot follow.

    extras: further arguments by name, of which a `Number` becomes a value of the program; the others have defaults.
    sample: an x; the forward may ask for the ranks of maps, for which calls are run on it. modeless: modules whose
    modes the forward may not read. whole: functions that are known to be called whole; others are added.

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
    whole = [] if whole is None else whole
    ranks: dict[int, int] = {}
    numbers = [each.example for each in extras.values() if isinstance(each, Number)]
    while True:
        states = random_states()
        try:
            with calling_whole(whole), calling_functions_of_autograd_whole():
                calls, result = _calls(_graph(module, _Tracer(leaves, ranks), extras, modeless))
        except _AsksRank as asked:
            if sample is None:
                raise
            run = Program(asked.calls, Value(asked.number), len(numbers)).bind(module, no_fused)
            with torch.random.fork_rng(devices=[]):
                value = run(sample.clone(), *numbers)
            ranks[asked.number] = value.dim() if isinstance(value, Tensor) else len(value)
        except Exception as error:
            function = function_of(error)
            if function is None or function in whole:
                raise
            whole.append(function)
        else:
            break
    if not are_equal(states, random_states()):
        raise ValueError("its forward draws random numbers that its calls depend on")
    known = {name for name, _ in itertools.chain(module.named_parameters(), module.named_buffers())}
    strange = next((call.target for call in calls if call.kind == "attribute" and call.target not in known), None)
    if strange is not None:
        raise ValueError(f"it uses a tensor that is no parameter or buffer of it: {strange}")
    if any(isinstance(leaf, torch.device) for call in calls for leaf in tree_leaves((call.args, call.kwargs))):
        raise ValueError("its forward names a device")
    return Program(calls, result, len(numbers))


class _Unreadable:
    """A mode that a forward may not ask for."""

    def __bool__(self) -> bool:
        raise ValueError("its forward reads the mode of a module inside")

    def __eq__(self, other: object) -> bool:
        return bool(self)

    def __hash__(self) -> int:
        return int(bool(self))


def _graph(module: nn.Module, tracer: _Tracer, extras: Mapping[str, Any], modeless: Collection[nn.Module]) -> fx.Graph:
    original = type(module)

    def forward(self: nn.Module, x: fx.Proxy) -> Any:
        return original.forward(self, x, **{name: tracer.argument(name, value) for name, value in extras.items()})

    # fx traces the forward of the class. This one has a single argument, so that fx keeps the defaults of the others.
    module.__class__ = type(original.__name__, (original,), {"forward": forward})
    modes = [(vars(each), each.training) for each in modeless]
    for attributes, _ in modes:
        attributes["training"] = _Unreadable()
    try:
        with _NoTensors():  # type: ignore[no-untyped-call]
            return tracer.trace(module)
    finally:
        for attributes, training in modes:
            attributes["training"] = training
        module.__class__ = original


_KINDS = {"call_module": "module", "call_function": "function", "call_method": "method", "get_attr": "attribute"}


def _calls(graph: fx.Graph) -> tuple[tuple[Call, ...], Any]:
    """The calls in `graph`, and what it returns."""
    numbers: dict[fx.Node, Value] = {}
    calls: list[Call] = []
    result: Any = None
    for i, node in enumerate(graph.nodes):
        args, kwargs = (fx.node.map_arg(each, numbers.get) for each in (node.args, node.kwargs))  # type: ignore[arg-type]
        numbers[node] = Value(i)
        if node.op == "output":
            (result,) = args
        elif node.op != "placeholder":
            target = str(node.target) if isinstance(node.target, str) else node.target
            calls.append(Call(i, _KINDS[node.op], target, _plain(args), tuple(_plain(kwargs).items())))
    return tuple(calls), _plain(result)


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
