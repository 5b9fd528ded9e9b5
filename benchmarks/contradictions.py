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
# Bytes of a map. A smaller one stays in the caches of the cores, and there it can cost more to write over what another
# core reads in the next call than to write elsewhere.
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
        keys = ("network", "n", "mode", "shape", "dtype", "layout", "direction")
        contests.setdefault(tuple(line.get(key, "") for key in keys), {})[line["variant"]] = line
    for contest, (name, line) in ((c, pair) for c, cell in contests.items() for pair in cell.items()):
        for column in (c for c in line if c.startswith("ratio_") and c.endswith("p50") and line[c]):
            base = column.removeprefix("ratio_").removeprefix("to_").removesuffix("p50").rstrip("_") or "original"
            other, unit = contests[contest][base], f"{{}}_{_unit(line)}"
            top, bottom = (line, other) if column.startswith("ratio_to_") else (other, line)
            low = spread_of(top, unit).p20 / spread_of(bottom, unit).p80
            high = spread_of(top, unit).p80 / spread_of(bottom, unit).p20
            if not low / SLACK <= float(line[column]) <= high * SLACK:
                yield f"{' '.join(filter(None, contest))} {name}: {column} {line[column]} is not that of the times"


def _of_layers(lines: Iterable[Line]) -> Iterator[str]:
    """A part takes no longer than the whole, and writing over x no longer than writing elsewhere."""
    cells: dict[tuple[str, ...], Line] = {}
    for line in lines:
        if "shape" in line:
            cells[line["shape"], line["dtype"], line["layout"], line["direction"], line["variant"]] = line
    for (*call, direction, variant), line in cells.items():
        where = " ".join((*call, direction, variant))
        whole = cells.get((*call, "forward_backward", variant))
        if (
            direction != "forward_backward"
            and variant != "copy"
            and whole is not None
            and _is_slower(line, whole, "us")
        ):
            yield f"{where}: took longer than forward and backward"
        apart = cells.get((*call, direction, "fused"))
        is_large = int(line["bytes"]) >= 2 * IN_CACHE  # one read and one write
        if (
            variant in ("fused_inplace", "fused_out")
            and is_large
            and apart is not None
            and _is_slower(line, apart, "us")
        ):
            yield f"{where}: took longer than into new memory"
        if variant == "copy" and apart is not None and direction == "forward" and _is_slower(line, apart, "us"):
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
