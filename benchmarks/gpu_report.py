"""The tables of a GPU run (benchmarks/gpu_check.py), computed from the files in its folder alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .gpu.layer import LAYOUTS
from .gpu.runner import rows_of
from .text import markdown, ratio_text

Line = dict[str, str]
DIRECTIONS = {"forward": "forward", "both": "forward + backward"}
MODES = {"graph": "in a CUDA graph", "calls": "eager calls", "training": "training step"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the benchmark, whose variants were measured in turn. `lines` are by mode and variant."""

    shape: str
    dtype: str
    layout: str
    direction: str
    lines: dict[tuple[str, str], Line]

    @property
    def n(self) -> int:
        return int(self.shape.partition("x")[0])

    def ratio(self, variant: str, mode: str = "graph") -> float | None:
        """The time of `variant` over that of fused, the median over rounds; None where it was not measured."""
        line = self.lines.get((mode, variant))
        return None if line is None else float(line["ratio_to_fused"])


@dataclasses.dataclass(frozen=True)
class Results:
    run: dict[str, Any]
    cases: list[Case]
    models: list[Line]
    plans: list[Line]
    smoke: list[Line]
    explained: dict[str, str]  # why a part failed, if that is known


def read(folder: Path) -> Results:
    """The files of a run. Raises ValueError if it names no commit, or a part failed and failures.json does not say why.

    failures.json is written by hand, beside the files; the explanations stand under the table.
    """
    run = json.loads((folder / "run.json").read_text())
    if run["dirty"] or run["commit"] == "unknown":
        raise ValueError(f"{folder / 'run.json'}: the run is of commit {run['commit']}, dirty: {run['dirty']}")
    by_hand = folder / "failures.json"
    explained = json.loads(by_hand.read_text()) if by_hand.exists() else {}
    failed = {part["part"] for part in run["parts"] if part["outcome"] == "failed"}
    *rest, smoke = (rows_of(folder / name) for name in ("models_gpu.csv", "plans_gpu.csv", "smoke.csv"))
    wrong = [line for line in smoke if not line["outcome"].startswith(("right", "refused"))]
    # Nothing excuses a wrong or a missing result.
    if failed != set(explained) or ("smoke" in failed and (wrong or not _is_whole(run, smoke))):
        raise ValueError(
            f"{folder / 'run.json'}: {', '.join(sorted(failed)) or 'nothing'} failed; "
            f"{by_hand.name} explains {', '.join(sorted(explained)) or 'nothing'}"
        )
    cases = []
    lines = rows_of(folder / "layer_gpu.csv")
    if not lines:
        raise ValueError(f"{folder / 'layer_gpu.csv'} has no rows")
    keys = ("case", "shape", "dtype", "layout", "direction")
    for key, group in itertools.groupby(lines, lambda line: tuple(line[name] for name in keys)):
        cases.append(Case(*key[1:], {(line["mode"], line["variant"]): line for line in group}))
    return Results(run, cases, *rest, smoke, explained)


def _is_whole(run: dict[str, Any], smoke: Sequence[Line]) -> bool:
    """Whether a smoke part that failed had said before that all of its cases are over."""
    (part,) = (part for part in run["parts"] if part["part"] == "smoke")
    return any(re.fullmatch(rf"{len(smoke)} of {len(smoke)} cases", line) for line in part["tail"])


def best_measured(results: Results) -> list[Case]:
    """One case per call, with the first measurement of each variant.

    A process that has run torch.compile makes calls up to twice as slow as before. A ratio still compares two times
    that were taken in turn.
    """
    found: dict[tuple[str, str, str, str], Case] = {}
    for case in results.cases:
        key = case.shape, case.dtype, case.layout, case.direction
        earlier = found[key].lines if key in found else {}
        found[key] = dataclasses.replace(case, lines={**case.lines, **earlier})
    return list(found.values())


def mean_and_range(values: Iterable[float | None]) -> str:
    """The geometric mean and the range of ratios, or nothing if one of them was not measured."""
    known = list(values)
    if not known or any(value is None for value in known):
        return ""
    numbers = [value for value in known if value is not None]
    return f"{ratio_text(statistics.geometric_mean(numbers))} ({min(numbers):.2f} to {max(numbers):.2f})"


def summary(results: Results) -> str:
    """The text on the layer by batch, layout and direction, on whole networks, and on the machine."""
    cases = best_measured(results)
    rows = []
    kinds = sorted(
        {(case.dtype, case.direction, case.layout, case.n) for case in cases},
        key=lambda kind: (kind[0] != "float16", list(DIRECTIONS).index(kind[1]), LAYOUTS.index(kind[2]), kind[3]),
    )
    kinds_of_ratio = (("eager", "calls"), ("eager",), ("compile", "calls"), ("compile",))
    for kind in kinds:
        some = [case for case in cases if (case.dtype, case.direction, case.layout, case.n) == kind]
        dtype, direction, layout, n = kind
        rows.append([
            f"{dtype} {layout}, {DIRECTIONS[direction]}{f' ({len(some)} of 6)' * (len(some) < 6)}", str(n),
            *(mean_and_range(case.ratio(*of) for case in some) for of in kinds_of_ratio),
            mean_and_range(case.ratio("copy") for case in some).replace("**", ""),
        ])  # fmt: skip
    header = [
        "six shapes, geometric mean (range)", "N", "eager / fused, as calls", "eager / fused, in a graph",
        "torch.compile / fused, as calls", "torch.compile / fused, in a graph", "copy / fused",
    ]  # fmt: skip
    parts = [markdown(header, rows), _networks(results.models), _findings(results), _machine(results)]
    return "\n".join(part for part in parts if part)


