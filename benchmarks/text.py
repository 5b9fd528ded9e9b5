"""The parts of the documents' tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from se_fused import timing
from se_fused.timing import Spread


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)) + "\n"


def ratio_text(value: float | None) -> str:
    """A ratio as text: a loss, which is below 1, is bold."""
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def spread_of(line: Mapping[str, str], column: str) -> Spread:
    """The percentiles in the columns that `column`, such as "{}_us", names."""
    return Spread(*(float(line[column.format(p)]) for p in Spread._fields))


def gain(found: Spread, rounds: int) -> str:
    """A speed relative to another: bold where it is below 1 in 80 % of the rounds."""
    text = timing.text(found, rounds)
    return f"**{text}**" if found.p80 < 1 else text
