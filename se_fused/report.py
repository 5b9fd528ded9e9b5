"""What `replace` did to a model, as an object and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from .blocks import ways_of_convolutions
from .blocks.neighbours import Neighbours
from .recognised import Recognised

_NAMES_IN_FULL = 4


@dataclass(frozen=True)
class Report:
    """What `replace` did. Every SE layer of `model` is named once, by its dotted name ("": `model` itself).

    replaced: what each replaced layer computes. skipped: why each other layer was left as it is. near: why a module
    that `replace` cannot replace contains SE all the same, such as a block with SE written into its forward.
    With level="block", blocks: for each replaced block, what each of its layers is computed with; alone: why each other
    replaced layer is computed alone.
    """

    model: nn.Module
    replaced: dict[str, Recognised]
    skipped: dict[str, str]
    near: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, tuple[Neighbours, ...]] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)

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

    def __str__(self) -> str:
        groups: dict[str, Mapping[str, object]] = {
            "replaced": self.replaced,
            "skipped": self.skipped,
            "near misses": self.near,
        }
        count = sum(map(len, groups.values()))
        groups |= {
            "with their neighbours, in blocks": {name: "; ".join(map(str, each)) for name, each in self.blocks.items()},
            "without their neighbours": self.alone,
        }
        if count == 0:
            return "no SE layer found"
        lines = [f"{len(self.replaced)} of {count} SE layer{'s' * (count > 1)} replaced"]
        for title, outcome in groups.items():
            if outcome:
                lines.append(f"{title}: {len(outcome)}")
            lines += grouped(outcome)
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