def _networks(models: Sequence[Line]) -> str:
    ratios = {(m["model"], m["n"], m["mode"]): m for m in models if m["variant"] == "original"}
    blocks = {(m["model"], m["n"], m["mode"]): m for m in models if m["variant"] == "block"}
    block_modes = [mode for mode in MODES if any(of == mode for *_, of in blocks)]
    rows = []
    for name, n in dict.fromkeys((name, n) for name, n, _ in sorted(ratios, key=lambda k: (k[0], int(k[1])))):
        cells = [ratios.get((name, n, mode)) for mode in MODES]
        layers = next(cell["se_layers"] for cell in cells if cell is not None)
        row = [f"{name} ({layers} SE layers)", n, *(ratio_text(c and float(c["ratio_to_fused"])) for c in cells)]
        for mode in block_modes:
            original, block = (of.get((name, n, mode)) for of in (ratios, blocks))
            both = original and block
            row.append(ratio_text(float(original["p50_ms"]) / float(block["p50_ms"]) if both else None))
        rows.append(row)
    header = ["network: original / fused", "N", *MODES.values()]
    header += [f"original / block, {MODES[mode]}, of medians" for mode in block_modes]
    return markdown(header, rows) if rows else ""


def _findings(results: Results) -> str:
    """Sentences on the calls in which another of our own ways was faster than the chosen one."""
    fastest: dict[tuple[str, ...], float] = {}
    for line in results.plans:
        call = line["shape"], line["dtype"], line["layout"], line["direction"]
        fastest[call] = min(fastest.get(call, math.inf), float(line["ratio_to_planner"]))
    beaten = sum(ratio < 0.95 for ratio in fastest.values())
    found = []
    if fastest:
        found.append(f"Another plan than the planner's was more than 5 % faster at {beaten} of {len(fastest)} calls.")
    triton = [ratio for case in results.cases if (ratio := case.ratio("triton")) is not None]
    if triton:
        found.append(
            f"The Triton kernels took {min(triton):.2f} to {max(triton):.2f} of the CUDA kernels' time, at the "
            f"{len(triton)} calls where both were timed."
        )
    return "".join(f"{sentence}\n" for sentence in found)


def _machine(results: Results) -> str:
    """The paragraph on the machine, on what was compared, and on how it was measured."""
    run = results.run
    right = sum(line["outcome"] == "right" for line in results.smoke)
    reasons = {part["part"]: part["reason"] for part in run["parts"] if part["outcome"] == "passed"}
    tests = re.match(r"\d+ passed", reasons.get("tests", ""))
    cut = {name: match for name, reason in reasons.items() if (match := re.match(r"(\d+) of (\d+) cases", reason))}
    short = [f"{name} {match[0]}" for name, match in cut.items() if match[1] != match[2]]
    return (
        f"{run['gpu']}, driver {run['driver']}, PyTorch {run['torch']}, commit {run['commit']}, {run['date'][:10]}. "
        f"{right} calls right and none wrong beside float64{f', GPU tests: {tests[0]}' if tests else ''}"
        f"{'; in part: ' * bool(short)}{', '.join(short)}. An empty cell was not measured. In a graph, caches are "
        "cold: buffers rotate over more than the L2 holds, and the outputs in the first and the last of the timed "
        "buffers are compared with float64. As calls, the time is the wall clock of a Python loop. The copy is an "
        "elementwise kernel that reads and writes the bytes that no implementation can do without. Networks run on "
        "images of 224 pixels, in channels_last; inference is in float16, training in bfloat16 autocast.\n"
    ) + "".join(f"\nFailed in this run, {part}: {why}\n" for part, why in results.explained.items())


def layers(results: Results) -> str:
    """The table of every call."""
    tables = []
    cases = best_measured(results)
    for dtype, direction, layout in itertools.product(("float16", "float32"), DIRECTIONS, LAYOUTS):
        rows = []
        for case in cases:
            if (case.dtype, case.direction, case.layout) != (dtype, direction, layout):
                continue
            fused = case.lines["graph", "fused"]
            rows.append([
                case.shape, f"{fused['p50_us']} ({fused['p20_us']} to {fused['p80_us']})", fused["gb_s"],
                ratio_text(case.ratio("copy")).replace("**", ""),
                *(ratio_text(case.ratio(name)) for name in ("eager", "compile", "triton")),
                case.lines["calls", "fused"]["p50_us"], ratio_text(case.ratio("eager", "calls")), fused["error"],
            ])  # fmt: skip
        header = [
            "x", "fused µs (p20 to p80)", "GB/s", "copy / fused", "eager / fused", "torch.compile / fused",
            "Triton / fused", "fused as calls µs", "eager / fused as calls", "error",
        ]  # fmt: skip
        if rows:
            tables.append(f"{dtype}, {layout}, {DIRECTIONS[direction]}:\n\n{markdown(header, rows)}")
    return "\n".join(tables)
