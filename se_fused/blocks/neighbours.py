"""Finds what stands around an SE layer in a Program, and joins it with the layer in one call.

    before:  batch norm, activation                      u = pre_act(scale * x + shift)
    after:   sum with a residual, activation             y = post_act(u * s + residual)
        or:  1x1 convolution, batch norm                 y = W' (u * s) + b'

Each value in between must have one reader only. What a module computes is found by numbers, not by its class, except
for convolutions and for the statistics of a batch norm.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..equivalence import same
from ..options import ACTIVATIONS
from ..recognised import Recognised
from ..tracing import GRID
from .program import Call, Program, Value

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Where a clamp or an overflow shows that the grid does not reach.
_EXTREMES = torch.tensor(
    [1e-30, -1e-30, 1e3, -1e3, 1e5, -1e5, 1e9, -1e9, 1e30, -1e30, torch.inf, -torch.inf, torch.nan],
    dtype=torch.float64, device="cpu",
)  # fmt: skip
_ACTIVATION_METHODS = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")
_IN_PLACE_SUMS = (operator.iadd, "add_")
_SUMS = (operator.add, torch.add, "add", "__add__", *_IN_PLACE_SUMS)


@dataclass(frozen=True)
class Neighbours:
    """An SE layer and the calls around it that are computed with it. Modules are named by their paths in the block.

    layer: the SE layer. norm: the batch norm before it. owns_x: nothing else reads x, which may be overwritten.
    residual: whether a sum follows. conv, conv_norm: the 1x1 convolution after it, and the batch norm after that.
    at_edge: whether x or y is that of the block, so that further neighbours may stand outside.
    """

    layer: str
    recognised: Recognised
    norm: str | None
    pre_act: str
    owns_x: bool
    residual: bool
    post_act: str
    conv: str | None
    conv_norm: str | None
    at_edge: bool

    def count(self) -> int:
        """How many passes over a map, or allocations of one, are saved."""
        calls = (self.norm, self.pre_act != "identity", self.residual, self.post_act != "identity", self.conv)
        return sum(map(bool, (*calls, self.conv_norm, self.owns_x)))

    def __str__(self) -> str:
        before = [self.norm] if self.norm else []
        before += [self.pre_act] if self.pre_act != "identity" else []
        after = ["residual"] if self.residual else []
        after += [self.post_act] if self.post_act != "identity" else []
        after += [each for each in (self.conv, self.conv_norm) if each]
        return " + ".join([*before, self.layer or "SE", *after]) + (", in place" if self.owns_x else "")


def join(program: Program, root: nn.Module, layers: dict[str, Recognised]) -> tuple[Program, list[Neighbours]]:
    """`program` with the SE layers of these paths joined with their neighbours; only those that have any.

    root: a float64 copy, in eval mode, of the module that `program` was traced from; it is called.
    """
    joined = []
    for path, recognised in layers.items():
        uses = program.uses()
        found = _Match(program, root, uses, path, recognised).find()
        if found is not None:
            program, neighbours = found
            joined.append(neighbours)
    return program, joined


class _Match:
    """The search around one SE layer."""

    def __init__(self, program: Program, root: nn.Module, uses: Any, path: str, recognised: Recognised) -> None:
        self.program, self.root, self.uses = program, root, uses
        self.path, self.recognised = path, recognised
        self.calls = {call.number: call for call in program.calls}
        self.taken: list[Call] = []
        self.sum: int | None = None  # the number of the call that adds the residual

    def find(self) -> tuple[Program, Neighbours] | None:
        own = [call for call in self.program.calls if call.kind == "module" and call.target == self.path]
        if self.recognised.residual:  # it would be that of u, which the kernels do not add
            return None
        if len(own) != 1 or own[0].kwargs or len(own[0].args) != 1 or not isinstance(own[0].args[0], Value):
            return None
        (layer,) = own
        self.taken.append(layer)
        x, norm, pre_act = self._before(layer.args[0])
        producer = self.calls.get(x.number)
        owns_x = (
            self.uses[x.number] == 1
            and producer is not None
            and producer.kind == "module"
            and type(self.root.get_submodule(producer.target)) in CONVOLUTIONS
        )
        last, residual, post_act = self._sum(layer)
        conv = conv_norm = None
        if residual is None and post_act == "identity":
            last, conv, conv_norm = self._convolution(last)
        if self._moves_a_read(owns_x, last):
            return None
        at_edge = producer is None or (last is layer and self.program.result == Value(layer.number))
        neighbours = Neighbours(
            self.path, self.recognised, norm, pre_act, owns_x, residual is not None, post_act, conv, conv_norm,
            at_edge,
        )  # fmt: skip
        if neighbours.count() == 0:
            return None
        args = (x,) if residual is None else (x, residual)
        fused = Call(last.number, "fused", neighbours, args)
        taken = {call.number for call in self.taken}
        calls = (fused if call is last else call for call in self.program.calls)
        kept = (call for call in calls if call is fused or call.number not in taken)
        return changed(self.program, calls=tuple(kept)), neighbours

    def _moves_a_read(self, owns_x: bool, last: Call) -> bool:
        """Whether x or the residual, which the joined call reads in the place of `last`, could be written to between
        that place and the one where it was read."""
        reads = [] if owns_x else [min(call.number for call in self.taken)]
        reads += [] if self.sum is None else [self.sum]
        others = {call.number for call in self.program.calls} - {call.number for call in self.taken}
        return any(read < number < last.number for read in reads for number in others)

    def _before(self, value: Value) -> tuple[Value, str | None, str]:
        """x, and the batch norm and activation between x and `value`."""
        act = "identity"
        while True:
            call = self.calls.get(value.number)
            if call is None or self.uses[value.number] != 1 or len(call.values()) != 1:
                return value, None, act
            of_norm = self._act_of_norm(call)
            found = of_norm or self._activation(call)
            if found is None or "identity" not in (found, act):
                return value, None, act
            self.taken.append(call)
            act, value = found if act == "identity" else act, call.values()[0]
            if of_norm:
                return value, call.target, act

    def _reader(self, call: Call) -> Call | None:
        """The only call that reads the result of `call`, if there is just one."""
        if self.uses[call.number] != 1:
            return None
        return next((each for each in self.program.calls if Value(call.number) in each.values()), None)

    def _skip_identities(self, call: Call) -> Call:
        """The last of the calls from `call` on that return their argument unchanged."""
        reader = self._reader(call)
        while reader is not None and self._activation(reader) == "identity":
            self.taken.append(reader)
            call, reader = reader, self._reader(reader)
        return call

    def _sum(self, layer: Call) -> tuple[Call, Value | None, str]:
        """The last call, the residual and the activation of post_act(u * s + residual)."""
        last = self._skip_identities(layer)
        reader, residual = self._reader(last), None
        if reader is not None and reader.target in _SUMS and reader.kind in ("function", "method"):
            args = reader.args
            own = Value(last.number)
            of_two = len(args) == 2 and not reader.kwargs and all(isinstance(arg, Value) for arg in args)
            if of_two and args[0] != args[1] and (args[0] == own or reader.target not in _IN_PLACE_SUMS):
                residual = args[1] if args[0] == own else args[0]
                self.taken.append(reader)
                self.sum = reader.number
                last = self._skip_identities(reader)
                reader = self._reader(last)
        act = None if reader is None else self._activation(reader)
        if reader is None or act is None:
            return last, residual, "identity"
        self.taken.append(reader)
        return reader, residual, act

    def _convolution(self, last: Call) -> tuple[Call, str | None, str | None]:
        """The last call, the 1x1 convolution that reads the result of `last`, and the batch norm after it."""
        reader = self._reader(last)
        if reader is None or reader.kind != "module" or len(reader.args) != 1 or reader.kwargs:
            return last, None, None
        conv = self.root.get_submodule(reader.target)
        if type(conv) not in CONVOLUTIONS or not _is_pointwise(conv):
            return last, None, None
        self.taken.append(reader)
        norm = self._reader(reader)
        if norm is None or self._act_of_norm(norm) != "identity":
            return reader, reader.target, None
        self.taken.append(norm)
        return norm, reader.target, norm.target

    def _activation(self, call: Call) -> str | None:
        """The name of the activation that `call` applies to its only value; None if it is none."""
        if call.kind == "module":
            module = self.root.get_submodule(call.target)
            if module._parameters or module._buffers or module._modules:
                return None
            function: Any = module
        elif call.kind == "function":
            function = call.target
        elif call.kind == "method" and call.target in _ACTIVATION_METHODS:
            function = getattr(Tensor, call.target)
        else:
            return None
        if not call.args or not isinstance(call.args[0], Value) or len(call.values()) != 1:
            return None
        rest, keywords = call.args[1:], dict(call.kwargs)
        return _name_of(lambda v: function(v, *rest, **keywords), lambda v: v, (1, 1, -1, 1))

    def _act_of_norm(self, call: Call) -> str | None:
        """The activation of a batch norm that may have one of its own ("identity": none); None if `call` is no batch
        norm with statistics of its own."""
        if call.kind != "module" or len(call.args) != 1 or call.kwargs:
            return None
        norm = self.root.get_submodule(call.target)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
            return None
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        for rank in (4, 3, 5):
            shape = (1, norm.num_features, -1, *(1,) * (rank - 3))
            found = _name_of(norm, lambda v: F.batch_norm(v, *statistics, eps=norm.eps), shape)
            if found is not None:
                return found
        return None


def _name_of(function: Any, before: Any, shape: tuple[int, ...]) -> str | None:
    """The activation act, if `function` computes act(before(v)) for all v; on maps of `shape`, with a -1."""
    grid, extreme = (values.expand(shape[1], -1).reshape(shape) for values in (GRID, _EXTREMES))
    try:
        got, got_extreme = function(grid.clone()), function(extreme.clone())
    except Exception:  # foreign code may fail in any way on a map that it was not made for
        return None
    if not isinstance(got, Tensor) or got.shape != grid.shape or got.dtype != grid.dtype:
        return None
    v, v_extreme = before(grid), before(extreme)
    for name, act in ACTIVATIONS.items():
        if same(got, act(v)) and torch.allclose(got_extreme, act(v_extreme), rtol=1e-6, atol=1e-30, equal_nan=True):
            return name
    return None


def _is_pointwise(conv: Any) -> bool:
    ones, zeros = (1,) * len(conv.kernel_size), (0,) * len(conv.kernel_size)
    simple = conv.groups == 1 and conv.padding_mode == "zeros"
    return bool(simple and (conv.kernel_size, conv.stride, conv.padding) == (ones, ones, zeros))
