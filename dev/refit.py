"""Fits the constants of the planner's model to plans that a GPU has timed (plans_gpu.csv), and prints them in the form
of csrc/plan/model.cpp.

python -m dev.refit h200
"""

from __future__ import annotations

import csv
import ctypes
import math
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from scipy.optimize import least_squares

from se_fused import native

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PLANNERS = "planner's"
PLAN = re.compile(rf"{PLANNERS}|two_pass|cluster size=\d+ threads=\d+")  # the plans that exist today
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}  # enum DType of csrc/se.h
LINE = 5  # constants per line
# Limits that no computer can exceed; all other constants are only positive.
BOUNDS = {"cluster_efficiency": (0.5, 1), "two_pass_efficiency": (0.5, 1), "overlap": (1, 10), "tail": (0.1, 1)}
STAY = 0.1  # weight that holds a constant to its present value, so that one on which no plan depends does not change


class Model:
    """csrc/plan, compiled for the host."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "refit.so"
            sources = [ROOT / "dev/refit.cpp", *sorted((ROOT / "csrc/plan").glob("*.cpp"))]
            command = ["c++", "-std=c++17", "-O2", "-shared", "-fPIC", *map(str, sources), "-o", str(library)]
            subprocess.run(command, check=True)
            self._native = ctypes.CDLL(str(library))
        self._native.refit_predict.restype = ctypes.c_double

    def constants(self, backward: bool) -> np.ndarray:
        """The constants that are compiled in."""
        values = (ctypes.c_double * 64)()
        return np.array(values[: self._native.refit_constants(backward, values)])

    def plan(self, row: Row, backward: bool) -> int | None:
        n, c, h, w = row.shape
        sizes = [ctypes.c_int64(size) for size in (n, c, row.r, h * w)]
        number: int = self._native.refit_plan(
            row.gpu.encode(), backward, *sizes, row.channels_last, DTYPES[row.dtype], row.plan.encode()
        )
        return None if number < 0 else number

    def predict(self, plans: list[int], constants: np.ndarray) -> np.ndarray:
        """The predicted microseconds of each plan."""
        values = (ctypes.c_double * len(constants))(*constants)
        return np.array([self._native.refit_predict(plan, values) for plan in plans])


@dataclass(frozen=True)
class Row:
    """The time of one plan of a call."""

    gpu: str
    shape: tuple[int, int, int, int]
    r: int
    dtype: str
    channels_last: bool
    direction: str
    plan: str
    us: float

    @property
    def call(self) -> tuple[object, ...]:
        return self.shape, self.r, self.dtype, self.channels_last, self.direction


def preset(folder: str) -> str:
    """The name in csrc/plan/plan.cpp of the GPU whose record is in `folder`: "RTX 4090" for rtx4090."""
    names = {device.name.replace(" ", "").lower(): device.name for device in native.load_extension().device_presets()}
    if folder not in names:
        raise ValueError(f"refit: the GPU is {folder!r}; wanted one of {', '.join(names)}")
    return names[folder]


def read(gpu: str) -> list[Row]:
    """The rows of benchmarks/results/<gpu>/plans_gpu.csv whose plans can still be forced, and those of the planner."""
    name = preset(gpu)
    with (RESULTS / gpu / "plans_gpu.csv").open(newline="") as stream:
        return [
            Row(
                name, tuple(map(int, line["shape"].split("x"))), int(line["r"]), line["dtype"],  # type: ignore[arg-type]
                line["layout"] == "channels_last", line["direction"], line["plan"], float(line["p50_us"]),
            )
            for line in csv.DictReader(stream)
            if PLAN.fullmatch(line["plan"])
        ]  # fmt: skip


def names() -> list[str]:
    """The names of the constants, in their order."""
    return re.findall(r"^  double (\w+);", (ROOT / "csrc/plan/model.h").read_text(), re.MULTILINE)


def fit(
    predict: Callable[[np.ndarray], np.ndarray], measured: np.ndarray, weights: np.ndarray, first: np.ndarray
) -> np.ndarray:
    """The constants near `first` whose predictions are nearest to the measured times, in logarithms."""

    def residuals(logs: np.ndarray) -> np.ndarray:
        off = weights * np.log(predict(np.exp(logs)) / measured)
        return np.concatenate([off, STAY * (logs - np.log(first))])

    bounds = np.array([BOUNDS.get(name, (0, math.inf)) for name in names()]).T
    with np.errstate(divide="ignore"):
        low, high = np.log(bounds)
    start = np.clip(np.log(first), low + 1e-6, high - 1e-6)
    return np.exp(least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.1).x)


@dataclass(frozen=True)
class Timed:
    """The rows of one direction, and the numbers of their plans. The time of "both" is the sum of both directions."""

    rows: list[Row]
    forward: list[int]
    backward: list[int]

    @classmethod
    def of(cls, model: Model, rows: list[Row], direction: str) -> Timed:
        both = direction == "both"
        kept = []
        for row in rows:
            if row.direction == direction and row.plan != PLANNERS:
                plans = model.plan(row, False), model.plan(row, True) if both else 0
                if None not in plans:
                    kept.append((row, *plans))
        if not kept:
            raise ValueError(f"refit: no plan of {direction} was timed that can still be forced")
        return cls([k[0] for k in kept], [k[1] for k in kept], [k[2] for k in kept] if both else [])  # type: ignore[misc]

    def predict(self, model: Model, forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
        us = model.predict(self.forward, forward)
        return us + model.predict(self.backward, backward) if self.backward else us

    def measured(self) -> np.ndarray:
        return np.array([row.us for row in self.rows])

    def weights(self) -> np.ndarray:
        """Weights that are larger for plans near the fastest of their call, because other plans decide nothing."""
        fastest: dict[tuple[object, ...], float] = {}
        for row in self.rows:
            fastest[row.call] = min(row.us, fastest.get(row.call, row.us))
        return np.array([fastest[row.call] / row.us for row in self.rows]) ** 2

    def losses(self, predicted: np.ndarray) -> list[float]:
        """For each call, how much longer the plan with the fastest prediction takes than the fastest plan. Here forward
        and backward have the same plan; the planner chooses one for each."""
        calls = defaultdict(list)
        for row, us in zip(self.rows, predicted, strict=True):
            calls[row.call].append((us, row.us))
        return [min(call)[1] / min(measured for _, measured in call) - 1 for call in calls.values()]

    def say(self, name: str, predicted: np.ndarray) -> None:
        off, lost = np.abs(np.log(predicted / self.measured()))[self.weights() > 0.64], self.losses(predicted)
        typer.echo(
            f"// {name}: plans near the fastest are predicted to {np.median(off):.0%} in the median, {off.max():.0%} "
            f"at most; the choice takes {np.mean(lost):.1%} longer than the fastest plan in the mean, {max(lost):.0%} "
            f"at most, of {len(lost)} calls"
        )


def text(title: str, constants: np.ndarray) -> str:
    """The constants in the form of model.cpp."""
    lines = [f"constexpr Constants {title}{{"]
    for i in range(0, len(constants), LINE):
        values, known = constants[i : i + LINE], names()[i : i + LINE]
        lines.append(f"    {', '.join(f'{value:.3g}' for value in values)},  // {', '.join(known)}")
    return "\n".join([*lines, "};"])


def main(gpu: str) -> None:
    """Fit the model to the plans timed on GPU, the name of a folder of benchmarks/results."""
    model, rows = Model(), read(gpu)
    forward, backward = model.constants(False), model.constants(True)
    one, both = (Timed.of(model, rows, direction) for direction in ("forward", "both"))
    one.say("forward, before", one.predict(model, forward, backward))
    both.say("both, before", both.predict(model, forward, backward))
    forward = fit(lambda k: one.predict(model, k, backward), one.measured(), one.weights(), forward)
    backward = fit(lambda k: both.predict(model, forward, k), both.measured(), both.weights(), backward)
    one.say("forward, after", one.predict(model, forward, backward))
    both.say("both, after", both.predict(model, forward, backward))
    typer.echo(f"{text('kForward', forward)}\n{text('kBackward', backward)}")


if __name__ == "__main__":
    typer.run(main)
