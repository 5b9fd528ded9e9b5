"""The README's tables and figure of layer_cpu.csv. Everything here is a function of the lines of that file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import layer_cpu, peers, shapes

Line = dict[str, str]
Cell = dict[str, Line]  # by contender

SHAPE_LISTS = {
    f"batch 1 ({len(shapes.BATCH_1)} shapes)": shapes.BATCH_1,
    f"batch 16 ({len(shapes.BATCH_16)} shapes)": shapes.BATCH_16,
    f"all {len(shapes.LAYER)} shapes": shapes.LAYER,
}
LABELS = {
    "fused": "fused",
    "fused_inplace": "fused, in place",
    "eager": "eager",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def select(lines: Iterable[Line], dtype: str, layout: str, direction: str) -> dict[str, Cell]:
    """The lines of one table, by shape and contender."""
    cells: dict[str, Cell] = {}
    for line in lines:
        if (line["dtype"], line["layout"], line["direction"]) == (dtype, layout, direction):
            cells.setdefault(line["shape"], {})[line["contender"]] = line
    return cells


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)) + "\n"


def _us(line: Line) -> str:
    t = float(line["p50_us"])
    return f"{t:.1f}" if t < 100 else f"{t:,.0f}"


def times(value: float | None) -> str:
    """A ratio; a loss, below 1, in bold."""
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def ratio(cell: Cell, names: Iterable[str], base: str = "fused") -> float | None:
    """The smallest ratio of `names` to `base`: that of the fastest among them. None where none was measured."""
    found = [cell[n][f"ratio_to_{base}"] for n in names if n in cell]
    return min((float(text) for text in found if text), default=None)


def _known(column: Sequence[float | None]) -> list[float]:
    """`column`, or nothing if any of it was not measured: a mean over fewer shapes would be another mean."""
    values = [value for value in column if value is not None]
    return values if len(values) == len(column) else []


def means(columns: Mapping[str, Sequence[float | None]]) -> dict[str, list[float | None]]:
    """For each list of shapes that was measured whole, the geometric mean of each column of `columns`, by shape."""
    found: dict[str, list[float | None]] = {}
    for label, members in SHAPE_LISTS.items():
        if all(str(m) in columns for m in members):
            by_column = zip(*(columns[str(m)] for m in members), strict=True)
            found[label] = [
                statistics.geometric_mean(known) if (known := _known(column)) else None for column in by_column
            ]
    return found


def _share_of_floor(line: Line) -> str:
    return f"{float(line['floor_us']) / float(line['p50_us']):.0%}"


def _forward_cells(lines: list[Line]) -> dict[str, tuple[Cell, str]]:
    """The float32, contiguous cells in which a peer was measured, each with its fastest peer."""
    cells = select(lines, "float32", "contiguous", "forward")
    found = {}
    for shape in map(str, shapes.LAYER):
        cell = cells.get(shape, {})
        measured = [name for name in peers.PEERS if name in cell]
        if measured:
            found[shape] = cell, min(measured, key=lambda name: float(cell[name]["ratio_to_fused"]))
    return found


def _forward(lines: list[Line]) -> str:
    rows, ratios = [], {}
    for shape, (cell, best) in _forward_cells(lines).items():
        ratios[shape] = [ratio(cell, [best]), ratio(cell, ["eager"])]
        fused = cell["fused"]
        rows.append([
            shape, _us(fused), f"{_us(cell[best])} ({LABELS[best]})", *map(times, ratios[shape]),
            f"{float(fused['floor_us']):,.1f}", _share_of_floor(fused),
        ])  # fmt: skip
    rows += [[f"geometric mean, {label}", "", "", *map(times, m), "", ""] for label, m in means(ratios).items()]
    header = ["x", "fused µs", "best peer µs", "best peer / fused", "eager / fused", "floor µs", "floor / fused"]
    return markdown(header, rows) if rows else ""


def _in_place(lines: list[Line]) -> str:
    rows, ratios = [], {}
    for shape, (cell, best) in _forward_cells(lines).items():
        peer, floor = (ratio(cell, [name], "fused_inplace") for name in (best, "multiply"))
        if peer is None or floor is None:
            continue
        ratios[shape] = [peer, peer / floor]
        rows.append([
            shape, _us(cell["fused_inplace"]), times(peer), _us(cell["multiply"]), f"{floor:.0%}", times(peer / floor)
        ])  # fmt: skip
    rows += [
        [f"geometric mean, {label}", "", times(found[0]), "", "", times(found[1])]
        for label, found in means(ratios).items()
    ]
    header = ["x", "in place µs", "best peer / in place", "floor µs", "floor / in place", "best peer / floor"]
    return markdown(header, rows) if rows else ""


def _other_formats(lines: list[Line]) -> str:
    formats = [(d, m) for d in layer_cpu.DTYPES for m in peers.MEMORY_FORMATS if (d, m) != ("float32", "contiguous")]
    tables = [select(lines, *f, "forward") for f in formats]
    columns = [(f, table, peer) for f, table in zip(formats, tables, strict=True) for peer in ("eager", "compile")]
    ratios = {s: [ratio(table.get(s, {}), [peer]) for _, table, peer in columns] for s in map(str, shapes.LAYER)}
    ratios = {s: row for s, row in ratios.items() if any(row)}
    rows = [[label, *map(times, row)] for label, row in ratios.items()]
    rows += [[f"geometric mean, {label}", *map(times, row)] for label, row in means(ratios).items()]
    header = ["x", *(f"{dtype} {layout}: {LABELS[peer]} / fused" for (dtype, layout), _, peer in columns)]
    return markdown(header, rows) if rows else ""


def _gradients(lines: list[Line], direction: str) -> str:
    cells = select(lines, "float32", "contiguous", direction)
    ratios = {s: [ratio(cells[s], ["eager"])] for s in map(str, shapes.LAYER) if s in cells}
    rows = []
    for shape, row in ratios.items():
        fused, eager = cells[shape]["fused"], cells[shape]["eager"]
        floor = f"{float(fused['floor_us']):,.1f}"
        rows.append([shape, _us(fused), _us(eager), *map(times, row), floor, _share_of_floor(fused)])
    rows += [[f"geometric mean, {label}", "", "", *map(times, row), "", ""] for label, row in means(ratios).items()]
    header = ["x", "fused µs", "eager µs", "eager / fused", "floor µs", "floor / fused"]
    return markdown(header, rows) if rows else ""


def table(lines: list[Line]) -> str:
    """The Markdown of a run, with what was not measured left out."""
    sections = {
        "Forward, float32, contiguous:": _forward(lines),
        "Forward in place, float32, contiguous; the floor is a multiplication of the map by 1, in place:": _in_place(
            lines
        ),
        "Forward, other formats:": _other_formats(lines),
        "Backward alone, float32, contiguous:": _gradients(lines, "backward"),
        "Forward and backward, float32, contiguous:": _gradients(lines, "forward_backward"),
    }
    parts = [f"{title}\n\n{body}" for title, body in sections.items() if body]
    call = select(lines, "float32", "contiguous", "forward").get(str(shapes.CALL))
    if call:
        parts.append(
            f"A call with nothing to compute ({shapes.CALL}, inference mode): fused {_us(call['fused'])} µs, "
            f"eager {_us(call['eager'])} µs, eager / fused {times(ratio(call, ['eager']))}.\n"
        )
    run = lines[0]
    parts.append(
        f"{run['cpu']}, {run['threads']} threads for all, PyTorch {run['torch']}, ONNX Runtime {run['onnxruntime']}, "
        f"OpenVINO {run['openvino']}, backend {run['backend']}, commit {run['commit']}, {run['date']}. Medians over "
        "interleaved rounds, forward in inference mode. Ratios are medians of the ratios within a round; one below 1, "
        "a loss, is bold. Best peer: the fastest of eager, torch.compile, ONNX Runtime and OpenVINO. Floor, where "
        "nothing else is said: the bytes that must move, at the speed of a copy measured between the same calls.\n"
    )
    return "\n".join(parts)


# Colours of Okabe and Ito, which colour-blind readers tell apart.
_STYLES = {
    "fused": ("#D55E00", "o"),
    "fused_inplace": ("#E69F00", "D"),
    "compile": ("#0072B2", "s"),
    "onnxruntime": ("#009E73", "^"),
    "openvino": ("#CC79A7", "v"),
}


def draw(lines: list[Line], file: Path) -> None:
    """Speed relative to eager, a row per shape: forward, float32, contiguous. Whiskers reach from p80 to p20."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = select(lines, "float32", "contiguous", "forward")
    names = [s for s in map(str, shapes.LAYER) if "eager" in cells.get(s, {})]
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.42 * len(names)), layout="constrained")
    for contender, (colour, marker) in _STYLES.items():
        ys = [y for y, shape in enumerate(names) if contender in cells[shape]]
        xs, whiskers = [], []
        for y in ys:
            cell = cells[names[y]]
            p20, p50, p80 = (float(cell[contender][f"p{p}_us"]) for p in (20, 50, 80))
            xs.append(float(cell["eager"]["ratio_to_fused"]) / float(cell[contender]["ratio_to_fused"]))
            whiskers.append((xs[-1] * (1 - p50 / p80), xs[-1] * (p50 / p20 - 1)))
        if ys:
            axes.errorbar(
                xs, ys, xerr=list(zip(*whiskers, strict=True)), fmt=marker, color=colour, label=LABELS[contender],
                markersize=7, elinewidth=1, alpha=0.9,
            )  # fmt: skip
    floors = [float(cells[s]["eager"]["p50_us"]) / float(cells[s]["eager"]["floor_us"]) for s in names]
    lanes = range(len(names))
    axes.vlines(floors, [y - 0.4 for y in lanes], [y + 0.4 for y in lanes], color="black", linewidth=2, label="floor")
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
    plt.close(figure)
