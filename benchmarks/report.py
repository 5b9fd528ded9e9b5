"""Turns the CSVs of record into the README's tables, each between its two markers, and into the figures.

python -m benchmarks.report            rewrite the tables and figures
python -m benchmarks.report --check    fail if a table in the README is not the one its CSV gives
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from . import layer_cpu, layer_cpu_report

Line = dict[str, str]


class ReportError(ValueError):
    """The CSV or the README is not what a report can be made from."""


@dataclass(frozen=True)
class Record:
    """A CSV, the function that makes its Markdown, and where the function that draws its figure puts it."""

    csv: Path
    table: Callable[[list[Line]], str]
    figure: Path
    draw: Callable[[list[Line], Path], None]


# By the name in the markers.
RECORDS = {
    "layer_cpu": Record(
        layer_cpu.RECORD, layer_cpu_report.table, layer_cpu.ROOT / "docs" / "layer_cpu.png", layer_cpu_report.draw
    )
}


def read(file: Path) -> list[Line]:
    """The lines of a CSV of record. Raises ReportError if it is absent, empty, or of more than one run."""
    if not file.exists():
        raise ReportError(f"{file} does not exist; run the benchmark that writes it")
    with file.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    if not lines:
        raise ReportError(f"{file} has no rows")
    if len({(line["date"], line["commit"], line["cpu"]) for line in lines}) > 1:
        raise ReportError(f"{file} mixes rows of several runs")
    return lines


def replace_between_markers(text: str, name: str, body: str) -> str:
    """`text` with `body` between `<!-- name:begin -->` and `<!-- name:end -->`. Raises ReportError."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ReportError(f"wanted the markers {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{body.strip()}\n\n{end}{rest.split(end)[1]}"


def updated(readme: str, records: Mapping[str, Record]) -> str:
    """`readme` with every record's Markdown made anew. Raises ReportError."""
    for name, record in records.items():
        readme = replace_between_markers(readme, name, record.table(read(record.csv)))
    return readme


def main(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if the README is out of date.")] = False,
    readme: Annotated[Path, typer.Option(help="The file with the markers.")] = layer_cpu.ROOT / "README.md",
) -> None:
    """Write the README's tables and the figures from the CSVs of record."""
    before = readme.read_text(encoding="utf-8")
    try:
        after = updated(before, RECORDS)
    except ReportError as error:
        typer.echo(f"report: {error}", err=True)
        raise typer.Exit(2) from error
    if not check:
        readme.write_text(after, encoding="utf-8")
        for record in RECORDS.values():
            record.draw(read(record.csv), record.figure)
    elif after != before:
        typer.echo(f"report: {readme} is not what the CSVs give; run python -m benchmarks.report", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
