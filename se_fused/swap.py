"""What a replaced module keeps of the check that it passed: for which calls and weights it holds; if it still does."""

from __future__ import annotations

import contextlib
import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .inside import SWAP, Inside
from .memory import PLAIN_TYPES
from .observers import under_transform
from .options import Options
from .recognised import Recognised
from .weights import WeightReader

_log = logging.getLogger("se_fused")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Types whose equal values are interchangeable.
_VALUE_TYPES = (bool, int, float, str, tuple)


class Swap:
    """What a module, whose class was `original`, was found to compute. It holds no reference to the module itself.

    facts: the further arguments of `attach`, from which a copy of the module gets a Swap of its own.
    """

    dims: tuple[int, ...]  # the numbers of dimensions of x for which the module was checked

    @classmethod
    def attach(cls, module: nn.Module, original: type[Any], *facts: Any) -> None:
        """Give `module` a Swap of its own, without a call of a __setattr__ that it may define."""
        attributes = vars(module)
        attributes[SWAP] = None  # so that the snapshot counts this attribute too
        attributes[SWAP] = cls(module, original, *facts)

    def __init__(self, module: nn.Module, original: type[Any], *facts: Any) -> None:
        self.facts = facts
        self._name = original.__name__
        self._inside = Inside(module, original)
        _, *parameters = inspect.signature(original.forward).parameters.values()
        self._arguments = [p.name for p in parameters if p.kind in _POSITIONAL]
        self._defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        self._warned = False

    def arguments_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]] | None:
        """x, and the other arguments that were given, by name; None if the check does not cover a call with this x."""
        given: dict[str, Any] = {}
        if len(args) == 1 and not kwargs:
            x = args[0]
        elif len(args) > len(self._arguments) or not self._arguments:
            return None
        else:
            given = dict(zip(self._arguments, args, strict=False)) | kwargs
            if len(given) < len(args) + len(kwargs):  # an argument is given twice
                return None
            x = given.pop(self._arguments[0], None)
        return (x, given) if type(x) in PLAIN_TYPES and x.dim() in self.dims else None

    def map_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """x, if it is the only argument, or if all others are equal to the defaults of `forward`; else None."""
        found = self.arguments_of(args, kwargs)
        if found is None:
            return None
        x, given = found
        if given and not all(name in self._defaults and is_same(v, self._defaults[name]) for name, v in given.items()):
            return None
        return x

    def warn_once(self, module: nn.Module) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "se_fused: a replaced %s computes as it did before `replace`: %s", self._name, self.change(module)
            )

    def change(self, module: nn.Module) -> str | None:
        """Why the check does not hold any more; None if it does."""
        return self._inside.change(module)

    def __deepcopy__(self, memo: Any) -> None:
        # A Swap belongs to one module. `Replaced` makes another for a copy of the module; a copy made without it
        # computes as the original does.
        return None


class LayerSwap(Swap):
    """What an SE layer is `recognised` as; `inplace`: whether it may overwrite its input."""

    def __init__(self, layer: nn.Module, original: type[Any], recognised: Recognised, inplace: bool) -> None:
        super().__init__(layer, original, recognised, inplace)
        self.recognised, self.inplace, self.options = recognised, inplace, recognised.options()
        self.dims = recognised.dims
        self._reader = WeightReader(layer, recognised)

    def weights(self, layer: nn.Module, x: Tensor) -> Any:
        """[w1, b1, w2, b2] as the operation takes them; None if the layer must compute x as it did before.

        It is logged once if the reason is that the check does not hold any more.
        """
        if self._inside.unchanged(layer):
            weights = self._reader(vars(layer))
            if weights is not None:
                return self._reader.fold(weights, x.numel()) if self._reader.accepts(x, weights) else None
        self.warn_once(layer)
        return None

    def change(self, layer: nn.Module) -> str | None:
        change = super().change(layer)
        if change is None and self._reader(vars(layer)) is None:
            return "one of its weights is not a plain parameter any more"
        return change


def compute(x: Tensor, weights: list[Any], recognised: Recognised, options: Options, inplace: bool) -> Tensor:
    """What an SE layer with these weights computes; inplace: it may overwrite x."""
    x, y = recognised.as_map(x), None
    given = (x, *weights, x if recognised.residual else None, options)
    if inplace and not (torch.is_grad_enabled() or x.requires_grad or under_transform()):
        # ValueError, raised before anything is written: x overlaps itself or a weight, or is an inference tensor.
        # Then the call is not made in place.
        with contextlib.suppress(ValueError):
            y = ops.call(*given, inplace=True)  # type: ignore[misc]
    if y is None:
        y = ops.call(*given)
    if recognised.is_doubled:  # in a pass of its own, which is exact
        y = y * 2 if y.requires_grad else y.mul_(2)
    return recognised.of_layer(y)


def is_same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and isinstance(value, _VALUE_TYPES) and value == default)
