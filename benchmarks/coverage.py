"""Counts the SE layers that `replace` fuses and leaves in the models of public libraries, and compares the results.

    python -m benchmarks.coverage [--out benchmarks/results/coverage.csv] [--processes 2]

Models of one library that are made of the same modules count as one kind; the smallest of them takes part. A line of
the CSV has the numbers of a report, its reasons, and for float32 the largest differences of outputs and of gradients
from the original's, relative to the largest number of each tensor. A model without a channel gate has no line. The
weights are random; nothing is downloaded. `make census` installs the libraries and runs this.
"""

from __future__ import annotations

import csv
import multiprocessing
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import se_fused
from examples import zoo

from . import layer_cpu
from .libraries import LIBRARIES, build, build_bare, models, wake

Line = dict[str, str]
RECORD = layer_cpu.RECORD.with_name("coverage.csv")
N, SIDES = 2, (64, 128, 224)
# Beyond this a model is counted but not run.
MOST_PARAMETERS = 50_000_000
# Beyond this difference, both results are compared with those in float64.
ROUNDING = 1e-5
# With larger numbers, a map became so small that its batch norm divides by next to nothing.
EXPLODED = 1e6
# A tensor below this part of the largest is rounding alone: the gradient of a bias before a norm.
NOISE = 1e-6
COUNTS = ("replaced", "inline", "skipped", "near")
TEXTS = ("skipped_reasons", "near_reasons", "seen", "unreported")
RESULTS = ("output_difference", "original_error", "replaced_error", "gradient_difference")
COLUMNS = (
    *("date", "commit", "cpu", "torch", "library", "version", "model", "architectures", "parameters"),
    *COUNTS,
    *TEXTS,
    *RESULTS,
    "error",
)
# The name of a class that is a channel gate.
_GATE = re.compile(
    r"(^|[^A-Z])E?SE([Mm]odule|[Bb]lock|[Ll]ayer|[Uu]nit|Cl|$)|(?<!Spatial)Squeeze\w*Exc"
    r"|E[Cc][Aa]|C?B[Aa][Mm]|(Channel|Coord|Split)Att|SelectiveKernelAttn|GlobalContext|GatherExcite"
)


@dataclass(frozen=True)
class Network:
    """kind: what is the same in the networks of which one takes part. error: why it could not be built."""

    library: str
    model: str
    parameters: int
    kind: str
    error: str = ""


def smallest(networks: Iterable[Network]) -> list[Network]:
    """Of each kind the network with the fewest parameters. Networks without a kind are left out."""
    found: dict[tuple[str, str], Network] = {}
    for network in sorted(networks, key=lambda network: (network.parameters, network.model)):
        if network.kind:
            found.setdefault((network.library, network.kind), network)
    return sorted(found.values(), key=lambda network: (network.library, network.model))


