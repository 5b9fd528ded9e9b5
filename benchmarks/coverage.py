"""Counts the SE layers that `replace` replaces and leaves in models of timm, torchvision and transformers.

    python -m benchmarks.coverage [--out benchmarks/results/coverage.csv]

A line of the CSV has the lengths of a report's `replaced`, `skipped` and `near`. No time is measured. The models have
random weights; nothing is downloaded. tests/replace/test_census.py requires these numbers and compares results.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

import se_fused
from examples import zoo

from . import layer_cpu
from .layer_cpu_report import markdown

Line = dict[str, str]
RECORD = layer_cpu.RECORD.with_name("coverage.csv")
# One model for each kind of SE layer that a library has, and for each kind of layer that resembles one.
MODELS = {
    "timm": (
        "coatnet_0_rw_224", "dm_nfnet_f0", "ecaresnet50d", "efficientnet_b0", "efficientnetv2_rw_s", "efficientvit_m0",
        "ese_vovnet19b_slim", "fastvit_t8", "fbnetv3_b", "gcvit_xxtiny", "ghostnet_100", "hardcorenas_a", "lcnet_050",
        "legacy_seresnet18", "legacy_seresnext26_32x4d", "maxvit_pico_rw_256", "mixnet_s", "mobilenetv3_small_100",
        "mobileone_s4", "nf_seresnet26", "rdnet_tiny", "regnety_002", "repghostnet_050", "repvit_m1_0", "rexnet_100",
        "semnasnet_075", "seresnet18", "seresnext26d_32x4d", "shvit_s1", "tinynet_a", "tresnet_m", "skresnet18",
        "resnest14d", "gcresnet33ts",
    ),
    "torchvision": ("efficientnet_b0", "efficientnet_v2_s", "maxvit_t", "mobilenet_v3_large", "regnet_y_400mf"),
    "transformers": ("EfficientNet", "RegNet", "MobileViT"),
}  # fmt: skip


def build(library: str, model: str) -> nn.Module:
    if library != "transformers":
        return zoo.build(f"{library}:{model}")
    zoo.import_torchvision()
    import transformers

    options = {"RegNet": {"layer_type": "y"}}.get(model, {})
    built: nn.Module = getattr(transformers, f"{model}Model")(getattr(transformers, f"{model}Config")(**options))
    return built


def build_bare(library: str, model: str) -> nn.Module:
    """The model, without memory for its weights where the library can build it so."""
    try:
        with torch.device("meta"):
            return build(library, model)
    except NotImplementedError:  # torchvision's RegNet reads numbers while it is built
        return build(library, model)


def counts(report: se_fused.Report) -> dict[str, str]:
    return {name: str(len(getattr(report, name))) for name in ("replaced", "skipped", "near")}


def main(out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD) -> None:
    warnings.simplefilter("ignore", UserWarning)  # about models that a library calls old
    conditions = layer_cpu.conditions(torch.get_num_threads())
    facts = {key: conditions[key] for key in ("date", "commit", "torch")}
    lines = []
    for library, models in MODELS.items():
        for model in models:
            found = counts(se_fused.replace(build_bare(library, model)))
            which = {"library": library, "version": layer_cpu.installed(library), "model": model}
            lines.append(facts | which | found)
            typer.echo(f"{library} {model}: {found}")
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def total(lines: Iterable[Line], column: str) -> int:
    return sum(int(line[column]) for line in lines)


def table(lines: Iterable[Line]) -> str:
    """The CSV as a table, one row per library."""
    lines = list(lines)
    rows = []
    for library, version in dict.fromkeys((line["library"], line["version"]) for line in lines):
        some = [line for line in lines if line["library"] == library]
        none = ", ".join(line["model"] for line in some if line["replaced"] == "0")
        sums = (str(total(some, column)) for column in ("replaced", "skipped"))
        rows.append([f"{library} {version}", str(len(some)), *sums, none])
    header = ["library", "models", "SE layers replaced", "skipped", "models of which nothing is replaced"]
    line = lines[0]
    return f"{markdown(header, rows)}\nPyTorch {line['torch']}, commit {line['commit']}, {line['date']}.\n"


if __name__ == "__main__":
    typer.run(main)
