"""What `replace` did to a model, as an object and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .blocks import ways_of_convolutions
from .blocks.neighbours import Neighbours
from .recognised import Recognised

_NAMES_IN_FULL = 4


@dataclass(frozen=True)
class Report:
    """What `replace` did. Every SE layer of `model` is named once, by its dotted name ("": `model` itself).

    replaced: what each replaced layer computes. skipped: why each other layer was left as it is. inline: for each block
    with SE written into its forward and replaced there, what each of these layers computes. near: why a module that
    `replace` cannot replace contains SE all the same, such as one that returns the gate.
    With level="block", blocks: for each replaced block, what each of its layers is computed with; alone: why each other
    replaced layer is computed alone. seen: what other channel attention than SE there is, by class.
    """

    model: nn.Module
    replaced: dict[str, Recognised]
    skipped: dict[str, str]
    inline: dict[str, tuple[Recognised, ...]] = field(default_factory=dict)
    near: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, tuple[Neighbours, ...]] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)

    def convolutions(self, x: Tensor) -> dict[str, str]:
        """Run `model` on x in inference mode, and return how each 1x1 convolution that a block computes together with
        its neighbours is computed, and why, by the name of the convolution.

        A block that computes as at level "layer" (in training mode, after a change) is not listed.

        Raises:
            ValueError: if the model is in training mode, in which a call would update its batch norms.
        """
        if self.model.training:
            raise ValueError("Report.convolutions: the model is in training mode; call model.eval() first")
        return ways_of_convolutions(self.model, x)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """All but the model, as texts that `json.dumps` takes: each field by its name."""
        return {
            "replaced": {name: str(found) for name, found in self.replaced.items()},
            "inline": {name: list(map(str, found)) for name, found in self.inline.items()},
            "skipped": self.skipped,
            "near": self.near,
            "blocks": {name: list(map(str, found)) for name, found in self.blocks.items()},
            "alone": self.alone,
            "seen": self.seen,
        }

    def raise_if_none(self) -> Report:
        """Return this report.

        Raises:
            ValueError: if no SE layer was replaced; the message is the report's text.
        """
        if not (self.replaced or self.inline):
            raise ValueError(f"replace: no SE layer of the {type(self.model).__name__} was replaced: {self}")
        return self

    def __str__(self) -> str:
        inline = {name: "; ".join(map(str, each)) for name, each in self.inline.items()}
        written, near = sum(map(len, self.inline.values())), len(self.near)
        count = len(self.replaced) + len(self.skipped) + written + near
        groups: dict[str, Mapping[str, object]] = {
            "replaced": self.replaced,
            "replaced inline, in blocks": inline,
            "skipped": self.skipped,
            "near misses": self.near,
            "with their neighbours, in blocks": {name: "; ".join(map(str, each)) for name, each in self.blocks.items()},
            "without their neighbours": self.alone,
        }
        how = f" ({written} inline)" if written else ""
        summary = f"{len(self.replaced) + written} of {count} SE layer{'s' * (count > 1)} replaced{how}"
        lines = [summary if count else "no SE layer found"]
        for title, outcome in groups.items():
            if outcome:
                lines.append(f"{title}: {len(outcome)}")
            lines += grouped(outcome)
        lines += [f"seen, not SE: {cls}: {what}" for cls, what in self.seen.items()]
        return "\n".join(lines)


def grouped(outcome: Mapping[str, object]) -> list[str]:
    """Two lines for each text in `outcome`: the text, and the names that have it."""
    names: dict[str, list[str]] = {}
    for name, what in outcome.items():
        names.setdefault(str(what), []).append(name or "(the model)")
    return [line for what, those in names.items() for line in (f"  {what}", f"      {_listed(those)}")]


def _listed(names: list[str]) -> str:
    if len(names) <= _NAMES_IN_FULL:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, ..., {names[-1]} ({len(names)} layers)"
