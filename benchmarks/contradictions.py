"""What the lines of one record say against each other. A record with a contradiction is not published.

A difference counts if the ranges from the 20th to the 80th percentile do not meet.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .text import spread_of

Line = Mapping[str, str]
# Two values that have the same meaning may differ by the rounding of the CSV.
SLACK = 1.01
# Bytes of a map. In a loop over a smaller one, which stays in the caches, in place was slower than out of place (30
# against 26 us at 1x960x7x7, channels_last). Probably a core then writes over what another one reads in the next call.
IN_CACHE = 2**20


class Contradiction(ValueError):
    """Lines of a record cannot all be true."""


def refuse(lines: Sequence[Line]) -> None:
    """Raises Contradiction, which names the lines."""
    found = [*_of_ratios(lines), *_of_layers(lines), *_of_networks(lines)]
    if found:
        raise Contradiction("; ".join(found))


def _is_slower(a: Line, b: Line, unit: str) -> bool:
    """Whether `a` took longer than `b`, beyond their spread."""
    column = f"{{}}_{unit}"
    return spread_of(a, column).p20 > SLACK * spread_of(b, column).p80


def _unit(line: Line) -> str:
    return "us" if "p50_us" in line else "ms"


def _of_ratios(lines: Iterable[Line]) -> Iterator[str]:
    """A ratio taken round by round lies between those of the slowest and the fastest rounds."""
    contests: dict[tuple[str, ...], dict[str, Line]] = {}
    for line in lines:
        keys = ("network", "n", "shape", "dtype", "layout", "direction")
        contests.setdefault(tuple(line.get(key, "") for key in keys), {})[line["variant"]] = line
    for contest, cell in contests.items():
        for name, line in cell.items():
            for column, (top, bottom) in _ratios(line, cell).items():
                a, b = (spread_of(each, f"{{}}_{_unit(line)}") for each in (top, bottom))
                if not a.p20 / b.p80 / SLACK <= float(line[column]) <= a.p80 / b.p20 * SLACK:
                    yield f"{' '.join(filter(None, contest))} {name}: {column} {line[column]} is not that of the times"


def _ratios(line: Line, cell: Mapping[str, Line]) -> dict[str, tuple[Line, Line]]:
    """The columns with medians of ratios: whose times are divided, and by whose."""
    if "ratio_p50" in line:
        return {"ratio_p50": (cell["original"], line)}
    columns = [column for column in line if column.startswith("ratio_to_") and column.endswith("_p50") and line[column]]
    return {column: (line, cell[column.removeprefix("ratio_to_").removesuffix("_p50")]) for column in columns}


def _of_layers(lines: Iterable[Line]) -> Iterator[str]:
    """A part takes no longer than the whole, and writing over x no longer than writing elsewhere."""
    cells: dict[tuple[str, ...], Line] = {}
    for line in lines:
        if "shape" in line:
            cells[line["shape"], line["dtype"], line["layout"], line["direction"], line["variant"]] = line
    for (*call, direction, variant), line in cells.items():

        def exceeds(direction: str, variant: str, line: Line = line, call: Sequence[str] = call) -> bool:
            other = cells.get((*call, direction, variant))
            return other is not None and _is_slower(line, other, "us")

        where = " ".join((*call, direction, variant))
        if direction != "forward_backward" and variant != "copy" and exceeds("forward_backward", variant):
            yield f"{where}: took longer than forward and backward"
        is_large = int(line["bytes"]) >= 2 * IN_CACHE  # one read and one write
        if variant in ("fused_inplace", "fused_out") and is_large and exceeds(direction, "fused"):
            yield f"{where}: took longer than into new memory"
        if variant == "copy" and direction == "forward" and exceeds(direction, "fused"):
            yield f"{where}: took longer than the layer, which also reads and writes the map"


def _of_networks(lines: Iterable[Line]) -> Iterator[str]:
    """A larger batch takes no less time."""
    batches: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if "network" in line:
            batches.setdefault((line["network"], line["variant"]), []).append(line)
    for (network, variant), found in batches.items():
        for small, large in itertools.pairwise(sorted(found, key=lambda line: int(line["n"]))):
            if _is_slower(small, large, "ms"):
                yield f"{network} {variant}: N = {small['n']} took longer than N = {large['n']}"
