"""Counts what `replace(model, level="block")` joins in every kind of network of timm and torchvision that has SE
layers, and compares results with the original's.

    python -m benchmarks.census [--out benchmarks/results/census.csv] [--processes 2]

Networks of one library whose SE layers stand in the same blocks count as one kind; the smallest of them takes part. A
line of the CSV has the number of SE layers replaced, how many of them are joined with each kind of neighbour, why the
others are not joined, and for float32 the largest difference from the original's results, relative to the largest of
these. The weights are random; nothing is downloaded.
"""

from __future__ import annotations

import csv
import multiprocessing
from collections import Counter
from collections.abc import Hashable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import se_fused
from examples import zoo

from . import layer_cpu
from .coverage import ROUNDING, Line, Network, difference, smallest, start_process, total
from .libraries import build, build_bare, models, wake
from .text import markdown

RECORD = layer_cpu.RECORD.with_name("census.csv")
N, SIDE = 2, 128
# Beyond this a network is counted but not run: it would take a minute, and more than a gigabyte.
MOST_PARAMETERS = 200_000_000
RESULTS = ("side", "error", "classes", "original_error", "block_error")
# The columns of neighbours, with their titles in the table.
NEIGHBOURS = {
    "norm": "batch norm before",
    "act": "activation before",
    "in_place": "in place",
    "residual": "residual after",
    "post_act": "activation after",
    "conv": "1x1 convolution after",
    "conv_norm": "batch norm after that",
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# An SE layer has at most two weights and two biases.
_SE_PARAMETERS = 4


def names() -> list[tuple[str, str]]:
    """All networks of timm that may have gates, and those of torchvision that classify."""
    torchvision = zoo.import_torchvision().models
    classifiers = torchvision.list_models(module=torchvision)
    return [*(("timm", name) for name in models("timm")), *(("torchvision", name) for name in classifiers)]


_known: dict[Hashable, bool] = {}


def is_se(layer: nn.Module) -> bool:
    """Whether `replace` would replace `layer`, or one with the same modules and parameters inside."""
    parameters = [name for name, _ in layer.named_parameters()]
    if not 0 < len(parameters) <= _SE_PARAMETERS:
        return False
    key = (*map(type, layer.modules()), *parameters)
    if key not in _known:
        _known[key] = bool(se_fused.replace(layer, dry_run=True).replaced)
    return _known[key]


def look_at(name: tuple[str, str]) -> Network:
    model = build_bare(*name)
    blocks: set[str] = set()
    for path, layer in model.named_modules():
        if path and is_se(layer):
            block = model
            while path and (block is model or isinstance(block, _CONTAINERS)):
                path = path.rpartition(".")[0]
                block = model.get_submodule(path)
            inside = (f"{inner}:{type(module).__qualname__}" for inner, module in block.named_modules())
            blocks.add(f"{type(model).__module__}({', '.join(inside)})")
    return Network(*name, sum(p.numel() for p in model.parameters()), "; ".join(sorted(blocks)))


def counts(report: se_fused.Report) -> Line:
    joined = [neighbours for block in report.blocks.values() for neighbours in block]
    kinds = {
        "norm": [each.norm is not None for each in joined],
        "act": [each.pre_act != "identity" for each in joined],
        "in_place": [each.owns_x for each in joined],
        "residual": [each.residual for each in joined],
        "post_act": [each.post_act != "identity" for each in joined],
        "conv": [each.conv is not None for each in joined],
        "conv_norm": [each.conv_norm is not None for each in joined],
    }
    reasons = Counter(report.alone.values())
    return {
        "layers": str(len(report.replaced)),
        "joined": str(len(joined)),
        **{kind: str(sum(each)) for kind, each in kinds.items()},
        "alone": str(len(report.alone)),
        "reasons": " | ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())),
    }


def side_for(bare: nn.Module) -> int:
    """SIDE if the network takes images of that size, else its own size."""
    device = next(bare.parameters()).device
    try:
        with torch.no_grad():
            bare.eval()(torch.zeros(N, 3, SIDE, SIDE, device=device))
    except Exception:  # each network has its own way to refuse a size
        return int(getattr(bare, "default_cfg", {}).get("input_size", (3, 224, 224))[-1])
    return SIDE


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [y for y in tree_leaves(model(x)) if isinstance(y, Tensor)]


def examine(network: Network) -> Line:
    which = {"model": network.model, "parameters": str(network.parameters)}
    bare = build_bare(network.library, network.model)
    if network.parameters > MOST_PARAMETERS:
        return which | counts(se_fused.replace(bare, level="block")) | dict.fromkeys(RESULTS, "")
    side = side_for(bare)
    torch.manual_seed(0)
    x = torch.randn(N, 3, side, side)
    model = zoo.settled(wake(build(network.library, network.model)), x)
    wanted = results(model, x)
    report = se_fused.replace(model, level="block")
    got = results(model, x)
    error = difference(got, wanted)
    equal = all(torch.equal(a.argmax(-1), b.argmax(-1)) for a, b in zip(got, wanted, strict=True))
    exact = [""] * 2
    if not error <= ROUNDING:
        truth = results(se_fused.restore(model).double(), x.double())
        exact = [f"{difference(each, truth):.1e}" for each in (wanted, got)]
    found = [str(side), f"{error:.1e}", "equal" if equal else "different", *exact]
    return which | counts(report) | dict(zip(RESULTS, found, strict=True))


def main(
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    processes: Annotated[int, typer.Option(help="How many processes, with one thread each.")] = 2,
) -> None:
    conditions = layer_cpu.conditions(torch.get_num_threads())
    facts = {key: conditions[key] for key in ("date", "commit", "cpu", "torch")}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=start_process) as pool:
        chosen = smallest(pool.map(look_at, names(), chunksize=16))
        with out.open("w", newline="") as file:
            writer: csv.DictWriter[str] | None = None
            for network, found in zip(chosen, pool.map(examine, chosen), strict=True):
                which = {"library": network.library, "version": layer_cpu.installed(network.library)}
                line = facts | which | found
                if writer is None:
                    writer = csv.DictWriter(file, list(line), lineterminator="\n")
                    writer.writeheader()
                writer.writerow(line)
                file.flush()
                typer.echo(_text(line))


