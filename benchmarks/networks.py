"""Shared by the benchmarks of whole networks on the CPU: variants, the check before timing, and the CSV."""

from __future__ import annotations

import copy
import csv
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import typer
from torch import Tensor, nn

import se_fused
from examples import zoo
from se_fused import timing

from . import layer_cpu
from .contradictions import refuse
from .text import gain, markdown, ratio_text, spread_of

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


def measure(model: nn.Module, x: Tensor, calls: Mapping[str, Callable[[], Tensor]], seconds: float) -> timing.Measured:
    """Microseconds per call, by rounds. Raises AssertionError if an output is not that of `model`, run eagerly."""
    with torch.inference_mode():
        wanted, before = model(x), x.clone()
        for name, call in calls.items():
            # Wide, because the rounding of float32 piles up over a whole network, and compilers round elsewhere.
            if name != "without SE":
                torch.testing.assert_close(call(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()), msg=name)
            assert torch.equal(x, before), f"{name} writes to the input that all share"
        return timing.measure([timing.Variant(name, call) for name, call in calls.items()], seconds)


def lines_of(model: nn.Module, found: timing.Measured) -> Iterator[Line]:
    """The line of each variant: its milliseconds, and the ratio of the time of the variant "original" to its own."""
    report = se_fused.replace(model, dry_run=True)
    layers = len(report.replaced) + sum(map(len, report.inline.values()))
    facts = {"se_layers": str(layers), "others": f"{found.others:.3f}", "dropped": str(found.dropped)}
    for name, times in found.times.items():
        line = facts | {"variant": name, "rounds": str(len(times))}
        line |= {f"{p}_ms": f"{t / 1e3:.3f}" for p, t in timing.spread(times)._asdict().items()}
        ratios = timing.ratio_spread(found.times, "original", name)._asdict().items()
        yield line | {f"ratio_{p}": f"{ratio:.3f}" for p, ratio in ratios}


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
    facts = {key: conditions[key] for key in ("date", "commit", "cpu", "threads", "torch")}
    lines = []
    for network in networks:
        for n in batches:
            torch._dynamo.reset()
            where = {"network": network, "n": str(n)}
            for line in contest(network, n):
                lines.append(facts | where | line)
                typer.echo(f"{network} N={n} {line['variant']}: {line['p50_ms']} ms, {line['ratio_p50']}")
    write(out, lines)


def write(out: Path, lines: Sequence[Line]) -> None:
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def milliseconds(line: Line) -> str:
    return timing.text(spread_of(line, "{}_ms"), int(line["rounds"]))


def ratio(line: Line) -> str:
    """original / this, with its spread."""
    return gain(spread_of(line, "ratio_{}"), int(line["rounds"]))


def ratios(lines: Iterable[Line], variant: str) -> list[float]:
    """original / variant of each network and batch."""
    return [float(line["ratio_p50"]) for line in lines if line["variant"] == variant]


def table(lines: Iterable[Line], variants: Sequence[str]) -> str:
    """The ratios original / variant. Raises ValueError if the lines contradict each other."""
    lines = list(lines)
    refuse(lines)
    cells = {(line["network"], line["n"], line["variant"]): line for line in lines}
    rows = []
    for network, n in dict.fromkeys((line["network"], line["n"]) for line in lines):
        original = cells[network, n, "original"]
        name = f"{network} ({original['se_layers']} SE layers)"
        rows.append([name, n, milliseconds(original), *(ratio(cells[network, n, variant]) for variant in variants)])
    means = [ratio_text(statistics.geometric_mean(ratios(lines, variant))) for variant in variants]
    rows.append(["geometric mean", "", "", *means])
    header = ["network", "N", "original ms", *(f"original / {variant}" for variant in variants)]
    return f"{markdown(header, rows)}\n{machine(lines)}"


def machine(lines: Sequence[Line], bold: str = " Bold: slower in 80 % of the rounds.") -> str:
    """The line under a table: machines, versions and commits, and what is bold."""

    def each(column: str) -> str:
        return " and ".join(dict.fromkeys(line[column] for line in lines))

    return (
        f"{each('cpu')}, threads: {each('threads')}, PyTorch {each('torch')}, commit {each('commit')}, "
        f"{each('date')}; medians (20th to 80th percentile) of {min(int(line['rounds']) for line in lines)} or more "
        f"interleaved rounds, during which other processes used {max(float(line['others']) for line in lines):.1%} of "
        f"the CPU or less.{bold}\n"
    )
