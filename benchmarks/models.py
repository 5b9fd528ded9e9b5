"""Whole networks on the CPU, eager: as they were, replaced at each level, and without their SE layers. Beside them, the
original in inference engines of other projects.

    python -m benchmarks.models [--out benchmarks/results/models.csv]

A line of the CSV has milliseconds per call, and the ratio of the time of the original to its own, the median over the
rounds. All variants of a network and batch take part in one contest. The network without SE layers computes something
else: it shows what the layers cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from . import engines, layer_cpu, networks
from .contradictions import refuse
from .networks import Line
from .text import markdown

RECORD = layer_cpu.RECORD.with_name("models.csv")
NETWORKS = (
    "timm:mobilenetv3_large_100",
    "timm:efficientnet_b0",
    "timm:tf_efficientnetv2_s",
    "timm:seresnet50",
    "timm:regnety_040",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
    "efficientnet_pytorch:efficientnet-b0",
    "monai:efficientnet-b0",
)
BATCHES = (1, 16)
EAGER = ("original", "replaced", "in place", "block", "without SE")
VARIANTS = (*EAGER, *engines.ENGINES)


def engine(name: str, model: nn.Module, x: Tensor, threads: int) -> Callable[[], Tensor]:
    with torch.inference_mode():
        y = torch.full_like(model(x), math.nan)
    fill = engines.ENGINES[name](engines.export(model, x), x, y, threads)

    def call() -> Tensor:
        fill()
        return y

    return call


def contest(network: str, n: int, seconds: float) -> Iterator[Line]:
    model, x = networks.build(network, n)
    calls: dict[str, Callable[[], Tensor]] = {name: partial(networks.build_variant(model, name), x) for name in EAGER}
    calls |= {name: engine(name, model, x, torch.get_num_threads()) for name in engines.ENGINES}
    return networks.lines_of(model, networks.measure(model, x, calls, seconds))


def main(
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of each network and batch.")] = 30,
    threads: Annotated[int, typer.Option()] = 2,
    network: Annotated[list[str], typer.Option(help="Only these networks.")] = [*NETWORKS],  # noqa: B006
) -> None:
    networks.record(out, threads, network, BATCHES, partial(contest, seconds=seconds))


def table(lines: Iterable[Line]) -> str:
    return networks.table(lines, VARIANTS[1:])


def short_table(lines: Iterable[Line]) -> str:
    """One row per network: milliseconds of the original, and how many times as fast the others are, per batch."""
    lines = list(lines)
    refuse(lines)
    cells = {(line["network"], line["n"], line["variant"]): line for line in lines}
    batches = list(dict.fromkeys(line["n"] for line in lines))
    rows = []
    for network in dict.fromkeys(line["network"] for line in lines):
        row = [network]
        for n in batches:
            original = networks.milliseconds(cells[network, n, "original"]).partition(" ")[0]
            row += [original, *(networks.ratio(cells[network, n, name]) for name in ("replaced", "block"))]
        rows.append(row)
    header = [f"N = {n}: {text}" for n in batches for text in ("eager ms", "`replace`", '`level="block"`')]
    return f"{markdown(['network', *header], rows)}\n{networks.machine(lines)}"


if __name__ == "__main__":
    typer.run(main)