def _text(line: Line) -> str:
    run = f"difference {line['error']}, classes {line['classes']}" if line["error"] else "not run"
    return f"{line['library']} {line['model']}: {line['joined']} of {line['layers']} SE layers joined, {run}"


def table(lines: Iterable[Line]) -> str:
    """The CSV as two tables: the neighbours, one row per library, and why layers were left alone."""
    lines = list(lines)
    rows = []
    for library, version in dict.fromkeys((line["library"], line["version"]) for line in lines):
        some = [line for line in lines if line["library"] == library]
        sums = (str(total(some, column)) for column in ("layers", "joined", *NEIGHBOURS))
        rows.append([f"{library} {version}", str(len(some)), *sums])
    header = ["library", "networks", "SE layers replaced", "joined", *NEIGHBOURS.values()]
    first = lines[0]
    where = f"{first['cpu']}, PyTorch {first['torch']}, commit {first['commit']}, {first['date']}.\n"
    return "\n".join(filter(None, (markdown(header, rows), _reasons(lines), _exactness(lines), where)))


def _reasons(lines: list[Line]) -> str:
    layers: Counter[str] = Counter()
    models: dict[str, list[str]] = {}
    for line in lines:
        for each in filter(None, line["reasons"].split(" | ")):
            count, _, reason = each.partition(" ")
            layers[reason] += int(count)
            models.setdefault(reason, []).append(line["model"])
    if not layers:
        return ""
    rows = [[reason, str(count), ", ".join(models[reason])] for reason, count in layers.most_common()]
    return markdown(["why a layer is computed alone", "layers", "networks"], rows)


def _exactness(lines: list[Line]) -> str:
    run = [line for line in lines if line["error"]]
    small = [line for line in run if not line["original_error"]]
    different = ", ".join(line["model"] for line in run if line["classes"] != "equal")
    text = (
        f"{len(run)} of the networks were run. The classes are equal{f' except for {different}' if different else ''}. "
        f"Results differ from the original's by {ROUNDING:.0e} of the largest or less in {len(small)} of them.\n"
    )
    rows = [[line["model"], *(line[name] for name in ("error", "original_error", "block_error"))] for line in run]
    rows = [row for row in rows if row[2]]
    if not rows:
        return text
    header = ["the others", "block and original", "original and float64", "block and float64"]
    return f"{text}\n{markdown(header, rows)}"


if __name__ == "__main__":
    typer.run(main)
