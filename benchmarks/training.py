"""A training step of whole networks on the CPU: as they were, replaced, and without their SE layers.

    python -m benchmarks.training [--out benchmarks/results/training.csv]

A step is forward, cross entropy, backward and SGD with momentum, on a batch of random images of 224 pixels and random
labels, in float32. A line of the CSV has milliseconds per step, and the ratio of the time of the original to its own,
the median over the rounds. `replace` offers nothing more in training: in place and block are for inference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from se_fused import timing

from . import layer_cpu, networks
from .networks import Line

RECORD = layer_cpu.RECORD.with_name("training.csv")
NETWORKS = ("timm:mobilenetv3_large_100", "timm:efficientnet_b0", "timm:seresnet50", "torchvision:efficientnet_b0")
BATCHES = (8,)
VARIANTS = ("original", "replaced", "without SE")


def gradients(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradients of one step. The random numbers of dropout and of stochastic depth are the same in each call."""
    torch.manual_seed(0)
    loss = F.cross_entropy(model(x), labels)
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=False))


def check(model: nn.Module, original: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Raises AssertionError if a gradient of two samples is not that of `original`, in float64.

    In float32 the rounding of a network in training piles up, and hides what a wrong layer would change.
    """
    # Copies, because a step in training changes the statistics of batch norms.
    got, wanted = (gradients(copy.deepcopy(m).double(), x[:2].double(), labels[:2]) for m in (model, original))
    largest = max(float(g.abs().max()) for g in wanted)
    for (name, _), a, b in zip(original.named_parameters(), got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8 * largest, msg=name)


def step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return run


def contest(network: str, n: int, seconds: float) -> Iterator[Line]:
    model, x = networks.build(network, n)
    model.train()
    labels = torch.randint(1000, (n,))
    models = {variant: networks.build_variant(model, variant) for variant in VARIANTS}
    check(models["replaced"], model, x, labels)
    steps = [timing.Variant(name, step(m, x, labels)) for name, m in models.items()]
    return networks.lines_of(model, timing.measure(steps, seconds))


def main(
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of each network.")] = 45,
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    networks.record(out, threads, NETWORKS, BATCHES, partial(contest, seconds=seconds))


def table(lines: Iterable[Line]) -> str:
    return networks.table(lines, VARIANTS[1:])


if __name__ == "__main__":
    typer.run(main)
