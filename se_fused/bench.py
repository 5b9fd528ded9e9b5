"""What `se_fused.replace` brings for one model on this machine, for `python -m se_fused bench`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import measure, timing
from .replace import replace
from .report import Report
from .timing import Spread

# How each variant is made, as the arguments of se_fused.replace.
VARIANTS: dict[str, dict[str, Any]] = {"layer": {}, "in place": {"inplace": True}, "block": {"level": "block"}}
CALLS = {
    "layer": "replace(model)",
    "in place": "replace(model, inplace=True)",
    "block": 'replace(model, level="block")',
}
ORIGINAL = "original"
LEAST_GAIN = 1.02  # less would not be worth a change


@dataclass(frozen=True)
class Result:
    """A variant at one batch size. speed: the time of the model as it is over that of the variant, taken round by
    round. found: what `measure.compared` says of its output."""

    batch: int
    variant: str
    milliseconds: Spread
    speed: Spread
    rounds: int
    others: float
    found: Mapping[str, Any]

    @property
    def gains(self) -> bool:
        """Whether it gives the model's output, and in 80 % of the rounds is faster by LEAST_GAIN."""
        return self.variant != ORIGINAL and bool(self.found["equal"]) and self.speed.p20 > LEAST_GAIN

    def as_dict(self) -> dict[str, Any]:
        """All numbers, as `json.dumps` takes them."""
        return {
            "batch": self.batch, "variant": self.variant, "milliseconds": self.milliseconds._asdict(),
            "speed": self.speed._asdict(), "rounds": self.rounds, "others": self.others,
            "equal": bool(self.found["equal"]), "verdict": self.found["verdict"],
        }  # fmt: skip


def variants(model: nn.Module, progress: Callable[[float], None]) -> tuple[dict[str, nn.Module], Report]:
    """The model, in eval mode, and a copy of it for each entry of VARIANTS; and the report of the first.

    progress: is told the share of the work that is done.
    """
    reports = []
    for how in VARIANTS.values():
        reports.append(replace(copy.deepcopy(model), **how))
        progress(len(reports) / len(VARIANTS))
    made = {name: report.model for name, report in zip(VARIANTS, reports, strict=True)}
    return {ORIGINAL: model, **made}, reports[0]


class DoesNotRepeat(RuntimeError):
    """Two calls of one model give different outputs, so that those of two models cannot be compared."""


def run(
    models: Mapping[str, nn.Module], x: Tensor, seconds: float, progress: Callable[[float], None]
) -> Iterator[Result]:
    """Compare the outputs for x, and time the models in turn for about `seconds`.

    progress: is told the share of the work that is done.

    Raises:
        ValueError: if no tensor is found in the output.
        DoesNotRepeat: if the original's output is another one when it is called again.
    """
    # Each has its own input, because some write to it: layers in place, and some models.
    inputs = {name: x.clone() for name in models}

    def call(name: str) -> object:
        y = models[name](inputs[name])
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)
        return y

    with torch.inference_mode():
        wanted = tree_map(lambda y: y.clone() if isinstance(y, Tensor) else y, call(ORIGINAL))
        inputs[ORIGINAL].copy_(x)
        found = {name: measure.compared(call(name), wanted) for name in models}
        if not found[ORIGINAL]["equal"] and math.isfinite(found[ORIGINAL]["scale"]):
            raise DoesNotRepeat("the model gives another output when it is called again: nothing can be compared")
        del wanted
        calls = [timing.Variant(name, partial(call, name), restore=partial(inputs[name].copy_, x)) for name in models]
        measured = timing.measure(calls, seconds, limit=1, progress=progress)
    for name, times in measured.times.items():
        milliseconds = timing.spread([t / 1e3 for t in times])
        speed = timing.ratio_spread(measured.times, ORIGINAL, name)
        yield Result(x.shape[0], name, milliseconds, speed, len(times), measured.others, found[name])


def table(results: Iterable[Result], title: str) -> Table:
    calls = "; ".join(f"{name}: {call}" for name, call in CALLS.items())
    rows = Table(title=title, caption=f"{calls}. Medians, and the range of the middle 60 % of the rounds.")
    for column in ("batch", "variant", "ms", "times as fast", "output"):
        rows.add_column(column)
    last = None
    for result in results:
        if last is not None and result.batch != last:
            rows.add_section()
        last = result.batch
        cells = [str(result.batch), result.variant, timing.text(result.milliseconds, result.rounds)]
        if result.variant != ORIGINAL:
            output = "equal" if result.found["equal"] else result.found["verdict"]
            cells += [timing.text(result.speed, result.rounds), output]
        rows.add_row(*cells)
    return rows


def verdict(results: Sequence[Result]) -> str:
    """One sentence per batch size, behind another if the machine was busy."""
    others = max(result.others for result in results)
    sentences = []
    if others > timing.QUIET:
        sentences.append(f"Other processes used {others:.0%} of the CPU, so do not trust this: measure again.")
    for batch in dict.fromkeys(result.batch for result in results):
        gains = [result for result in results if result.batch == batch and result.gains]
        if gains:
            best = max(gains, key=lambda result: result.speed.p50)
            speed = timing.text(best.speed, best.rounds)
            sentences.append(f"At batch {batch}, {CALLS[best.variant]} makes the model {speed} times as fast.")
        else:
            sentences.append(
                f"At batch {batch}, no variant with an equal output is faster by 2 % in 80 % of the rounds."
            )
    return " ".join(sentences)
