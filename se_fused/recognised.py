"""`Recognised`: what `recognise` finds out about an SE layer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .options import HardSigmoid, Options
from .weights import WeightReader


@dataclass(frozen=True)
class Recognised:
    """What an SE layer computes, in the terms of `se_fused.squeeze_excite`.

    layer: the name of its class. channels, hidden: C and R; in the one-FC form `hidden` and `act` are None.
    residual: whether the layer returns x * (1 + s). dims: the numbers of dimensions of x for which this was checked.
    w1, b1, w2, b2: the dotted names of the parameters below the layer; None for a parameter that it does not have.
    norms: the batch norms between them, each as its place (`weights.PLACES`) and its dotted name.
    apart: those of b1 and b2 that are added after a layer without a bias, not by it.
    is_doubled: whether its gate is 2 * sigmoid.
    channels_last: whether its maps are [N, *spatial, C].
    """

    layer: str
    channels: int
    hidden: int | None
    act: str | None
    gate: str | HardSigmoid
    squeeze: str
    residual: bool
    dims: tuple[int, ...]
    w1: str | None
    b1: str | None
    w2: str
    b2: str | None
    norms: tuple[tuple[str, str], ...] = ()
    apart: tuple[str, ...] = ()
    is_doubled: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        width = f"C={self.channels}" + (f", R={self.hidden}, {self.act}" if self.hidden else ", one layer")
        gate = "hard_sigmoid({:.4g}, {:.4g})".format(*self.gate) if isinstance(self.gate, HardSigmoid) else self.gate
        gate = f"2 * {gate}" if self.is_doubled else gate
        extras = {
            f"squeeze {self.squeeze}": self.squeeze != "mean",
            "residual": self.residual,
            "batch norm folded in eval mode": bool(self.norms),
            "channels last": self.channels_last,
        }
        named = [extra for extra, has in extras.items() if has]
        return ", ".join([f"{self.layer}: {width}", gate, *named])

    def __rich__(self) -> str:
        return str(self)

    def weights(self, layer: nn.Module) -> list[Any]:
        """w1, b1, w2, b2 as the operation takes them and `layer` has them now. Its batch norms are in eval mode."""
        reader = WeightReader(layer, self)
        weights = reader(vars(layer))
        assert weights is not None
        folded = reader.fold(weights, sys.maxsize)
        assert folded is not None
        return folded

    def options(self) -> Options:
        """The options of the call. The one-FC form has no act, and does not use the one that is named here."""
        return Options.of(self.act or "identity", self.gate, self.squeeze)

    def as_map(self, x: Tensor) -> Tensor:
        """A map of the layer as one [N, C, *spatial]."""
        return x.movedim(-1, 1) if self.channels_last else x

    def of_layer(self, x: Tensor) -> Tensor:
        """A map [N, C, *spatial] as one of the layer."""
        return x.movedim(1, -1) if self.channels_last else x
