"""Shared by the benchmarks of whole networks on the CPU: variants, the check before timing, and the CSV."""

from __future__ import annotations

import copy
import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import typer
from torch import Tensor, nn

import se_fused
from examples import zoo

from . import layer_cpu, timing

Line = dict[str, str]
SIDE = 224


def build(network: str, n: int) -> tuple[nn.Module, Tensor]:
    """A network in eval mode, with a batch for it."""
    torch.manual_seed(0)
    x = torch.randn(n, 3, SIDE, SIDE)
    return zoo.settled(zoo.build(network), x), x


def build_variant(model: nn.Module, name: str) -> nn.Module:
    """A copy of `model` as it is ("original"), with its SE layers replaced ("replaced", "in place", or with their
    neighbours: "block"), or "without SE"."""
    model = copy.deepcopy(model)
    if name == "without SE":
        report = se_fused.replace(model, dry_run=True)
        for layer in report.replaced:
            model.set_submodule(layer, nn.Identity())
        for block in report.inline:  # in the libraries where they are, they have this switch
            assert model.get_submodule(block).has_se is True, block
            model.get_submodule(block).has_se = False
    elif name != "original":
        se_fused.replace(model, inplace=name == "in place", level="block" if name == "block" else "layer")
    return model


def measure(model: nn.Module, x: Tensor, calls: Mapping[str, Callable[[], Tensor]], seconds: float) -> timing.Times:
    """Microseconds per call, by rounds. Raises AssertionError if an output is not that of `model`, run eagerly."""
    with torch.inference_mode():
        wanted = model(x)
        for name, call in calls.items():
            # Wide, because the rounding of float32 piles up over a whole network, and compilers round elsewhere.
            if name != "without SE":
                torch.testing.assert_close(call(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()), msg=name)
        return timing.measure([timing.Variant(name, call) for name, call in calls.items()], seconds)


def columns(times: timing.Times, name: str, original: str) -> Line:
    """The columns of variant `name`: its milliseconds, and the ratio of the time of `original` to its own."""
    p20, p50, p80 = (f"{t / 1e3:.3f}" for t in timing.spread(times[name]))
    ratio = f"{timing.ratio(times, original, name):.3f}"
    rounds = str(len(times[name]))
    return {"rounds": rounds, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "original_by_this": ratio}


def record(
    out: Path,
    threads: int,
    networks: Sequence[str],
    batches: Sequence[int],
    contest: Callable[[str, int], Iterator[Line]],
) -> None:
    """Write the lines that `contest` gives for each network and batch."""
    torch.set_num_threads(threads)
    conditions = layer_cpu.conditions(threads)
    facts = {key: str(conditions[key]) for key in ("date", "commit", "cpu", "threads", "torch")}
    lines = []
    for network in networks:
        for n in batches:
            torch._dynamo.reset()
            where = {"load": f"{os.getloadavg()[0]:.2f}", "network": network, "n": str(n)}
            for line in contest(network, n):
                lines.append(facts | where | line)
                variant = " ".join(line[key] for key in ("mode", "variant") if key in line)
                typer.echo(f"{network} N={n} {variant}: {line['p50_ms']} ms, {line['original_by_this']}")
    write(out, lines)


def write(out: Path, lines: Sequence[Line]) -> None:
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def milliseconds(line: Line) -> str:
    return f"{float(line['p50_ms']):.1f} ({float(line['p20_ms']):.1f} to {float(line['p80_ms']):.1f})"


def machine(lines: Sequence[Line]) -> str:
    """The line under a table: machines, versions and commits."""

    def each(column: str) -> str:
        return " and ".join(dict.fromkeys(line[column] for line in lines))

    return (
        f"{each('cpu')}, {each('threads')} threads, PyTorch {each('torch')}, commit {each('commit')}, "
        f"{each('date')}; medians of {min(int(each['rounds']) for each in lines)} or more interleaved rounds, "
        f"load average {max(float(each['load']) for each in lines):.1f} or less before each.\n"
    )
