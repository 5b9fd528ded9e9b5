"""Whole networks on the CPU, eager and under torch.compile: as they were, replaced, and replaced in place.

    python -m benchmarks.models [--out benchmarks/results/models.csv]

A line of the CSV has milliseconds per call, and the time of the original of its mode over its own, round by round. All
six contenders of a network and batch take part in one contest. Under torch.compile a replaced layer shows the compiler
the original's code, so that there no ratio should differ from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import se_fused

from . import layer_cpu, networks
from .layer_cpu_report import markdown, times
from .networks import Line

RECORD = layer_cpu.RECORD.with_name("models.csv")
NETWORKS = ("timm:efficientnet_b0", "timm:mobilenetv3_large_100", "timm:seresnet50", "timm:regnety_016")
BATCHES = (1, 16)
MODES = ("eager", "compiled")
CONTENDERS = ("original", "replaced", "in place")


def call(model: nn.Module, x: Tensor, mode: str, contender: str) -> Callable[[], Tensor]:
    own = networks.variant(model, contender)
    return partial(torch.compile(own, dynamic=False) if mode == "compiled" else own, x)


def contest(network: str, n: int, seconds: float) -> Iterator[Line]:
    model, x = networks.build(network, n)
    layers = str(len(se_fused.replace(model, dry_run=True).replaced))
    pairs = list(product(MODES, CONTENDERS))
    calls = {f"{mode} {contender}": call(model, x, mode, contender) for mode, contender in pairs}
    found = networks.measure(model, x, calls, seconds)
    for mode, contender in pairs:
        kind = {"se_layers": layers, "mode": mode, "contender": contender}
        yield kind | networks.columns(found, f"{mode} {contender}", f"{mode} original")


def main(
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    seconds: Annotated[float, typer.Option(help="For the rounds of each network and batch.")] = 45,
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    networks.record(out, threads, NETWORKS, BATCHES, partial(contest, seconds=seconds))


def table(lines: Iterable[Line]) -> str:
    """The CSV as a table of original / contender."""
    lines = list(lines)
    cells = {(line["network"], line["n"], line["mode"], line["contender"]): line for line in lines}
    rows = []
    for network, n in dict.fromkeys((line["network"], line["n"]) for line in lines):
        layers = cells[network, n, "eager", "original"]["se_layers"]
        row = [f"{network.split(':')[1]} ({layers} SE layers)", n]
        for mode in MODES:
            row.append(networks.milliseconds(cells[network, n, mode, "original"]))
            row += [times(float(cells[network, n, mode, name]["original_by_this"])) for name in CONTENDERS[1:]]
        rows.append(row)
    header = ["network", "N"]
    for mode in MODES:
        header.append(f"{mode}: original ms (p20 to p80)")
        header += [f"{mode}: original / {name}" for name in CONTENDERS[1:]]
    return f"{markdown(header, rows)}\n{networks.machine(lines)}"


if __name__ == "__main__":
    typer.run(main)
