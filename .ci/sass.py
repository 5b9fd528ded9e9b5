"""The cost of the vector loops of kernels, read from the text of `nvdisasm -c`, whatever the sources call them.

A vector loop is an innermost loop with 16-byte accesses. Out-of-line code is not part of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

KINDS = ("LDG", "LDGSTS", "LDS", "STG")
COLUMNS = (
    "instructions",
    "shortest turn",
    "per 512 bytes",
    *(f"{kind}128" for kind in KINDS),
    "loads in flight",
    "narrow",
)
_LINE = re.compile(r"^(?:(\.L_x_\d+):|\s+/\*[0-9a-f]{4,}\*/\s+(@\S+ )?\s*([\w.]+)([^;]*);)", re.MULTILINE)
# Accesses that are narrower than any vector, or generic (of any memory). Both are slower than an LDS.
_NARROW = re.compile(r"(LDS|STS)\S*\.[US](8|16)\b|(LD|ST)\.")


@dataclass(frozen=True)
class Instruction:
    name: str  # such as LDG.E.128.CONSTANT
    operands: str
    next: tuple[int, ...]  # indices of the instructions that may follow; a call returns

    @property
    def kind(self) -> str | None:
        """Which of KINDS it is, if it is a 16-byte access."""
        kind, *rest = self.name.split(".")
        return kind if kind in KINDS and "128" in rest else None

    def registers(self) -> tuple[set[int], set[int]]:
        """The registers that it reads and writes; of consecutive registers only the first."""
        found = re.match(r"\s*R(\d+)\b", self.operands)
        writes = found and not self.name.startswith(("ST", "BRX", "RET", "WARPSYNC"))
        rest = self.operands[found.end() :] if found and writes else self.operands
        return {int(n) for n in re.findall(r"\bR(\d+)", rest)}, {int(found[1])} if found and writes else set()


@dataclass(frozen=True)
class Loop:
    body: Sequence[Instruction]  # everything from its first instruction to its branch back
    turn: Sequence[
        Instruction
    ]  # the shortest iteration that loads and stores; a run-time choice counts at its cheapest

    @cached_property
    def accesses(self) -> Counter[str]:
        """The 16-byte accesses of a turn, by KINDS."""
        return Counter(one.kind for one in self.turn if one.kind)

    @property
    def per_512_bytes(self) -> float:
        """Instructions of a turn per vector of a warp: per stored vector, or else per load of the commonest kind."""
        return len(self.turn) / (self.accesses["STG"] or max(self.accesses.values()))

    @property
    def in_flight(self) -> int:
        """16-byte loads before the first instruction that waits for one of them."""
        loads, pending = 0, set[int]()
        for one in self.turn:
            reads, writes = one.registers()
            if reads & pending:
                break
            if one.kind and one.kind.startswith("LD"):
                loads += 1
                pending |= {first + i for first in writes for i in range(4)}
        return loads

    @property
    def narrow(self) -> list[str]:
        """The narrow accesses to shared memory and the generic accesses in its body."""
        return sorted({one.name for one in self.body if _NARROW.match(one.name)})

    def has(self, kind: str) -> bool:
        return any(one.kind == kind for one in self.body)

    def row(self) -> tuple[str, ...]:
        """The values of COLUMNS."""
        accesses = [self.accesses[kind] for kind in KINDS]
        numbers = [len(self.body), len(self.turn), f"{self.per_512_bytes:.1f}", *accesses, self.in_flight]
        return (*map(str, numbers), " ".join(self.narrow))


def read(text: str) -> dict[str, list[Instruction]]:
    """The code of each function, by name."""
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)[1:]
    return {name: _code(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def _code(text: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str, str]] = []
    for label, *line in _LINE.findall(text):
        if label:
            labels[label] = len(lines)
        else:
            lines.append((line[0], line[1], line[2]))
    return [
        Instruction(name, operands, _next(at, guard, name, operands, labels))
        for at, (guard, name, operands) in enumerate(lines)
    ]


def _next(at: int, guard: str, name: str, operands: str, labels: dict[str, int]) -> tuple[int, ...]:
    branches = name.startswith("BR")
    # The condition of a branch may also be an operand before its label.
    conditional = guard or (branches and "," in operands.partition("`")[0].partition("(*")[0])
    targets = [labels[label] for label in re.findall(r"\.L_x_\d+", operands)] if branches else []
    goes_on = conditional or not name.startswith(("BRA", "BRX", "EXIT", "RET"))
    return (*([at + 1] if goes_on else []), *targets)


def _path(code: Sequence[Instruction], start: int, end: int) -> list[int]:
    """The shortest forward path from start to end; empty if there is none."""
    before = {start: start}
    reached = [start]
    for at in reached:
        for to in code[at].next:
            if at < to <= end and to not in before:
                before[to] = at
                reached.append(to)
    if end not in before:
        return []
    path = [end]
    while path[-1] != start:
        path.append(before[path[-1]])
    return path[::-1]


def _turn(code: Sequence[Instruction], first: int, last: int) -> list[int]:
    """The shortest iteration that reaches the last 16-byte store, or any 16-byte load if there is no store."""
    wide = [at for at in range(first, last + 1) if code[at].kind]
    stores = [at for at in wide if code[at].kind == "STG"]
    halves = [(_path(code, first, at), _path(code, at, last)) for at in stores[-1:] or wide]
    return min((there + back[1:] for there, back in halves if there and back), key=len, default=[])


def vector_loops(code: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops with 16-byte accesses, in the order of their addresses."""
    backward = {(to, at) for at, one in enumerate(code) for to in one.next if to < at}
    loops: dict[int, int] = {}  # the end of each loop, by its begin
    for first, last in sorted(backward, key=lambda span: (span[1] - span[0], span)):
        around = any(first < head and end <= last for head, end in loops.items())
        # Out-of-line code also branches backward, to the code that jumped to it.
        if not around and _path(code, first, last):
            loops[first] = last
    turns = {(first, last): _turn(code, first, last) for first, last in sorted(loops.items())}
    return [Loop(code[first : last + 1], [code[at] for at in turn]) for (first, last), turn in turns.items() if turn]


def pieces(code: Sequence[Instruction], loops: Sequence[Loop]) -> list[str]:
    """The places where code whose maps are in shared memory reads them by something other than LDS.128."""
    found = []
    for number, loop in enumerate(loops):
        if loop.has("STG"):
            found += [] if loop.has("LDS") else [f"no LDS.128 in loop {number}"]
            found += [f"{', '.join(loop.narrow)} in loop {number}"] if loop.narrow else []
    # No element is one byte. A loop that reads only bytes has no 16-byte access, so it is not among `loops`.
    names = sorted({one.name for one in code if re.match(r"LDS?\.(\S+\.)?[US]8\b", one.name)})
    return found + ([f"bytes by {', '.join(names)}"] if names else [])
