"""The figures of models.csv, and of layer_cpu.csv: forward, float32, contiguous.

The same lines and matplotlib give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import shapes
from .layer_cpu_report import LABELS, Line, mean, select
from .text import spread_of

# Colours of Okabe and Ito, which colour-blind readers tell apart.
_STYLES = {
    "fused": ("#D55E00", "o"),
    "fused_inplace": ("#E69F00", "D"),
    "fused_out": ("#D55E00", "x"),
    "compile": ("#0072B2", "s"),
    "onnxruntime": ("#009E73", "^"),
    "openvino": ("#CC79A7", "v"),
}
# A grey with the same contrast, 4.3, on white and on #0d1117, because the figure has a transparent background.
_GREY = "#787a7d"
_BARS = {
    "compile": ("torch.compile", "#9aa0a6"),
    "openvino": ("OpenVINO", "#9aa0a6"),
    "onnxruntime": ("ONNX Runtime", "#9aa0a6"),
    "fused": ("se_fused", "#D55E00"),
    "fused_out": ("se_fused, out=", "#D55E00"),
    "fused_inplace": ("se_fused, in place", "#D55E00"),
}
_GROUPS = {"batch 1": shapes.BATCH_1, "batch 16": shapes.BATCH_16}


_NETWORKS = {"replaced": ("replace(model)", "#E69F00", "s"), "block": ('replace(model, level="block")', "#D55E00", "o")}


def networks(lines: Sequence[Line], file: Path) -> None:
    """Speed of whole networks relative to eager: one panel per batch. Whiskers are the 20th and the 80th percentile."""
    batches = list(dict.fromkeys(line["n"] for line in lines))
    names = list(dict.fromkeys(line["network"] for line in lines))
    cells = {(line["network"], line["n"], line["variant"]): spread_of(line, "ratio_{}") for line in lines}
    with matplotlib.rc_context({"svg.hashsalt": "se_fused", "text.color": _GREY, "font.size": 10}):
        figure = Figure(figsize=(7.9, 1.3 + 0.3 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(batches), sharex=True, sharey=True, squeeze=False)[0]
        for axes, n in zip(panels, batches, strict=True):
            for row, (variant, (label, colour, marker)) in enumerate(_NETWORKS.items()):
                found = [cells[name, n, variant] for name in names]
                ys = [y + 0.15 * (2 * row - 1) for y in range(len(names))]
                xerr = [[s.p50 - s.p20 for s in found], [s.p80 - s.p50 for s in found]]
                xs = [s.p50 for s in found]
                axes.errorbar(xs, ys, xerr=xerr, fmt=marker, color=colour, label=label, markersize=5, elinewidth=1)
            axes.axvline(1, color=_GREY, linewidth=1)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            axes.grid(axis="x", color=_GREY, alpha=0.3)
            axes.tick_params(length=0, colors=_GREY)
            axes.spines[:].set_visible(False)
            axes.set_title(f"batch {n}", fontsize=10)
        how = f"float32, {lines[0]['threads']} CPU threads"
        figure.suptitle(f"Speed of networks relative to eager PyTorch ({how}): right is faster", fontsize=10)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(_NETWORKS), frameon=False)
        figure.savefig(file, transparent=True, metadata={"Date": None, "Creator": None})


def speeds(lines: Sequence[Line], members: Sequence[shapes.Shape]) -> dict[str, float]:
    """The geometric mean of each variant's speed relative to eager."""
    eager = mean(lines, "forward", ["eager"], members=members)
    return {name: eager / mean(lines, "forward", [name], members=members) for name in _BARS}


def bars(lines: Sequence[Line], file: Path) -> None:
    """Speed relative to eager at a glance: one bar per variant, one panel per batch."""
    with matplotlib.rc_context({"svg.hashsalt": "se_fused", "text.color": _GREY, "font.size": 10}):
        figure = Figure(figsize=(7.9, 2.4), layout="constrained")
        panels = figure.subplots(1, len(_GROUPS), sharex=True, sharey=True)
        for axes, (batch, members) in zip(panels, _GROUPS.items(), strict=True):
            _panel(axes, speeds(lines, members))
            axes.set_title(f"{batch} ({len(members)} shapes)", fontsize=10)
        how = f"forward, float32, {lines[0]['threads']} CPU threads, geometric mean"
        figure.suptitle(f"Speed of an SE layer relative to eager PyTorch: {how}", fontsize=10)
        figure.savefig(file, transparent=True, metadata={"Date": None, "Creator": None})


def _panel(axes: Axes, found: dict[str, float]) -> None:
    for y, (name, (_, colour)) in enumerate(_BARS.items()):
        axes.barh(y, found[name], height=0.7, color=colour)
        weight = "bold" if name.startswith("fused") else "normal"
        axes.text(max(found[name], 1) + 0.05, y, f"{found[name]:.2f}x", va="center", weight=weight)
    axes.axvline(1, color=_GREY, linewidth=1)
    axes.set_yticks(range(len(_BARS)), [label for label, _ in _BARS.values()])
    axes.set_xticks([1], ["eager"])
    axes.tick_params(length=0, colors=_GREY)
    axes.margins(x=0.2)
    axes.spines[:].set_visible(False)


def by_shape(lines: Sequence[Line], file: Path) -> None:
    """Speed relative to eager, one row per shape. Whiskers reach from the speed at p80 to that at p20."""
    cells = select(lines, "float32", "contiguous", "forward")
    names = [s for s in map(str, shapes.LAYER) if "eager" in cells.get(s, {})]
    figure = Figure(figsize=(8, 1.6 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    for variant, (colour, marker) in _STYLES.items():
        ys = [y for y, shape in enumerate(names) if variant in cells[shape]]
        xs, whiskers = [], []
        for y in ys:
            cell = cells[names[y]]
            p20, p50, p80 = (float(cell[variant][f"p{p}_us"]) for p in (20, 50, 80))
            xs.append(float(cell["eager"]["ratio_to_fused_p50"]) / float(cell[variant]["ratio_to_fused_p50"]))
            whiskers.append((xs[-1] * (1 - p50 / p80), xs[-1] * (p50 / p20 - 1)))
        if ys:
            axes.errorbar(
                xs, ys, xerr=list(zip(*whiskers, strict=True)), fmt=marker, color=colour, label=LABELS[variant],
                markersize=7, elinewidth=1, alpha=0.9,
            )  # fmt: skip
    lanes = range(len(names))
    for mark, style, label in (("copy", "solid", "copy"), ("multiply", "dotted", "multiplication in place")):
        marks = [float(cells[s]["eager"]["p50_us"]) / float(cells[s][mark]["p50_us"]) for s in names]
        lower, upper = [y - 0.4 for y in lanes], [y + 0.4 for y in lanes]
        axes.vlines(marks, lower, upper, color="black", linewidth=2, linestyle=style, label=label)
    for y in lanes[1::2]:
        axes.axhspan(y - 0.5, y + 0.5, color="black", alpha=0.05, linewidth=0)
    axes.axvline(1, color="grey", linestyle="--", linewidth=1, label=LABELS["eager"])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(lanes, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    run = lines[0]
    axes.set_xlabel(f"speed relative to eager: right is faster (float32, {run['threads']} threads, {run['cpu']})")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
