"""The tables of layer_cpu.csv, computed from the lines of that file alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from se_fused import timing

from . import baselines, layer_cpu, shapes
from .contradictions import refuse
from .text import gain, markdown, ratio_text, spread_of

Line = dict[str, str]
Cell = dict[str, Line]  # by variant

SHAPE_LISTS = {
    f"batch 1 ({len(shapes.BATCH_1)} shapes)": shapes.BATCH_1,
    f"batch 16 ({len(shapes.BATCH_16)} shapes)": shapes.BATCH_16,
    f"all {len(shapes.LAYER)} shapes": shapes.LAYER,
}
LABELS = {
    "fused": "fused",
    "fused_out": "fused, out=",
    "fused_inplace": "fused, in place",
    "eager": "eager",
    "compile": "torch.compile",
    "compile_freezing": "torch.compile with freezing",
    "compile_cpp": "torch.compile with a C++ wrapper",
    "compile_unguarded": "torch.compile without guards",
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


def _us(line: Line) -> str:
    return timing.text(spread_of(line, "{}_us"), int(line["rounds"]))


def _ratio(line: Line, base: str) -> str:
    """The time of the line over that of `base`, with its spread: the speed of `base`."""
    return gain(spread_of(line, f"ratio_to_{base}_{{}}"), int(line["rounds"]))


def ratio(cell: Cell, names: Iterable[str], base: str = "fused") -> float | None:
    """The smallest ratio of `names` to `base`, which the fastest has. None if none was measured."""
    found = [cell[n][f"ratio_to_{base}_p50"] for n in names if n in cell]
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


def _means(columns: Mapping[str, Sequence[float | None]], blank: int = 0) -> list[list[str]]:
    """Rows with the geometric mean of each column, for each list of shapes that was measured whole, behind `blank`
    empty cells. `columns` are by shape."""
    rows = []
    for label, members in SHAPE_LISTS.items():
        if all(str(m) in columns for m in members):
            by_column = zip(*(columns[str(m)] for m in members), strict=True)
            known = [statistics.geometric_mean(k) if (k := _known(column)) else None for column in by_column]
            rows.append([f"geometric mean, {label}", *[""] * blank, *map(ratio_text, known)])
    return rows


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
            found[shape] = cell, min(measured, key=lambda name: float(cell[name]["ratio_to_fused_p50"]))
    return found


def _forward(lines: list[Line]) -> str:
    """Out of place, into new memory (fused) and into memory that is there (out=)."""
    rows, ratios = [], {}
    for shape, (cell, best) in _forward_cells(lines).items():
        ratios[shape] = [ratio(cell, ["eager"]), ratio(cell, [best]), ratio(cell, [best], "fused_out")]
        gains = [_ratio(cell["eager"], "fused"), _ratio(cell[best], "fused"), _ratio(cell[best], "fused_out")]
        fused = cell["fused"]
        rows.append([
            shape, _us(fused), _us(cell["fused_out"]), *gains, LABELS[best], _us(cell["copy"]), _copy_fraction(fused),
        ])  # fmt: skip
    rows += [[*row, "", "", ""] for row in _means(ratios, blank=2)]
    header = ["x", "fused µs", "out= µs", "eager / fused", "best / fused", "best / out=", "best baseline", "copy µs"]
    return markdown([*header, "copy / fused"], rows) if rows else ""


def _in_place(lines: list[Line]) -> str:
    rows, ratios = [], {}
    for shape, (cell, best) in _forward_cells(lines).items():
        baseline, multiply = (ratio(cell, [name], "fused_inplace") for name in (best, "multiply"))
        if baseline is None or multiply is None:
            continue
        ratios[shape] = [ratio(cell, ["eager"], "fused_inplace"), baseline]
        gains = [_ratio(cell[name], "fused_inplace") for name in ("eager", best)]
        rows.append([shape, _us(cell["fused_inplace"]), *gains, _us(cell["multiply"]), f"{multiply:.0%}"])
    rows += [[*row, "", ""] for row in _means(ratios, blank=1)]
    header = ["x", "in place µs", "eager / in place", "best / in place", "multiply µs", "multiply / in place"]
    return markdown(header, rows) if rows else ""


def _compiled(lines: list[Line]) -> str:
    names = [name for name in baselines.BASELINES if name.startswith("compile")]
    cells = {shape: cell for shape, (cell, _) in _forward_cells(lines).items() if all(n in cell for n in names)}
    ratios, rows = {}, []
    for shape, cell in cells.items():
        eager = float(cell["eager"]["ratio_to_fused_p50"])
        ratios[shape] = [eager / float(cell[name]["ratio_to_fused_p50"]) for name in names]
        rows.append([shape, _us(cell["eager"]), *(_us(cell[name]) for name in names), *map(ratio_text, ratios[shape])])
    rows += _means(ratios, blank=1 + len(names))
    titles = [LABELS[name] for name in names]
    header = ["x", "eager µs", *(f"{title} µs" for title in titles), *(f"eager / {title}" for title in titles)]
    return markdown(header, rows) if rows else ""


def _other_formats(lines: list[Line]) -> str:
    formats = [
        (d, m) for d in layer_cpu.DTYPES for m in baselines.MEMORY_FORMATS if (d, m) != ("float32", "contiguous")
    ]
    tables = [select(lines, *f, "forward") for f in formats]
    columns = [
        (f, table, baseline) for f, table in zip(formats, tables, strict=True) for baseline in ("eager", "compile")
    ]
    names = [s for s in map(str, shapes.LAYER) if all(s in table for table in tables)]
    ratios = {s: [ratio(table[s], [baseline]) for _, table, baseline in columns] for s in names}
    rows = [[s, *(_ratio(table[s][baseline], "fused") for _, table, baseline in columns)] for s in names]
    rows += _means(ratios)
    header = ["x", *(f"{dtype} {layout}: {LABELS[baseline]} / fused" for (dtype, layout), _, baseline in columns)]
    return markdown(header, rows) if names else ""


def _gradients(lines: list[Line], direction: str) -> str:
    cells = select(lines, "float32", "contiguous", direction)
    ratios = {s: [ratio(cells[s], ["eager"])] for s in map(str, shapes.LAYER) if s in cells}
    rows = []
    for shape in ratios:
        fused, eager = cells[shape]["fused"], cells[shape]["eager"]
        copy = f"{float(fused['copy_us']):,.1f}"
        rows.append([shape, _us(fused), _us(eager), _ratio(eager, "fused"), copy, _copy_fraction(fused)])
    rows += [[*row, "", ""] for row in _means(ratios, blank=2)]
    header = ["x", "fused µs", "eager µs", "eager / fused", "copies µs", "copies / fused"]
    return markdown(header, rows) if rows else ""


def _of_a_call(lines: list[Line]) -> str:
    cell = select(lines, "float32", "contiguous", "forward").get(str(shapes.CALL), {})
    rows = [[LABELS[name], _us(line)] for name, line in cell.items() if name in LABELS]
    return markdown([f"x of {shapes.CALL}", "µs"], rows) if rows else ""


def table(lines: list[Line]) -> str:
    """The Markdown of a run, without what was not measured. Raises ValueError if its lines contradict each other."""
    refuse(lines)
    sections = {
        "Forward, float32, contiguous. Best: the fastest of eager, torch.compile with and without freezing and a C++ "
        "wrapper, ONNX Runtime and OpenVINO:": _forward(lines),
        "Forward in place, float32, contiguous:": _in_place(lines),
        "torch.compile by its options, forward, float32, contiguous:": _compiled(lines),
        "Forward, other formats:": _other_formats(lines),
        "Backward alone, float32, contiguous:": _gradients(lines, "backward"),
        "Forward and backward, float32, contiguous:": _gradients(lines, "forward_backward"),
        "A call with nothing to compute:": _of_a_call(lines),
    }
    parts = [f"{title}\n\n{body}" for title, body in sections.items() if body]
    run = lines[0]
    parts.append(
        f"{run['cpu']}, {run['threads']} threads for all, PyTorch {run['torch']}, ONNX Runtime {run['onnxruntime']}, "
        f"OpenVINO {run['openvino']}, backend {run['backend']}, commit {run['commit']}, {run['date']}. Forward runs in "
        "inference mode. Medians (20th to 80th percentile) over interleaved rounds, with the digits that the spread "
        f"allows; other processes used {max(float(line['others']) for line in lines):.0%} of the CPU or less, and "
        f"{sum(int(line['dropped']) for line in lines if line['variant'] == 'fused')} rounds were left out because of "
        "others. Bold: slower in 80 % of the rounds.\n"
    )
    return "\n".join(parts)
