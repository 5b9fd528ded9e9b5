"""The ways of se_fused/blocks/cost.py to compute a 1x1 convolution, at each one that the networks of models.py have.

    python -m benchmarks.convolutions [--out benchmarks/results/convolutions.csv]

What is timed is the joined call of a block: batch norm, activation, SE and convolution, or the convolution and the
batch norm and activation after it. A line of the CSV has microseconds per call, and the ratio of its time to that of
the first way, PyTorch's convolution, the median over the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.progress import track
from torch import Tensor, nn

import se_fused
from se_fused import timing
from se_fused.blocks import fused
from se_fused.blocks.cost import WAYS, Decision, decide
from se_fused.blocks.neighbours import Neighbours, Norm

from . import layer_cpu, models, networks
from .text import markdown

Line = dict[str, str]

RECORD = layer_cpu.RECORD.with_name("convolutions.csv")
BATCHES = (1, 16)
# Where the rows of the table begin: million multiplications per sample at N = 1, Cin Cout / L at N = 16.
BOUNDS = {1: (0, 3, 20, 50), 16: (0, 1, 20, 50)}


@dataclass(frozen=True)
class Joined:
    """A joined call with a 1x1 convolution, in the block `root`, for x [N, Cin, *sides]."""

    call: Neighbours | Norm
    root: nn.Module
    how: fused.How
    cin: int
    sides: tuple[int, ...]

    @property
    def weight(self) -> Tensor:
        conv: Any = self.root.get_submodule(str(self.call.conv))
        return conv.weight  # type: ignore[no-any-return]

    @property
    def has_gates(self) -> bool:
        return isinstance(self.call, Neighbours)


def joined_calls() -> list[Joined]:
    """One call of each kind and size in the networks of models.py."""
    found: dict[tuple[object, ...], Joined] = {}
    bind = fused.bind

    def watched(call: Neighbours | Norm, root: nn.Module, how: fused.How) -> Callable[..., Tensor]:
        run = bind(call, root, how)
        if call.conv is None:
            return run

        def noted(x: Tensor, *residual: Tensor) -> Tensor:
            one = Joined(call, root, how, x.shape[1], tuple(x.shape[2:]))
            found.setdefault((one.has_gates, one.cin, one.sides, len(one.weight)), one)
            return run(x, *residual)

        return noted

    for network in track(models.NETWORKS, "finding convolutions"):
        model, x = networks.build(network, 1)
        se_fused.replace(model, level="block")
        with mock.patch.object(fused, "bind", watched), torch.inference_mode():
            model(x)
    return list(found.values())


def contest(one: Joined, n: int, seconds: float) -> Iterator[Line]:
    """The lines of all ways to compute a call for n samples."""
    source = torch.randn(n, one.cin, *one.sides)
    residual = (torch.randn(n, len(one.weight), *one.sides),) if one.call.residual else ()
    variants = []
    for way in WAYS if one.has_gates else WAYS[:2]:
        run, x = fused.bind(one.call, one.root, replace(one.how, way=way)), source.clone()

        def call(run: Callable[..., Tensor] = run, x: Tensor = x) -> Tensor:
            return run(x, *residual)

        def restore(x: Tensor = x) -> Tensor:
            return x.copy_(source)

        variants.append(timing.Variant(way, call, restore=restore))
    with torch.inference_mode():
        found = timing.measure(variants, seconds)
    for way, times in found.times.items():
        p20, p50, p80 = (f"{us:.1f}" for us in timing.spread(times))
        yield {
            "n": str(n), "cin": str(one.cin), "sides": "x".join(map(str, one.sides)), "cout": str(len(one.weight)),
            "gates": str(int(one.has_gates)), "way": way, "others": f"{found.others:.3f}",
            "dropped": str(found.dropped), "rounds": str(len(times)), "p20_us": p20, "p50_us": p50, "p80_us": p80,
            "this_by_convolution": f"{timing.ratio(found.times, way, WAYS[0]):.3f}",
        }  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    seconds: Annotated[float, typer.Option(help="Time for the rounds of each call and batch.")] = 1,
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    torch.set_num_threads(threads)
    conditions = layer_cpu.conditions(threads)
    facts = {key: conditions[key] for key in ("date", "commit", "cpu", "threads", "torch")}
    calls = [(one, n) for one in joined_calls() for n in BATCHES]
    lines = [facts | line for one, n in track(calls, "timing") for line in contest(one, n, seconds)]
    networks.write(out, lines)


def _decision(line: Line) -> Decision:
    """What the rule of cost.py says of the call."""
    n, cin, cout, *sides = (int(each) for each in (line["n"], line["cin"], line["cout"], *line["sides"].split("x")))
    return decide(torch.empty(n, cin, *sides, device="meta"), torch.empty(cout, cin, 1, 1, device="meta"))


def _is_chosen(line: Line) -> bool:
    """Whether the rule takes this way."""
    way = _decision(line).way
    return line["way"] == ("product" if way == "folded" and line["gates"] == "0" else way)  # the same without gates


def table(lines: Iterable[Line]) -> str:
    """The times of the ways relative to the convolution, by what the rule compares with its threshold."""
    lines = list(lines)
    rows = []
    for n, bounds in BOUNDS.items():
        for gates in ("1", "0"):
            for low, high in zip(bounds, (*bounds[1:], float("inf")), strict=True):
                some = [
                    line for line in lines
                    if (line["n"], line["gates"]) == (str(n), gates) and low <= _decision(line).measure < high
                ]  # fmt: skip
                if some:
                    what = "million multiplications" if n == 1 else "Cin Cout / L"
                    size = f"{low} to {high} {what}" if high < float("inf") else f"from {low} {what} on"
                    count = str(sum(line["way"] == WAYS[0] for line in some))
                    cells = [_cell([line for line in some if line["way"] == way]) for way in WAYS[1:]]
                    rows.append([str(n), "gates" if gates == "1" else "no gates", size, count, *cells])
    header = ["N", "before the convolution", "size", "convolutions", *(f"{way} / {WAYS[0]}" for way in WAYS[1:])]
    return f"{markdown(header, rows)}\n{_of_the_rule(lines)} {networks.machine(lines, bold='')}"


def _cell(lines: list[Line]) -> str:
    """Median, smallest and largest ratio; bold where the rule takes this way for most of them."""
    if not lines:
        return ""
    ratios = sorted(float(line["this_by_convolution"]) for line in lines)
    text = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"**{text}**" if 2 * sum(map(_is_chosen, lines)) > len(lines) else text


def _of_the_rule(lines: list[Line]) -> str:
    """How much longer the chosen ways take than the fastest, and than always the convolution."""
    calls: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        calls.setdefault(tuple(line[key] for key in ("n", "cin", "sides", "cout", "gates")), []).append(line)
    chosen, fastest = [], []
    for ways in calls.values():
        ratios = {line["way"]: float(line["this_by_convolution"]) for line in ways}
        of_rule = next(ratios[line["way"]] for line in ways if _is_chosen(line))
        chosen.append(of_rule)
        fastest.append(of_rule / min(ratios.values()))
    times = [f"{statistics.geometric_mean(ratios):.2f}" for ratios in (chosen, fastest)]
    return (
        f"Bold: what the rule takes. Over all {len(calls)} calls its time is {times[0]} of the convolution's and "
        f"{times[1]} of the fastest way's (geometric means)."
    )


if __name__ == "__main__":
    typer.run(main)
