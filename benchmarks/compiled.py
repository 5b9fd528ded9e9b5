"""Whole networks under torch.compile on the CPU: as they were, replaced, and with each way a call could be compiled.

    python -m benchmarks.compiled [--out benchmarks/results/compiled.csv]

A line of the CSV has milliseconds per call, and the original's time over the contender's, round by round.

`replaced`: after se_fused.replace, which shows a compiler the original layers. `formula`, `operator`: each SE layer is
a call of se_fused.squeeze_excite, compiled as plain PyTorch, or as one operator that Inductor cannot look into.
"""

from __future__ import annotations

import copy
import csv
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import se_fused
from examples import zoo
from se_fused.recognised import Recognised

from . import layer_cpu, timing
from .layer_cpu_report import markdown, times

RECORD = layer_cpu.RECORD.with_name("compiled.csv")
NETWORKS = ("timm:efficientnet_b0", "timm:mobilenetv3_large_100")
BATCHES = (1, 8)
CONTENDERS = ("original", "replaced", "formula", "operator")


class Call(nn.Module):
    """An SE layer as one call."""

    def __init__(self, layer: nn.Module, recognised: Recognised) -> None:
        super().__init__()
        self.layer, self.recognised = layer, recognised

    def forward(self, x: Tensor) -> Tensor:
        return se_fused.squeeze_excite(x, *self.recognised.weights(self.layer), **self.recognised.options())


def variant(model: nn.Module, contender: str) -> nn.Module:
    model = copy.deepcopy(model)
    if contender == "replaced":
        se_fused.replace(model)
    elif contender != "original":
        for name, recognised in se_fused.replace(model, dry_run=True).replaced.items():
            model.set_submodule(name, Call(model.get_submodule(name), recognised))
    return model


def compiled(model: nn.Module, contender: str, x: Tensor) -> Callable[[], Tensor]:
    call = torch.compile(variant(model, contender), dynamic=False)
    if contender != "operator":
        return lambda: call(x)

    def forced() -> Tensor:
        with se_fused.use_backend("cpu"):
            return call(x)

    return forced


def measure(network: str, n: int, seconds: float) -> timing.Times:
    """Microseconds per call of each contender, by rounds. Raises AssertionError if an output is another."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(n, 3, 224, 224)
    model = zoo.settled(zoo.build(network), x)
    with torch.inference_mode():
        calls = {contender: compiled(model, contender, x) for contender in CONTENDERS}
        wanted = model(x)
        for contender, call in calls.items():
            torch.testing.assert_close(call(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()), msg=contender)
        return timing.measure([timing.Contender(name, call) for name, call in calls.items()], seconds)


def main(
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    seconds: Annotated[float, typer.Option(help="For the rounds of each network and batch.")] = 30,
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    torch.set_num_threads(threads)
    conditions = layer_cpu.conditions(threads)
    facts = {key: conditions[key] for key in ("date", "commit", "cpu", "threads", "torch")}
    lines = []
    for network in NETWORKS:
        for n in BATCHES:
            load = f"{os.getloadavg()[0]:.2f}"
            found = measure(network, n, seconds)
            for contender, us in found.items():
                p20, p50, p80 = (f"{t / 1e3:.3f}" for t in timing.spread(us))
                ratio = f"{timing.ratio(found, 'original', contender):.3f}"
                lines.append(
                    facts
                    | {"load": load, "network": network, "n": n, "contender": contender, "rounds": len(us)}
                    | {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "original_by_this": ratio}
                )
                typer.echo(f"{network} N={n} {contender}: {p50} ms, original / this {ratio}")
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def table(lines: Iterable[dict[str, str]]) -> str:
    """The CSV as a table of original / contender."""
    lines = list(lines)
    cells = {(line["network"], line["n"], line["contender"]): line for line in lines}
    rows = []
    for network, n in dict.fromkeys((line["network"], line["n"]) for line in lines):
        original = cells[network, n, "original"]
        rows.append(
            [
                network.split(":")[1],
                n,
                f"{float(original['p50_ms']):.1f} ({float(original['p20_ms']):.1f} to {float(original['p80_ms']):.1f})",
                *(times(float(cells[network, n, contender]["original_by_this"])) for contender in CONTENDERS[1:]),
            ]
        )
    header = ["network", "N", "original ms (p20 to p80)", *(f"original / {name}" for name in CONTENDERS[1:])]
    line = lines[0]
    return (
        markdown(header, rows)
        + f"\n{line['cpu']}, {line['threads']} threads, PyTorch {line['torch']}, commit {line['commit']}, "
        f"{line['date']}; medians of {min(int(each['rounds']) for each in lines)} or more interleaved rounds, "
        f"load average {max(float(each['load']) for each in lines):.1f} or less before each.\n"
    )


if __name__ == "__main__":
    typer.run(main)
