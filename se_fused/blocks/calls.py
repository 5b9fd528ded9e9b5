"""What the calls of a Program compute, and who reads their results.

What a module computes is found by numbers, not by its class, except for convolutions and for the statistics of a batch
norm.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..equivalence import same
from ..options import ACTIVATIONS
from ..tracing import GRID
from .program import Call, Program, Value

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVES = (F.conv1d, F.conv2d, F.conv3d)
# Where a clamp or an overflow shows that the grid does not reach.
_EXTREMES = torch.tensor(
    [1e-30, -1e-30, 1e3, -1e3, 1e5, -1e5, 1e9, -1e9, 1e30, -1e30, torch.inf, -torch.inf, torch.nan],
    dtype=torch.float64, device="cpu",
)  # fmt: skip
_ACTIVATION_METHODS = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")
_IN_PLACE_SUMS = (operator.iadd, "add_")
_SUMS = (operator.add, torch.add, "add", "__add__", *_IN_PLACE_SUMS)
# Functions and methods whose result has memory of its own.
_NEW = (operator.add, torch.add, "add", torch.cat, *CONVOLVES)


@dataclass(frozen=True)
class Tail:
    """The calls after a value v that compute act(v + residual), or as much of it as there is.

    calls: these calls, in order. read: the number of the one that reads the residual. residual_first: whether the sum
    is written residual + v; the layout of a sum is that of its first operand.
    """

    calls: tuple[Call, ...]
    residual: Value | None = None
    act: str = "identity"
    read: int | None = None
    residual_first: bool = False


class Calls:
    """The calls of `program`. root: a float64 copy, in eval mode, of the module that it was traced from; it is
    called."""

    def __init__(self, program: Program, root: nn.Module) -> None:
        self.program, self.root = program, root
        self.uses = program.uses()
        self.by_number = {call.number: call for call in program.calls}

    def owns(self, value: Value) -> bool:
        """Whether nothing but its only reader has the memory of `value`, so that it may be overwritten."""
        producer = self.by_number.get(value.number)
        if self.uses[value.number] != 1 or producer is None:
            return False
        if producer.kind == "module":
            return type(self.root.get_submodule(producer.target)) in CONVOLUTIONS
        return producer.kind == "fused" or (producer.target in _NEW and not producer.kwargs)

    def moves_a_read(self, reads: list[int], taken: list[Call], last: Call) -> bool:
        """Whether a value that was read by the calls of these numbers could be written to before `last`, which will
        read it when the calls `taken` are gone."""
        others = {call.number for call in self.program.calls} - {call.number for call in taken}
        return any(read < number < last.number for read in reads for number in others)

    def reader(self, call: Call) -> Call | None:
        """The only call that reads the result of `call`, if there is just one."""
        if self.uses[call.number] != 1:
            return None
        return next((each for each in self.program.calls if Value(call.number) in each.values()), None)

    def identities(self, call: Call) -> list[Call]:
        """The calls after `call` that return their argument unchanged."""
        found: list[Call] = []
        reader = self.reader(call)
        while reader is not None and self.activation(reader) == "identity":
            found.append(reader)
            reader = self.reader(reader)
        return found

    def tail(self, call: Call) -> Tail:
        """What follows `call`, whose result is v."""
        taken = self.identities(call)
        last, residual, read, first = (taken or [call])[-1], None, None, False
        reader = self.reader(last)
        if reader is not None and reader.target in _SUMS and reader.kind in ("function", "method"):
            args = reader.args
            own = Value(last.number)
            of_two = len(args) == 2 and not reader.kwargs and all(isinstance(arg, Value) for arg in args)
            if of_two and args[0] != args[1] and (args[0] == own or reader.target not in _IN_PLACE_SUMS):
                first, read = args[1] == own, reader.number
                residual = args[0] if first else args[1]
                taken += [reader, *self.identities(reader)]
                reader = self.reader(taken[-1])
        act = None if reader is None else self.activation(reader)
        if reader is None or act is None:
            return Tail(tuple(taken), residual, "identity", read, first)
        return Tail((*taken, reader), residual, act, read, first)

    def activation(self, call: Call) -> str | None:
        """The name of the activation that `call` applies to its only value; None if it is none."""
        if call.kind == "module":
            function: Any = self.root.get_submodule(call.target)
            if function._modules or _has_numbers(function):
                return None
        elif call.kind == "function":
            function = call.target
        elif call.kind == "method" and call.target in _ACTIVATION_METHODS:
            function = getattr(Tensor, call.target)
        else:
            return None
        if not call.args or not isinstance(call.args[0], Value) or len(call.values()) != 1:
            return None
        rest, keywords = call.args[1:], dict(call.kwargs)

        def of(v: Tensor) -> Any:
            return function(v, *rest, **keywords)

        return _name_of(of, lambda v: v, (1, 1, -1, 1)) if _keeps_kind(of) else None

    def act_of_norm(self, call: Call) -> str | None:
        """The activation of a batch norm that may have one of its own ("identity": none); None if `call` is no batch
        norm with statistics of its own."""
        if call.kind != "module" or len(call.args) != 1 or call.kwargs:
            return None
        norm = self.root.get_submodule(call.target)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
            return None
        if norm._parameters.keys() - {"weight", "bias"} or any(map(_has_numbers, list(norm.modules())[1:])):
            return None
        if norm._buffers.keys() - {"running_mean", "running_var", "num_batches_tracked"}:
            return None
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)

        def plain(v: Tensor) -> Tensor:
            return F.batch_norm(v, *statistics, eps=norm.eps)

        for rank in (4, 3, 5):
            shape = (1, norm.num_features, -1, *(1,) * (rank - 3))
            found = _name_of(norm, plain, shape)
            if found is not None:
                with _wide(norm):
                    return found if _name_of(norm, plain, shape, (found,)) else None
        return None


@contextlib.contextmanager
def _wide(norm: _BatchNorm) -> Iterator[None]:
    """Give a batch norm numbers from tiny to huge, at which a bound or a floor in its forward shows."""
    tensors = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None]
    before = [t.detach().clone() for t in tensors]
    sizes = torch.logspace(-6, 6, norm.num_features, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for i, t in enumerate(tensors):
            t.copy_(sizes.roll(7 * i).abs() if t is norm.running_var else sizes.roll(7 * i) * t.sign())
    try:
        yield
    finally:
        with torch.no_grad():
            for t, numbers in zip(tensors, before, strict=True):
                t.copy_(numbers)


def _has_numbers(module: nn.Module) -> bool:
    """Whether a module without children computes with numbers that may change."""
    of_classes = [value for cls in type(module).__mro__ for value in vars(cls).values()]
    return any(isinstance(value, Tensor) for value in (*vars(module).values(), *of_classes)) or bool(
        module._parameters or module._buffers
    )


def _keeps_kind(function: Callable[[Tensor], Any]) -> bool:
    """Whether the result has the type, dtype and layout of the argument, for three dtypes and two layouts."""
    v = torch.linspace(-9, 9, 48, dtype=torch.float64, device="cpu").view(2, 4, 3, 2)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            given = v.to(dtype, memory_format=layout, copy=True)
            strides = given.stride()
            try:
                got = function(given)
            except Exception:  # foreign code may fail in any way
                return False
            if type(got) is not Tensor or got.dtype is not dtype or got.stride() != strides:
                return False
    return True


def _name_of(
    function: Any, before: Any, shape: tuple[int, ...], names: Collection[str] = tuple(ACTIVATIONS)
) -> str | None:
    """The activation act, one of `names`, if `function` computes act(before(v)) for all v; on maps of `shape`, with a
    -1."""
    grid, extreme = (values.expand(shape[1], -1).reshape(shape) for values in (GRID, _EXTREMES))
    try:
        got, got_extreme = function(grid.clone()), function(extreme.clone())
    except Exception:  # foreign code may fail in any way on a map that it was not made for
        return None
    if not isinstance(got, Tensor) or got.shape != grid.shape or got.dtype != grid.dtype:
        return None
    v, v_extreme = before(grid), before(extreme)
    for name in names:
        act = ACTIVATIONS[name]
        if same(got, act(v)) and torch.allclose(got_extreme, act(v_extreme), rtol=1e-6, atol=1e-30, equal_nan=True):
            return name
    return None
