"""Whole networks on the CPU, eager and under torch.compile: as they were, replaced, and replaced in place.

    python -m benchmarks.models [--out benchmarks/results/models.csv]

A line of the CSV has milliseconds per call, and the ratio of the time of the original in the same mode to its own, the
median over the rounds. All six variants of a network and batch take part in one contest. Under torch.compile a replaced
layer shows the compiler the original's code, so every ratio there should be 1.
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
from .layer_cpu_report import markdown, ratio_text
from .networks import Line

RECORD = layer_cpu.RECORD.with_name("models.csv")
NETWORKS = ("timm:efficientnet_b0", "timm:mobilenetv3_large_100", "timm:seresnet50", "timm:regnety_016")
BATCHES = (1, 16)
MODES = ("eager", "compiled")
VARIANTS = ("original", "replaced", "in place")


def call(model: nn.Module, x: Tensor, mode: str, variant: str) -> Callable[[], Tensor]:
    own = networks.build_variant(model, variant)
    return partial(torch.compile(own, dynamic=False) if mode == "compiled" else own, x)


def contest(network: str, n: int, seconds: float) -> Iterator[Line]:
    model, x = networks.build(network, n)
    layers = str(len(se_fused.replace(model, dry_run=True).replaced))
    pairs = list(product(MODES, VARIANTS))
    calls = {f"{mode} {variant}": call(model, x, mode, variant) for mode, variant in pairs}
    found = networks.measure(model, x, calls, seconds)
    for mode, variant in pairs:
        kind = {"se_layers": layers, "mode": mode, "variant": variant}
        yield kind | networks.columns(found, f"{mode} {variant}", f"{mode} original")


def main(
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of each network and batch.")] = 45,
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    networks.record(out, threads, NETWORKS, BATCHES, partial(contest, seconds=seconds))


def table(lines: Iterable[Line]) -> str:
    """The CSV as a table of the ratios original / variant."""
    lines = list(lines)
    cells = {(line["network"], line["n"], line["mode"], line["variant"]): line for line in lines}
    rows = []
    for network, n in dict.fromkeys((line["network"], line["n"]) for line in lines):
        layers = cells[network, n, "eager", "original"]["se_layers"]
        row = [f"{network.split(':')[1]} ({layers} SE layers)", n]
        for mode in MODES:
            row.append(networks.milliseconds(cells[network, n, mode, "original"]))
            row += [ratio_text(float(cells[network, n, mode, name]["original_by_this"])) for name in VARIANTS[1:]]
        rows.append(row)
    header = ["network", "N"]
    for mode in MODES:
        header.append(f"{mode}: original ms (p20 to p80)")
        header += [f"{mode}: original / {name}" for name in VARIANTS[1:]]
    return f"{markdown(header, rows)}\n{networks.machine(lines)}"


if __name__ == "__main__":
    typer.run(main)
