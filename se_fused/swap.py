"""What a replaced layer knows of the check that it passed: for which calls, with which weights, and whether still."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .inside import SWAP, Inside
from .memory import PLAIN
from .recognised import Recognised

_log = logging.getLogger("se_fused")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Types whose equal values are the same to a program.
_VALUES = (bool, int, float, str, tuple)


class Swap:
    """Of a layer whose class was `original`: what it is `recognised` as. It holds no reference to the layer itself."""

    @classmethod
    def attach(cls, layer: nn.Module, original: type[Any], recognised: Recognised, inplace: bool) -> None:
        """Give `layer` its own, past a __setattr__ that it may define."""
        attributes = vars(layer)
        attributes[SWAP] = None  # so that it is counted among them
        attributes[SWAP] = cls(layer, original, recognised, inplace)

    def __init__(self, layer: nn.Module, original: type[Any], recognised: Recognised, inplace: bool) -> None:
        self.recognised, self.inplace, self.options = recognised, inplace, recognised.options()
        self._name = original.__name__
        self._inside = Inside(layer, original)
        self._places = [_place(layer, name) for name in (recognised.w1, recognised.b1, recognised.w2, recognised.b2)]
        _, *parameters = inspect.signature(original.forward).parameters.values()
        self._arguments = [p.name for p in parameters if p.kind in _POSITIONAL]
        self._defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        self._said = False

    def map_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """x, if the call is one that was checked: of x alone, or beside it of what `forward` takes by default."""
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

    def weights(self, layer: nn.Module, x: Tensor) -> Any:
        """[w1, b1, w2, b2] as they are now; None where x is of another dtype, or, said once, where the check does not
        hold any more."""
        if self._inside.holds(layer):
            weights = [place(layer) for place, _ in self._places]
            if all(type(w) in types for w, (_, types) in zip(weights, self._places)):  # noqa: B905
                return weights if self._is_of_one_dtype(x, weights) else None
        if not self._said:
            self._said = True
            _log.warning(
                "se_fused: a replaced %s computes as it did before `replace`: %s", self._name, self.change(layer)
            )
        return None

    def _is_of_one_dtype(self, x: Tensor, weights: list[Any]) -> bool:
        """Whether casts in the original, which the check in one dtype cannot see, would do nothing."""
        dtypes = {w.dtype for w in weights if w is not None}
        if dtypes == {x.dtype}:
            return True
        device = x.device.type
        return (
            len(dtypes) == 1
            and torch.amp.is_autocast_available(device)
            and torch.is_autocast_enabled(device)
            and x.dtype is torch.get_autocast_dtype(device)
        )

    def change(self, layer: nn.Module) -> str | None:
        """Why the check does not hold any more; None if it does."""
        change = self._inside.change(layer)
        if change is None and not all(type(place(layer)) in types for place, types in self._places):
            return "a weight of it is no plain parameter any more"
        return change

    def __deepcopy__(self, memo: Any) -> None:
        # It is of one layer. `FusedSE` makes another for a copy of it; who copies past that gets an original layer.
        return None


def _place(layer: nn.Module, name: str | None) -> tuple[Callable[[nn.Module], Any], tuple[type, ...]]:
    """Where to find a parameter, and the types of what may lie there. A bias may go."""
    if name is None:
        return (lambda layer: None), (type(None),)
    path, _, leaf = name.rpartition(".")
    types = PLAIN if layer.get_parameter(name).dim() > 1 else (*PLAIN, type(None))
    if not path:
        return (lambda layer: layer._parameters[leaf]), types
    attributes = vars(layer.get_submodule(path))
    return (lambda layer: attributes["_parameters"][leaf]), types


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and isinstance(value, _VALUES) and value == default)
