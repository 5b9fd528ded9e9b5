"""`Recognised`: what `recognise` finds out about an SE layer."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor, nn

from .options import HardSigmoid, Options


@dataclass(frozen=True)
class Recognised:
    """What an SE layer computes, in the terms of `se_fused.squeeze_excite`.

    layer: the name of its class. channels, hidden: C and R; in the one-FC form `hidden` and `act` are None.
    residual: whether the layer returns x * (1 + s). dims: the numbers of dimensions of x for which this was checked.
    w1, b1, w2, b2: the dotted names of the parameters below the layer; None for a parameter that it does not have.
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

    def __str__(self) -> str:
        width = f"C={self.channels}" + (f", R={self.hidden}, {self.act}" if self.hidden else ", one layer")
        gate = "hard_sigmoid({:.4g}, {:.4g})".format(*self.gate) if isinstance(self.gate, HardSigmoid) else self.gate
        extra = ("" if self.squeeze == "mean" else f", squeeze {self.squeeze}") + (
            ", residual" if self.residual else ""
        )
        return f"{self.layer}: {width}, {gate}{extra}"

    def __rich__(self) -> str:
        return str(self)

    def weights(self, layer: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """w1, b1, w2, b2 as `layer` has them now."""
        w1, b1, b2 = (None if name is None else attrgetter(name)(layer) for name in (self.w1, self.b1, self.b2))
        return w1, b1, attrgetter(self.w2)(layer), b2

    def options(self) -> Options:
        """The options of the call. The one-FC form has no act, and does not use the one that is named here."""
        return Options.of(self.act or "identity", self.gate, self.squeeze)
