"""The demonstration: `python -m se_fused demo`, or `python -m examples.demo`. Packages hold its data and networks.

Part "digits" trains two small networks with the reference and the fused SE layer; part "photographs" replaces the SE
layers of three known networks.
"""

from __future__ import annotations

import logging
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from rich.console import Console

from se_fused import backends


class Part(str, Enum):
    digits = "digits"
    photographs = "photographs"


def digits(output: Path, epochs: int, console: Console) -> list[Path]:
    from examples import demo_digits

    runs = demo_digits.train(epochs, console)
    console.print(demo_digits.table(runs))
    paths = [output / "digits_losses.png", output / "digits_gates.png"]
    demo_digits.plot_losses(runs, paths[0])
    demo_digits.plot_gates(next(run for run in runs if run.layer == "fused"), paths[1])
    return paths


def photographs(output: Path, repeats: int, console: Console) -> list[Path]:
    from examples import demo_photographs

    found = demo_photographs.swaps(repeats, console)
    console.print(demo_photographs.table(found))
    console.print("Nothing is downloaded, so the weights are random: what counts is that the outputs agree.")
    path = output / "photograph_gates.png"
    demo_photographs.plot_gates(found[0], path)
    return [path]


def main(
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo_output"),
    part: Annotated[list[Part] | None, typer.Option(help="Only this part; may be repeated.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the digits.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each network on the photographs.")] = 7,
) -> None:
    """Train on handwritten digits and swap the SE layers of known networks; prints tables and writes pictures."""
    start = time.perf_counter()
    matplotlib.use("Agg")
    logging.basicConfig(format="%(message)s")
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    backend = backends.select(torch.device("cpu")).name
    console.print(f"The fused layer runs on the {backend} backend.")
    paths: list[Path] = []
    if not part or Part.digits in part:
        paths += digits(output, epochs, console)
    if not part or Part.photographs in part:
        paths += photographs(output, repeats, console)
    for path in paths:
        console.print(f"wrote {path}")
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
