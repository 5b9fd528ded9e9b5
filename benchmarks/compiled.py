"""Whole networks under torch.compile on the CPU: as they were, replaced, and with each way to compile a call.

    python -m benchmarks.compiled [--out benchmarks/results/compiled.csv]

A line of the CSV has milliseconds per call, and the ratio of the original's time to the variant's: the median over the
rounds.

`replaced` and `block` are the network after se_fused.replace at each level, which shows a compiler the original layers.
In `formula` and `operator`, each SE layer is a call of se_fused.squeeze_excite: compiled as plain PyTorch, or as one
operator that Inductor cannot look into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import se_fused
from se_fused import ops
from se_fused.recognised import Recognised

from . import layer_cpu, networks
from .networks import Line

RECORD = layer_cpu.RECORD.with_name("compiled.csv")
NETWORKS = ("timm:efficientnet_b0", "timm:mobilenetv3_large_100")
BATCHES = (1, 8)
VARIANTS = ("original", "replaced", "block", "formula", "operator")


class Call(nn.Module):
    """An SE layer as one call of the operation."""

    def __init__(self, layer: nn.Module, recognised: Recognised) -> None:
        super().__init__()
        self.layer, self.recognised, self.options = layer, recognised, recognised.options()

    def forward(self, x: Tensor) -> Tensor:
        return ops.call(x, *self.recognised.weights(self.layer), None, self.options)


def build_variant(model: nn.Module, name: str) -> nn.Module:
    if name in ("original", "replaced", "block"):
        return networks.build_variant(model, name)
    model = networks.build_variant(model, "original")
    for layer, recognised in se_fused.replace(model, dry_run=True).replaced.items():
        model.set_submodule(layer, Call(model.get_submodule(layer), recognised))
    return model


def compiled(model: nn.Module, variant: str, x: Tensor) -> Callable[[], Tensor]:
    call = torch.compile(build_variant(model, variant), dynamic=False)
    if variant != "operator":
        return lambda: call(x)

    def forced() -> Tensor:
        with se_fused.use_backend("cpu"):
            return call(x)

    return forced


def contest(network: str, n: int, seconds: float) -> Iterator[Line]:
    model, x = networks.build(network, n)
    calls = {variant: compiled(model, variant, x) for variant in VARIANTS}
    return networks.lines_of(model, networks.measure(model, x, calls, seconds))


def main(
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of each network and batch.")] = 30,
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    networks.record(out, threads, NETWORKS, BATCHES, partial(contest, seconds=seconds))


def table(lines: Iterable[Line]) -> str:
    return networks.table(lines, VARIANTS[1:])


if __name__ == "__main__":
    typer.run(main)
