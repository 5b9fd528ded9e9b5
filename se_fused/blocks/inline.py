"""Finds SE layers that are written into a forward: the calls of a Program that lead from a map u to u * s.

Every value that depends on x has a dominator, the last value that all paths from x to it pass. Where two paths meet, as
u and s do in the product, the calls since the dominator are a part with one input and one result. Whether a part is an
SE layer is decided as for a module: it is made one, and recognised by what it computes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor, nn

from ..recognise import recognise
from ..recognised import Recognised
from ..tracing import weight_shapes
from .program import Call, Program, Value, no_fused, renumbered

_SIZES = ("size", "dim", "numel", "ndimension")
_VIEWS = 2
_ARITHMETIC = ("_operator", "math")
# Products over the map: as `recognise` demands, the part makes a map of its own instead. The rest of the forward then
# reads that one.
_IN_PLACE = {operator.imul: operator.mul, "mul_": "mul"}
_ELSEWHERE = "a step between its map and its product is read elsewhere too"


@dataclass(frozen=True)
class Inline:
    """An SE layer written into a forward. program: its calls, from u to u * s. recognised: with names below the module
    whose forward it is."""

    program: Program
    recognised: Recognised

    def __str__(self) -> str:
        return str(self.recognised)


class _Part(nn.Module):
    """The calls of `program`, a part of the forward of `root`, as a module with what they use, under the same names."""

    def __init__(self, program: Program, root: nn.Module) -> None:
        super().__init__()
        self._program = program
        for call in sorted(program.calls, key=lambda call: str(call.target).count(".")):
            if call.kind == "module":
                self._own(call.target, root.get_submodule(call.target))
            elif call.kind == "attribute":
                path, _, leaf = call.target.rpartition(".")
                owner = root.get_submodule(path)
                self._own(call.target, owner._parameters.get(leaf, owner._buffers.get(leaf)))

    def _own(self, name: str, value: Any) -> None:
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = self
        for step in path.split(".") if path else ():
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        if isinstance(value, nn.Module):
            if leaf not in owner._modules:
                owner.add_module(leaf, value)
        elif isinstance(value, nn.Parameter):
            if leaf not in owner._parameters:
                owner.register_parameter(leaf, value)
        elif leaf not in owner._buffers:
            owner.register_buffer(leaf, value)

    def forward(self, x: Tensor) -> Any:
        return self._program.bind(self, no_fused)(x)


@dataclass
class Parts:
    """The parts of a module's forward that were examined, with what they are. outcome: each part as a program, and its
    `recognise`. reason: why the last one that resembles SE is none."""

    outcome: list[tuple[Program, Recognised | str | None]] = field(default_factory=list)
    reason: str | None = None

    def rewrite(self, program: Program, root: nn.Module, given: tuple[Any, ...]) -> tuple[Program, list[Inline]]:
        """`program` with one call for each part that is an SE layer, and these.

        root: a float64 copy of the module that `program` was traced from. given: a map and numbers that it takes; the
        forward is run on them.
        """
        found: list[Inline] = []
        while True:
            rewritten = next(
                filter(None, (self._joined(program, root, given, *part) for part in _parts(program))), None
            )
            if rewritten is None:
                return program, found
            program, inline = rewritten
            found.append(inline)

    def _joined(
        self, program: Program, root: nn.Module, given: tuple[Any, ...], start: int, calls: list[Call]
    ) -> tuple[Program, Inline] | None:
        last = calls[-1]
        part = _as_program(start, calls)
        recognised = self._recognised(part, root)
        if not isinstance(recognised, Recognised):
            self.reason = recognised or self.reason
            return None
        inline = Inline(part, recognised)
        fused = Call(last.number, "fused", inline, (Value(start),))
        rest = [fused if call is last else call for call in program.calls]
        result = program.result
        if last.target in _IN_PLACE:  # what reads u later would read y
            now = {start: Value(last.number)}
            rest = [renumbered(call, now) if call.number > last.number else call for call in rest]
            result = renumbered(result, now)
        joined = _without(changed(program, calls=tuple(rest), result=result), calls[:-1])
        left = {call.number for call in joined.calls} - _constants(program)
        if any(call.number in left for call in calls[:-1]):
            self.reason = _ELSEWHERE
            return None
        if _is_written(program, root, given, start, calls):
            self.reason = "its map is written to before the product"
            return None
        return joined, inline

    def _recognised(self, part: Program, root: nn.Module) -> Recognised | str | None:
        for known, outcome in self.outcome:
            if known == part:
                return outcome
        module = _Part(part, root)
        outcome = None if weight_shapes(module) is None else recognise(module)
        if isinstance(outcome, Recognised):
            outcome = changed(outcome, layer=type(root).__name__)
        self.outcome.append((part, outcome))
        return outcome


def _parts(program: Program) -> Iterator[tuple[int, list[Call]]]:
    """The parts of `program` in which paths meet, the larger first: the number of the input, and the calls."""
    paths = _dominators(program)
    by_number = {call.number: call for call in program.calls}
    for call in reversed(program.calls):
        if call.number in paths and len({v.number for v in call.values() if v.number in paths}) > 1:
            start = paths[call.number][-2]
            for last in (call, *_views_after(program, paths, call)):
                calls = _between(by_number, start, last)
                if calls is not None:
                    yield start, calls


def _views_after(program: Program, paths: dict[int, tuple[int, ...]], call: Call) -> Iterator[Call]:
    """Calls after a product that may undo a view of the map before it, such as one with the channels last."""
    for _ in range(_VIEWS):
        readers = [each for each in program.calls if Value(call.number) in each.values()]
        if len(readers) != 1 or readers[0].kind not in ("function", "method"):
            return
        (call,) = readers
        if paths.get(call.number, (0,))[-2:-1] != (readers[0].values()[0].number,):
            return
        yield call


def _dominators(program: Program) -> dict[int, tuple[int, ...]]:
    """For each value that depends on numbers of x: its dominators, from x to itself."""
    paths: dict[int, tuple[int, ...]] = {0: (0,)}
    constants = _constants(program)
    for call in program.calls:
        given = [paths[value.number] for value in call.values() if value.number in paths]
        if given and call.number not in constants:
            common = [steps[0] for steps in zip(*given, strict=False) if len(set(steps)) == 1]
            paths[call.number] = (*common, call.number)
    return paths


def _constants(program: Program) -> set[int]:
    """The values that depend on no number of a map: parameters, and sizes."""
    sizes: set[int] = set()
    parameters: set[int] = set()
    for call in program.calls:
        if call.kind == "attribute":
            parameters.add(call.number)
        elif call.kind == "method":
            sizes |= {call.number} if call.target in _SIZES else set()
        elif call.kind == "function":
            values = {value.number for value in call.values()}
            of_sizes = values and values <= sizes and call.target.__module__ in _ARITHMETIC
            if of_sizes or (call.target is getattr and call.args[1] in ("shape", "ndim")):
                sizes.add(call.number)
    return sizes | parameters


def _between(by_number: dict[int, Call], start: int, last: Call) -> list[Call] | None:
    """The calls that compute the result of `last` from the value `start`; None if they need another value."""
    needed, found = {last.number}, []
    for number in sorted(by_number, reverse=True):
        if number in needed and number != start:
            call = by_number[number]
            found.append(call)
            needed |= {value.number for value in call.values()}
    return found[::-1] if needed <= {start, *by_number} else None


def _as_program(start: int, calls: list[Call]) -> Program:
    """These calls with the numbers 1, 2, ..., as a program of the value `start`."""
    numbers = {start: Value(0)} | {call.number: Value(i) for i, call in enumerate(calls, 1)}
    own = [changed(renumbered(call, numbers), number=i) for i, call in enumerate(calls, 1)]
    own[-1] = changed(own[-1], target=_IN_PLACE.get(own[-1].target, own[-1].target))
    return Program(tuple(own), Value(len(own)))


def _without(program: Program, calls: list[Call]) -> Program:
    """`program` without those of `calls` whose results nobody reads."""
    for call in reversed(calls):
        if program.uses()[call.number] == 0:
            program = changed(program, calls=tuple(each for each in program.calls if each is not call))
    return program


def _is_written(program: Program, root: nn.Module, given: tuple[Any, ...], start: int, calls: list[Call]) -> bool:
    """Whether the calls that stand between these write to the value `start`, which the part will read later."""
    others = {call.number for call in program.calls if calls[0].number < call.number < calls[-1].number}
    if others <= {call.number for call in calls} | _constants(program):
        return False
    before = [call for call in program.calls if call.number < calls[-1].number]
    copy = Call(calls[-1].number, "function", _copy, (Value(start),))
    first = before.index(calls[0])
    probe = Program((*before[:first], copy, *before[first:]), (Value(start), Value(copy.number)), program.numbers)
    x, *numbers = given
    run = probe.bind(root, lambda inline: inline.program.bind(root, no_fused))
    now, (then, version) = run(x.clone(), *numbers)
    return now._version != version or not torch.equal(now, then)


def _copy(u: Tensor) -> tuple[Tensor, int]:
    return u.clone(), u._version
