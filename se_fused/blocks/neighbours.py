"""Finds what stands around an SE layer in a Program, and joins it with the layer in one call.

    before:  batch norm, activation                                  u = pre_act(norm(x))
    after:   sum with a residual, activation                         y = post_act(u * s + residual)
        or:  1x1 convolution                                         y = W (u * s) + b
        or:  1x1 convolution, batch norm, sum, activation            y = post_act(norm'(W (u * s) + b) + residual)

The other batch norms are joined with what follows them, and with a 1x1 convolution before them:
y = act(norm(W x + b) + residual). Each value in between must have one reader only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

from torch import nn

from ..recognised import Recognised
from .calls import CONVOLUTIONS, CONVOLVES, Calls, Tail
from .inline import Inline
from .program import Call, Program, Value


@dataclass(frozen=True)
class Neighbours:
    """An SE layer and the calls around it that are computed with it. Modules are named by their paths in the block.

    layer: the SE layer; inline: or its calls, if it is written into the forward of the block. norm: the batch norm
    before it. owns_x: nothing else reads x, which may be overwritten. conv, conv_norm: the 1x1 convolution after it,
    and the batch norm after that. residual, post_act: whether a sum follows these, and the activation at the end.
    residual_first: as in Tail. at_edge: whether x or y is that of the block, so that further neighbours may stand
    outside.
    """

    layer: str
    recognised: Recognised
    norm: str | None
    pre_act: str
    owns_x: bool
    residual: bool
    residual_first: bool
    post_act: str
    conv: str | None
    conv_norm: str | None
    at_edge: bool
    inline: Program | None = None

    def count(self) -> int:
        """How many passes over a map, or allocations of one, are saved."""
        calls = (self.norm, self.pre_act != "identity", self.residual, self.post_act != "identity", self.conv)
        return sum(map(bool, (*calls, self.conv_norm, self.owns_x)))

    def __str__(self) -> str:
        return _listed(
            self.owns_x, self.norm, self.pre_act, self.layer or "SE", self.conv, self.conv_norm,
            "residual" if self.residual else None, self.post_act,
        )  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """A batch norm and the calls around it that are computed with it: act(norm(conv(x)) + residual).

    conv: the 1x1 convolution before it, and norm, by their paths in the block. owns_x: nothing else reads what the
    batch norm reads, which may be overwritten. residual: whether a sum follows.
    residual_first: as in Tail.
    """

    conv: str | None
    norm: str
    owns_x: bool
    residual: bool
    residual_first: bool
    act: str

    def __str__(self) -> str:
        return _listed(self.owns_x, self.conv, self.norm, "residual" if self.residual else None, self.act)


def _listed(in_place: bool, *names: str | None) -> str:
    return " + ".join(name for name in names if name and name != "identity") + (", in place" if in_place else "")


def join(program: Program, root: nn.Module, layers: dict[str, Recognised]) -> tuple[Program, list[Neighbours]]:
    """`program` with the SE layers of these paths, and inline ones, joined with their neighbours; only those that have
    any.

    root: a float64 copy, in eval mode, of the module that `program` was traced from; it is called.
    """
    joined = []
    for call in program.calls:
        inline = call.target if call.kind == "fused" and isinstance(call.target, Inline) else None
        if inline is None and not (call.kind == "module" and call.target in layers):
            continue
        path, recognised = (call.target, layers[call.target]) if inline is None else ("", inline.recognised)
        found = _join_layer(Calls(program, root), call, path, recognised, inline)
        if found is not None:
            program, neighbours = found
            joined.append(neighbours)
    return program, joined


def join_norms(program: Program, root: nn.Module) -> Program:
    """`program` with the batch norms that `join` has left joined with what follows them."""
    for call in program.calls:
        program = _join_norm(Calls(program, root), call)
    return program


def _join_layer(
    calls: Calls, layer: Call, path: str, recognised: Recognised, inline: Inline | None
) -> tuple[Program, Neighbours] | None:
    # The kernels add no residual u, take no maps with the channels last, and have no gate 2 * sigmoid.
    if recognised.residual or recognised.channels_last or recognised.is_doubled:
        return None
    uses = sum(call.kind == "module" and call.target == path for call in calls.program.calls)
    if uses > 1 or layer.kwargs or len(layer.args) != 1 or not isinstance(layer.args[0], Value):
        return None
    x, norm, pre_act, before = _before(calls, layer.args[0])
    owns_x = calls.owns(x)
    tail = calls.tail(layer)
    taken = [*before, layer, *tail.calls]
    conv = conv_norm = None
    if tail.residual is None and tail.act == "identity":
        conv = _pointwise(calls, calls.reader(taken[-1]))
    if conv is not None:
        taken.append(conv)
        conv_norm = calls.reader(conv)
        if conv_norm is not None and calls.act_of_norm(conv_norm) == "identity":
            tail = calls.tail(conv_norm)
            taken += [conv_norm, *tail.calls]
        else:
            conv_norm = None
    last = taken[-1]
    reads = [] if owns_x else [min(call.number for call in taken)]
    if calls.moves_a_read(reads + ([] if tail.read is None else [tail.read]), taken, last):
        return None
    at_edge = x.number == 0 or calls.program.result == Value(last.number)
    neighbours = Neighbours(
        path, recognised, norm, pre_act, owns_x, tail.residual is not None, tail.residual_first, tail.act,
        None if conv is None else conv.target, None if conv_norm is None else conv_norm.target, at_edge,
        None if inline is None else inline.program,
    )  # fmt: skip
    if neighbours.count() == 0:
        return None
    args = (x,) if tail.residual is None else (x, tail.residual)
    return _joined(calls.program, taken, Call(last.number, "fused", neighbours, args)), neighbours


def _join_norm(calls: Calls, call: Call) -> Program:
    act = calls.act_of_norm(call)
    if act is None or not isinstance(call.args[0], Value):
        return calls.program
    tail = calls.tail(call) if act == "identity" else Tail(())
    act = act if act != "identity" else tail.act
    x, owns_x = call.args[0], calls.owns(call.args[0])
    conv = _pointwise(calls, calls.by_number.get(x.number)) if owns_x else None
    residual = () if tail.residual is None else (tail.residual,)
    late = [] if tail.read is None else [tail.read]
    if conv is not None and isinstance(conv.args[0], Value):
        taken = [conv, call, *tail.calls]
        if not calls.moves_a_read([conv.number, *late], taken, taken[-1]):
            norm = Norm(conv.target, call.target, True, tail.residual is not None, tail.residual_first, act)
            return _joined(calls.program, taken, Call(taken[-1].number, "fused", norm, (conv.args[0], *residual)))
    norm = Norm(None, call.target, owns_x, tail.residual is not None, tail.residual_first, act)
    taken = [call, *tail.calls]
    if not (owns_x or norm.residual or act != "identity"):
        return calls.program
    if calls.moves_a_read(late if owns_x else [call.number, *late], taken, taken[-1]):
        return calls.program
    return _joined(calls.program, taken, Call(taken[-1].number, "fused", norm, (x, *residual)))


def _joined(program: Program, taken: list[Call], fused: Call) -> Program:
    """`program` with the call `fused` in place of the calls `taken`."""
    gone = {call.number for call in taken}
    calls = (fused if call.number == fused.number else call for call in program.calls)
    return changed(program, calls=tuple(call for call in calls if call is fused or call.number not in gone))


def _before(calls: Calls, value: Value) -> tuple[Value, str | None, str, list[Call]]:
    """x, the batch norm and the activation between x and `value`, and their calls."""
    act, taken = "identity", list[Call]()
    while True:
        call = calls.by_number.get(value.number)
        if call is None or calls.uses[value.number] != 1 or len(call.values()) != 1:
            return value, None, act, taken
        of_norm = calls.act_of_norm(call)
        found = of_norm or calls.activation(call)
        if found is None or "identity" not in (found, act):
            return value, None, act, taken
        taken.append(call)
        act, value = found if act == "identity" else act, call.values()[0]
        if of_norm:
            return value, call.target, act, taken


def _pointwise(calls: Calls, call: Call | None) -> Call | None:
    """`call`, if it is that of a 1x1 convolution with stride 1 and one group, as the call of a module."""
    if call is not None and call.kind == "function" and call.target in CONVOLVES:
        return _of_module(calls, call)
    if call is None or call.kind != "module" or len(call.args) != 1 or call.kwargs:
        return None
    conv: Any = calls.root.get_submodule(call.target)
    if type(conv) not in CONVOLUTIONS:
        return None
    ones, zeros = (1,) * len(conv.kernel_size), (0,) * len(conv.kernel_size)
    if (conv.kernel_size, conv.stride, conv.padding, conv.groups) != (ones, ones, zeros, 1):
        return None
    return call if conv.padding_mode == "zeros" else None


def _of_module(calls: Calls, call: Call) -> Call | None:
    """`call`, of a function with the weight and bias of a 1x1 convolution, as a call of that module."""
    if call.kwargs or len(call.args) != 7 or not all(isinstance(value, Value) for value in call.args[:2]):
        return None
    x, weight, bias, stride, padding, _, groups = call.args
    producer = calls.by_number.get(weight.number)
    path, _, leaf = producer.target.rpartition(".") if producer and producer.kind == "attribute" else ("", "", "")
    conv: Any = calls.root.get_submodule(path)
    if leaf != "weight" or not isinstance(conv, CONVOLUTIONS) or math.prod(conv.kernel_size) > 1:
        return None
    own_bias = calls.by_number[bias.number].target if isinstance(bias, Value) else bias
    if own_bias != (None if conv.bias is None else f"{path}.bias".lstrip(".")):
        return None
    if {*stride} != {1} or {*padding} != {0} or groups != 1:
        return None
    return Call(call.number, "module", path, (x,))
