"""What a replaced layer knows of its proof: for which calls it holds, with which weights, and whether still."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import Tensor, nn

from .inside import Inside
from .memory import PLAIN
from .recognise import Recognised

_log = logging.getLogger("se_fused")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Types whose equal values are the same to a program.
_VALUES = (bool, int, float, str, tuple)


class Swap:
    """Of a layer whose class was `original`: what it is `recognised` as. It holds no reference to the layer itself."""

    def __init__(self, layer: nn.Module, original: type[Any], recognised: Recognised, inplace: bool) -> None:
        self.recognised, self.inplace, self.options = recognised, inplace, recognised.options()
        self._original, self._forward = original, original.forward
        self._inside = Inside(layer)
        self._places = [_place(layer, name) for name in (recognised.w1, recognised.b1, recognised.w2, recognised.b2)]
        _, *parameters = inspect.signature(original.forward).parameters.values()
        self._arguments = [p.name for p in parameters if p.kind in _POSITIONAL]
        self._defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        self._said = False

    def map_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """x, if the call is one that was proven: of x alone, or beside it of what `forward` takes by default."""
        if len(args) == 1 and not kwargs:
            x = args[0]
        elif len(args) > len(self._arguments) or not self._arguments:
            return None
        else:
            given = dict(zip(self._arguments, args, strict=False)) | kwargs
            if len(given) < len(args) + len(kwargs):  # one of them twice
                return None
            x = given.pop(self._arguments[0], None)
            if not all(name in self._defaults and _same(v, self._defaults[name]) for name, v in given.items()):
                return None
        return x if type(x) in PLAIN and x.dim() in self.recognised.dims else None

    def weights(self, layer: nn.Module) -> Any:
        """[w1, b1, w2, b2] as they are now; None, which is said once, if the proof does not hold any more."""
        if self._original.forward is self._forward and self._inside.holds(layer):
            weights = [parameters[name] for parameters, name, _ in self._places]
            if all(type(w) in types for w, (_, _, types) in zip(weights, self._places)):  # noqa: B905
                return weights
        if not self._said:
            self._said = True
            name, change = self._original.__name__, self.change(layer)
            _log.warning("se_fused: a replaced %s computes as it did before `replace`: %s", name, change)
        return None

    def change(self, layer: nn.Module) -> str | None:
        """Why the proof does not hold any more; None if it does."""
        if self._original.forward is not self._forward:
            return f"the forward of {self._original.__name__} was replaced"
        change = self._inside.change(layer)
        if change is None and not all(type(parameters[name]) in types for parameters, name, types in self._places):
            return "a weight of it is no plain parameter any more"
        return change


def _place(layer: nn.Module, name: str | None) -> tuple[dict[str, Any], str, tuple[type, ...]]:
    """Where a parameter lies, under which name, and the types of what may lie there. A bias may go."""
    if name is None:
        return {"": None}, "", (type(None),)
    path, _, leaf = name.rpartition(".")
    named = layer.get_submodule(path)._parameters
    is_matrix = layer.get_parameter(name).dim() > 1
    return named, leaf, PLAIN if is_matrix else (*PLAIN, type(None))


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and isinstance(value, _VALUES) and value == default)
