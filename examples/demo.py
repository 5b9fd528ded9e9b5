"""The demonstration: `make demo`, or `python -m examples.demo`. Its data and networks come with packages.

Part "digits" trains two small networks with the reference and the fused SE layer, and draws what the trained gates do.
Part "photographs" replaces the SE layers of three known networks, and compares outputs and times.
"""

from __future__ import annotations

import logging
import os
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

# Before torch loads OpenMP. On two cores with other work the demo took 97 s, and 326 s if waiting threads spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import matplotlib
import torch
import typer
from rich.console import Console

from se_fused import backends


class Part(str, Enum):
    digits = "digits"
    photographs = "photographs"


def digits(output: Path, epochs: int, console: Console) -> None:
    from examples import demo_digits

    console.print(
        "\n1. Digits. Two small networks learn handwritten digits, with SE in plain PyTorch (reference) and with the "
        "fused layer. Both should learn the same: as nearly as the reference does from weights one rounding step away "
        "(control)."
    )
    runs = demo_digits.train(epochs, console)
    console.print(demo_digits.table(runs))
    losses, gates = output / "digits_losses.png", output / "digits_gates.png"
    demo_digits.plot_losses(runs, losses)
    console.print(f"wrote {losses}: the losses with both layers")
    demo_digits.plot_gates(next(run for run in runs if run.layer == "fused"), gates)
    console.print(f"wrote {gates}: which channels each digit opens and closes, after training")


def photographs(repeats: int, console: Console) -> None:
    from examples import demo_photographs

    console.print(
        "\n2. Photographs. se_fused.replace puts the fused layer into known networks. Nothing is downloaded, so the "
        "weights are random: what counts is that the outputs agree, and how long they take."
    )
    console.print(demo_photographs.table(demo_photographs.swaps(repeats, console)))


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
    if not part or Part.digits in part:
        digits(output, epochs, console)
    if not part or Part.photographs in part:
        photographs(repeats, console)
    console.print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