def difference(got: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest, relative to the largest number of each tensor wanted, or to a millionth of the largest of all."""
    wanted = list(wanted)
    least = NOISE * max(float(b.abs().max()) for b in wanted)
    return max(float((a - b).abs().max()) / max(least, float(b.abs().max())) for a, b in zip(got, wanted, strict=True))


def start_process() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about models that a library calls old


def text_of(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def look_at(name: tuple[str, str]) -> Network:
    try:
        model = build_bare(*name)
    except Exception as error:  # each library has its own
        return Network(*name, 0, "", text_of(error))
    return Network(*name, sum(p.numel() for p in model.parameters()), "; ".join(sorted(set(_links(model)))))


def _links(model: nn.Module) -> Iterator[str]:
    """Which module stands in which. Numbers are left out: networks may differ in width and depth."""
    for module in model.modules():
        around = type(module).__module__ + ("" if module is model else f".{type(module).__qualname__}")
        for name, child in module.named_children():
            yield f"{around} {re.sub('[0-9]+', '', name)} {type(child).__module__}.{type(child).__qualname__}"
    yield type(model).__module__


def counts(report: se_fused.Report) -> Line:
    return {
        "replaced": str(len(report.replaced)),
        "inline": str(sum(map(len, report.inline.values()))),
        "skipped": str(len(report.skipped)),
        "near": str(len(report.near)),
        "skipped_reasons": _grouped(report.skipped),
        "near_reasons": _grouped(report.near),
        "seen": " | ".join(f"{name}: {what}" for name, what in sorted(report.seen.items())),
        "unreported": " | ".join(sorted(unreported(report))),
    }


def _grouped(reasons: Mapping[str, str]) -> str:
    """The reasons without the sizes of single layers, each with its number of layers before it."""
    found = Counter(re.sub(r" \[.*?\]", "", reason) for reason in reasons.values())
    return " | ".join(f"{count} {reason}" for reason, count in sorted(found.items()))


def unreported(report: se_fused.Report) -> set[str]:
    """The classes that are called channel gates where the report says nothing of them, of what is inside or around."""
    named = [_path(name) for name in (*report.replaced, *report.inline, *report.skipped, *report.near)]
    found = set()
    for name, module in report.model.named_modules():
        called, path = type(module).__name__, _path(name)
        reported = any(path[: len(each)] == each or each[: len(path)] == path for each in named)
        if not reported and _GATE.search(called) and called not in report.seen:
            found.add(called)
    return found


def _path(name: str) -> list[str]:
    return name.split(".") if name else []


def settled_with(model: nn.Module, shape: tuple[int, ...] | None) -> Tensor:
    """An input that `model` takes, to which its batch norms are then settled."""
    own = getattr(model, "in_size", None) or getattr(model, "default_cfg", {}).get("input_size", SIDES)
    shapes = [shape] if shape else [(N, 3, side, side) for side in dict.fromkeys((SIDES[0], own[-1], *SIDES))]
    for each in shapes:
        torch.manual_seed(0)
        x = torch.randn(each)
        try:
            y = zoo.settled(model, x)(x)
            largest = max(float(leaf.abs().max()) for leaf in tree_leaves(y) if isinstance(leaf, Tensor))
            if not largest < EXPLODED:
                raise ValueError(f"numbers as large as {largest:.0e}")
        except Exception:  # each network has its own way to refuse a size
            if each == shapes[-1]:
                raise
        else:
            break
    return x


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs in eval mode that depend on x, which requires a gradient, or on parameters."""
    model.train().eval()  # empties what some networks keep between calls
    return [y for y in tree_leaves(model(x)) if isinstance(y, Tensor) and y.requires_grad]


def run(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of a weighted sum of them."""
    outputs = outputs_of(model, x)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
    return [y.detach() for y in outputs], [g for g in gradients if g is not None]


def examine(network: Network) -> Line:
    """A line of the CSV; empty if nothing in the network is or resembles a channel gate."""
    line = {"model": network.model, "parameters": str(network.parameters), "error": network.error}
    if network.error:
        return line
    try:
        _examine(network, line)
    except Exception as error:  # of the library or of `replace`: the table has it
        line["error"] = text_of(error)
        return line
    return line if any(line[column] not in ("", "0") for column in (*COUNTS, *TEXTS)) else {}


def _examine(network: Network, line: Line) -> None:
    name = network.library, network.model
    if network.parameters > MOST_PARAMETERS:
        line |= counts(se_fused.replace(build_bare(*name)))
        return
    model = wake(build(*name))
    report = se_fused.replace(model)
    line |= counts(report)
    if line["replaced"] == line["inline"] == "0":
        return
    x = settled_with(model, models(network.library)[network.model].shape).requires_grad_()
    exact = x.detach().double().requires_grad_()
    got = [y.detach() for y in outputs_of(model, x)]
    # Gradients in float64: in float32 a number next to zero may get another sign, and a ReLU then another gradient.
    _, got_gradients = run(model.double(), exact)
    truth, wanted_gradients = run(se_fused.restore(model), exact)
    wanted = [y.detach() for y in outputs_of(model.float(), x)]
    line["output_difference"] = f"{difference(got, wanted):.1e}"
    line["original_error"] = f"{difference(wanted, truth):.1e}"
    line["replaced_error"] = f"{difference(got, truth):.1e}"
    line["gradient_difference"] = f"{difference(got_gradients, wanted_gradients):.1e}"


def main(
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    processes: Annotated[int, typer.Option(help="How many processes, with one thread each.")] = 2,
    library: Annotated[list[str], typer.Option(help="Only these libraries.")] = [*LIBRARIES],  # noqa: B006
) -> None:
    conditions = layer_cpu.conditions(torch.get_num_threads())
    facts = {key: conditions[key] for key in ("date", "commit", "cpu", "torch")}
    names = [(each, model) for each in library for model in models(each)]
    with (
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=start_process) as pool,
        out.open("w", newline="") as file,
    ):
        networks = list(pool.map(look_at, names, chunksize=8))
        kinds = Counter((network.library, network.kind) for network in networks)
        chosen = [*smallest(networks), *(network for network in networks if network.error)]
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for network, found in zip(chosen, pool.map(examine, chosen), strict=True):
            if found:
                which = {"library": network.library, "version": layer_cpu.installed(network.library)}
                same = kinds[network.library, network.kind] if network.kind else 1
                writer.writerow(facts | which | {"architectures": str(same)} | found)
                file.flush()
                typer.echo(f"{network.library} {', '.join(f'{key} {value}' for key, value in found.items() if value)}")


def total(lines: Iterable[Line], column: str) -> int:
    return sum(int(line[column] or 0) for line in lines)


if __name__ == "__main__":
    typer.run(main)
