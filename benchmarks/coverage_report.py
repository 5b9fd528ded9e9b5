"""The tables of docs/coverage.md, from the CSV that `benchmarks/coverage.py` writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .coverage import COUNTS, ROUNDING, Line, total
from .text import markdown

_MODELS_IN_FULL = 5


def agrees(line: Line) -> bool:
    """Whether a model that was run computes as before, but for rounding: outputs may differ by more than ROUNDING only
    where the original differs from float64 by as much too."""
    exact = float(line["output_difference"]) <= ROUNDING
    as_exact = float(line["replaced_error"]) <= 3 * float(line["original_error"])
    return (exact or as_exact) and float(line["gradient_difference"]) <= ROUNDING


def disagreeing(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if was_run(line) and not agrees(line)]


def was_run(line: Line) -> bool:
    return bool(line["gradient_difference"])


def layers(lines: Iterable[Line]) -> int:
    """How many SE layers were found, replaced or not."""
    lines = list(lines)
    return sum(total(lines, column) for column in COUNTS)


def libraries(lines: Iterable[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(f"{line['library']} {line['version']}", []).append(line)
    return found


def table(lines: Sequence[Line]) -> str:
    """One table of all libraries, then why layers were kept, what else was seen, and what failed."""
    by_reason = ["layers", "kinds of models"]
    parts = {
        "": _summary(lines),
        "Recognised, but kept": markdown(["reason", *by_reason], _reasons(lines, "skipped_reasons")),
        "Near misses": markdown(["reason", *by_reason], _reasons(lines, "near_reasons")),
        "Seen, not SE": markdown(["class", "what it is", "kinds of models"], _seen(lines)),
        "Called like a channel gate, not reported": markdown(["class", "kinds of models"], _unreported(lines)),
        "Models that failed": markdown(["model", "error"], _failures(lines)),
        "Results that differ": markdown(["model", *_DIFFERENCES.values()], _different(lines)),
    }
    written = (
        f"## {title}\n\n{text}" if title else text for title, text in parts.items() if text.count("\n") > 2 or not title
    )
    return "\n".join(written)


_DIFFERENCES = {
    "output_difference": "outputs, float32",
    "original_error": "original and float64",
    "replaced_error": "replaced and float64",
    "gradient_difference": "gradients, float64",
}


def _worst(lines: Iterable[Line], column: str) -> str:
    return f"{max((float(line[column]) for line in lines), default=0):.0e}"


def _summary(lines: Sequence[Line]) -> str:
    rows = []
    for library, some in [*libraries(lines).items(), ("all", list(lines))]:
        run = [line for line in some if was_run(line)]
        rows.append(
            [
                library,
                *(f"{number:,}" for number in (total(some, "architectures"), len(some), layers(some))),
                *(f"{total(some, column):,}" for column in COUNTS),
                str(len(run)),
                str(sum(map(agrees, run))),
                *(_worst(run, column) if run else "" for column in ("output_difference", "gradient_difference")),
            ]
        )
    header = ["library", "architectures", "kinds", "SE layers", "replaced", "inline", "kept", "near misses"]
    differences = ["kinds run", "equal results", "outputs differ by", "gradients differ by"]
    first = lines[0]
    where = f"{first['cpu']}, PyTorch {first['torch']}, commit {first['commit']}, {first['date']}.\n"
    return f"{markdown([*header, *differences], rows)}\n{where}"


def _parts(lines: Iterable[Line], column: str) -> dict[str, list[tuple[str, str]]]:
    """By what stands after the first space of each part of a column: what stands before it, and the model."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        for part in filter(None, line[column].split(" | ")):
            before, _, after = part.partition(" ")
            found.setdefault(after, []).append((before, f"{line['library']} {line['model']}"))
    return found


def _listed(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    rest = len(names) - _MODELS_IN_FULL
    return ", ".join(names[:_MODELS_IN_FULL]) + (f" and {rest} more" if rest > 0 else "")


def _reasons(lines: Iterable[Line], column: str) -> list[list[str]]:
    counted = [
        (sum(int(count) for count, _ in found), reason, _listed(model for _, model in found))
        for reason, found in _parts(lines, column).items()
    ]
    return [[reason, str(count), models] for count, reason, models in sorted(counted, key=lambda each: -each[0])]


def _seen(lines: Iterable[Line]) -> list[list[str]]:
    """`seen` has parts such as "EcaModule: what it is, 16 modules"."""
    rows: dict[tuple[str, str], list[str]] = {}
    for what, found in _parts(lines, "seen").items():
        for name, model in found:
            rows.setdefault((name.rstrip(":"), what.rpartition(", ")[0]), []).append(model)
    return [[*key, _listed(models)] for key, models in sorted(rows.items())]


def _unreported(lines: Iterable[Line]) -> list[list[str]]:
    rows: dict[str, list[str]] = {}
    for line in lines:
        for name in filter(None, line["unreported"].split(" | ")):
            rows.setdefault(name, []).append(f"{line['library']} {line['model']}")
    return [[name, _listed(models)] for name, models in sorted(rows.items())]


def _failures(lines: Iterable[Line]) -> list[list[str]]:
    return [[f"{line['library']} {line['model']}", line["error"]] for line in lines if line["error"]]


def _different(lines: Iterable[Line]) -> list[list[str]]:
    return [
        [f"{line['library']} {line['model']}", *(line[column] for column in _DIFFERENCES)]
        for line in disagreeing(lines)
    ]
