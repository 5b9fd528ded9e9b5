"""The tables of layer_cpu.csv, computed from the lines of that file alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from . import baselines, layer_cpu, shapes

Line = dict[str, str]
Cell = dict[str, Line]  # by variant

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
    """The lines of one table, by shape and variant."""
    cells: dict[str, Cell] = {}
    for line in lines:
        if (line["dtype"], line["layout"], line["direction"]) == (dtype, layout, direction):
            cells.setdefault(line["shape"], {})[line["variant"]] = line
    return cells


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)) + "\n"


def _us(line: Line) -> str:
    t = float(line["p50_us"])
    return f"{t:.1f}" if t < 100 else f"{t:,.0f}"


def ratio_text(value: float | None) -> str:
    """A ratio as text: a loss, which is below 1, is bold."""
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def ratio(cell: Cell, names: Iterable[str], base: str = "fused") -> float | None:
    """The smallest ratio of `names` to `base`, which the fastest has. None if none was measured."""
    found = [cell[n][f"ratio_to_{base}"] for n in names if n in cell]
    return min((float(text) for text in found if text), default=None)


def _known(column: Sequence[float | None]) -> list[float]:
    """`column`, or nothing if a value was not measured, since a mean over fewer shapes would be another mean."""
    values = [value for value in column if value is not None]
    return values if len(values) == len(column) else []


def mean(
    lines: Iterable[Line],
    direction: str,
    names: Sequence[str],
    base: str = "fused",
    members: Sequence[shapes.Shape] = shapes.LAYER,
) -> float:
    """The geometric mean of `ratio` over the shapes of a list: float32, contiguous."""
    cells = select(lines, "float32", "contiguous", direction)
    known = _known([ratio(cells[str(shape)], names, base) for shape in members])
    if not known:
        raise ValueError(f"{' or '.join(names)} beside {base}, {direction}, was not measured at every shape")
    return statistics.geometric_mean(known)


def means(columns: Mapping[str, Sequence[float | None]]) -> dict[str, list[float | None]]:
    """The geometric mean of each column, for each list of shapes that was measured whole. `columns` are by shape."""
    found: dict[str, list[float | None]] = {}
    for label, members in SHAPE_LISTS.items():
        if all(str(m) in columns for m in members):
            by_column = zip(*(columns[str(m)] for m in members), strict=True)
            found[label] = [
                statistics.geometric_mean(known) if (known := _known(column)) else None for column in by_column
            ]
    return found


def _copy_fraction(line: Line) -> str:
    return f"{float(line['copy_us']) / float(line['p50_us']):.0%}"


def _forward_cells(lines: list[Line]) -> dict[str, tuple[Cell, str]]:
    """The float32, contiguous cells in which a baseline was measured, each with its fastest baseline."""
    cells = select(lines, "float32", "contiguous", "forward")
    found = {}
    for shape in map(str, shapes.LAYER):
        cell = cells.get(shape, {})
        measured = [name for name in baselines.BASELINES if name in cell]
        if measured:
            found[shape] = cell, min(measured, key=lambda name: float(cell[name]["ratio_to_fused"]))
    return found


def _forward(lines: list[Line]) -> str:
    rows, ratios = [], {}
    for shape, (cell, best) in _forward_cells(lines).items():
        ratios[shape] = [ratio(cell, [best]), ratio(cell, ["eager"])]
        fused = cell["fused"]
        rows.append([
            shape, _us(fused), f"{_us(cell[best])} ({LABELS[best]})", *map(ratio_text, ratios[shape]),
            f"{float(fused['copy_us']):,.1f}", _copy_fraction(fused),
        ])  # fmt: skip
    rows += [[f"geometric mean, {label}", "", "", *map(ratio_text, m), "", ""] for label, m in means(ratios).items()]
    header = ["x", "fused µs", "best baseline µs", "best baseline / fused", "eager / fused", "copy µs", "copy / fused"]
    return markdown(header, rows) if rows else ""


def _in_place(lines: list[Line]) -> str:
    rows, ratios = [], {}
    for shape, (cell, best) in _forward_cells(lines).items():
        baseline, multiply = (ratio(cell, [name], "fused_inplace") for name in (best, "multiply"))
        if baseline is None or multiply is None:
            continue
        ratios[shape] = [baseline, baseline / multiply]
        rows.append([
            shape, _us(cell["fused_inplace"]), ratio_text(baseline), _us(cell["multiply"]), f"{multiply:.0%}",
            ratio_text(baseline / multiply),
        ])  # fmt: skip
    rows += [
        [f"geometric mean, {label}", "", ratio_text(found[0]), "", "", ratio_text(found[1])]
        for label, found in means(ratios).items()
    ]
    header = ["x", "in place µs", "best baseline / in place", "multiply µs", "multiply / in place"]
    header.append("best baseline / multiply")
    return markdown(header, rows) if rows else ""


def _other_formats(lines: list[Line]) -> str:
    formats = [
        (d, m) for d in layer_cpu.DTYPES for m in baselines.MEMORY_FORMATS if (d, m) != ("float32", "contiguous")
    ]
    tables = [select(lines, *f, "forward") for f in formats]
    columns = [
        (f, table, baseline) for f, table in zip(formats, tables, strict=True) for baseline in ("eager", "compile")
    ]
    ratios = {
        s: [ratio(table.get(s, {}), [baseline]) for _, table, baseline in columns] for s in map(str, shapes.LAYER)
    }
    ratios = {s: row for s, row in ratios.items() if any(row)}
    rows = [[label, *map(ratio_text, row)] for label, row in ratios.items()]
    rows += [[f"geometric mean, {label}", *map(ratio_text, row)] for label, row in means(ratios).items()]
    header = ["x", *(f"{dtype} {layout}: {LABELS[baseline]} / fused" for (dtype, layout), _, baseline in columns)]
    return markdown(header, rows) if rows else ""


def _gradients(lines: list[Line], direction: str) -> str:
    cells = select(lines, "float32", "contiguous", direction)
    ratios = {s: [ratio(cells[s], ["eager"])] for s in map(str, shapes.LAYER) if s in cells}
    rows = []
    for shape, row in ratios.items():
        fused, eager = cells[shape]["fused"], cells[shape]["eager"]
        copy = f"{float(fused['copy_us']):,.1f}"
        rows.append([shape, _us(fused), _us(eager), *map(ratio_text, row), copy, _copy_fraction(fused)])
    rows += [
        [f"geometric mean, {label}", "", "", *map(ratio_text, row), "", ""] for label, row in means(ratios).items()
    ]
    header = ["x", "fused µs", "eager µs", "eager / fused", "copy µs", "copy / fused"]
    return markdown(header, rows) if rows else ""


def table(lines: list[Line]) -> str:
    """The Markdown of a run, without what was not measured."""
    sections = {
        "Forward, float32, contiguous:": _forward(lines),
        "Forward in place, float32, contiguous:": _in_place(lines),
        "Forward, other formats:": _other_formats(lines),
        "Backward alone, float32, contiguous:": _gradients(lines, "backward"),
        "Forward and backward, float32, contiguous:": _gradients(lines, "forward_backward"),
    }
    parts = [f"{title}\n\n{body}" for title, body in sections.items() if body]
    call = select(lines, "float32", "contiguous", "forward").get(str(shapes.CALL))
    if call:
        parts.append(
            f"A call with nothing to compute ({shapes.CALL}, inference mode): fused {_us(call['fused'])} µs, "
            f"eager {_us(call['eager'])} µs, eager / fused {ratio_text(ratio(call, ['eager']))}.\n"
        )
    run = lines[0]
    parts.append(
        f"{run['cpu']}, {run['threads']} threads for all, PyTorch {run['torch']}, ONNX Runtime {run['onnxruntime']}, "
        f"OpenVINO {run['openvino']}, backend {run['backend']}, commit {run['commit']}, {run['date']}. Forward runs "
        "in inference mode. The best baseline is the fastest of eager, torch.compile, ONNX Runtime and OpenVINO. Copy "
        "is the time that the bytes that must move take at the speed of a copy measured between the same calls; "
        "multiply is one multiplication of the map by 1, in place.\n"
    )
    return "\n".join(parts)
