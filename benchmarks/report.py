"""Turns the files of record into the tables of docs/benchmarks.md and docs/coverage.md and the README's headline, each
between two markers, and into figures.

python -m benchmarks.report            rewrite the tables and figures
python -m benchmarks.report --check    fail if a table is not the one its files give
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from . import (
    ROOT,
    call_overhead,
    census,
    compiled,
    convolutions,
    coverage,
    coverage_report,
    figures,
    gpu_report,
    headline,
    layer_cpu,
    layer_cpu_report,
    models,
    predicted,
    training,
)

Line = dict[str, str]
DOCS = ROOT / "docs"
README, BENCHMARKS, COVERAGE = ROOT / "README.md", DOCS / "benchmarks.md", DOCS / "coverage.md"
RESULTS = layer_cpu.RECORD.parent


class ReportError(ValueError):
    """No report can be made from these files or this document."""


@dataclass(frozen=True)
class Record:
    """The file or folder a table comes from, how it is read and made, its document, and what draws its figures."""

    source: Path
    read: Callable[[Path], Any]
    table: Callable[[Any], str]
    document: Path = BENCHMARKS
    figures: Mapping[Path, Callable[[Any, Path], None]] = field(default_factory=dict)


def read(file: Path) -> list[Line]:
    """The lines of a CSV of record. Raises ReportError if it is absent, empty, or of more than one run."""
    if not file.exists():
        raise ReportError(f"{file} does not exist; run the benchmark that writes it")
    with file.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    if not lines:
        raise ReportError(f"{file} has no rows")
    if len({(line["date"], line["commit"], line.get("cpu")) for line in lines}) > 1:
        raise ReportError(f"{file} mixes rows of several runs")
    return lines


def read_headline(folder: Path) -> dict[str, str]:
    """The README's numbers by name."""
    records = (layer_cpu.RECORD, models.RECORD, compiled.RECORD, training.RECORD, coverage.RECORD)
    return headline.numbers(*(read(folder / file.name) for file in records), gpu_report.read(folder / "h200"))


# By the name in the markers; the name of a GPU is that of its folder.
RECORDS = {
    "headline": Record(RESULTS, read_headline, headline.text, README),
    "layer_cpu": Record(
        layer_cpu.RECORD, read, layer_cpu_report.table,
        figures={DOCS / "layers.svg": figures.bars, DOCS / "layer_cpu.png": figures.by_shape},
    ),
    "models": Record(models.RECORD, read, models.table, figures={DOCS / "networks.svg": figures.networks}),
    "networks": Record(models.RECORD, read, models.short_table, README),
    "training": Record(training.RECORD, read, training.table),
    "compiled": Record(compiled.RECORD, read, compiled.table),
    "convolutions": Record(convolutions.RECORD, read, convolutions.table),
    "coverage": Record(coverage.RECORD, read, coverage_report.table, COVERAGE),
    "census": Record(census.RECORD, read, census.table),
    "call_overhead": Record(call_overhead.RECORD, read, call_overhead.table),
    "predicted": Record(RESULTS / "h200", lambda folder: folder, predicted.table),
    "h200_plans": Record(RESULTS / "h200", lambda folder: folder, predicted.against),
}  # fmt: skip
for _run in sorted(RESULTS.glob("*/run.json")):
    RECORDS[_run.parent.name] = Record(_run.parent, gpu_report.read, gpu_report.summary)
    RECORDS[f"{_run.parent.name}_layers"] = Record(_run.parent, gpu_report.read, gpu_report.layers)


def replace_between_markers(text: str, name: str, body: str) -> str:
    """`text` with `body` between `<!-- name:begin -->` and `<!-- name:end -->`. Raises ReportError."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ReportError(f"wanted the markers {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{body.strip()}\n\n{end}{rest.split(end)[1]}"


def updated(text: str, records: Mapping[str, Record]) -> str:
    """`text` with the tables of `records` made anew. Raises ReportError."""
    for name, record in records.items():
        try:
            text = replace_between_markers(text, name, record.table(record.read(record.source)))
        except (OSError, KeyError, ValueError) as error:
            raise ReportError(f"{record.source}: {error}") from error
    return text


def main(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if a table is out of date.")] = False,
) -> None:
    """Write the tables and the figures from the files of record."""
    for document in dict.fromkeys(record.document for record in RECORDS.values()):
        before = document.read_text(encoding="utf-8")
        try:
            after = updated(before, {name: r for name, r in RECORDS.items() if r.document == document})
        except ReportError as error:
            typer.echo(f"report: {error}", err=True)
            raise typer.Exit(2) from error
        if not check:
            document.write_text(after, encoding="utf-8")
        elif after != before:
            typer.echo(f"report: {document} is not what its files give; run python -m benchmarks.report", err=True)
            raise typer.Exit(1)
    for record in RECORDS.values() if not check else ():
        for figure, draw in record.figures.items():
            draw(record.read(record.source), figure)


if __name__ == "__main__":
    typer.run(main)
