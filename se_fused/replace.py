"""`replace` and `restore`: the SE layers of a model, fused where they stand.

A layer keeps its identity: `replace` only changes the object's class, as PyTorch's `fully_shard` does, to a subclass of
what it was with another `forward`. So parameters, state_dict keys, attributes, hooks, mode and references to it stay.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .modules import SqueezeExcite
from .ops import squeeze_excite
from .recognise import Recognised, recognise


@dataclass(frozen=True)
class Report:
    """What `replace` did. Every SE layer of `model` is named in `replaced` or, with the reason, in `skipped`."""

    model: nn.Module
    replaced: dict[str, Recognised]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for title, outcome in (("replaced", self.replaced), ("skipped", self.skipped)):
            if outcome:
                rows = [(name or "(the model)", what) for name, what in outcome.items()]
                width = max(len(name) for name, _ in rows)
                lines.append(f"{len(outcome)} {title}")
                lines += [f"  {name:{width}}  {what}" for name, what in rows]
        return "\n".join(lines) or "no SE layer found"


class FusedSE(nn.Module):
    """Comes before the class of a replaced layer, whose `forward` remains for calls that were not proven equal:
    with further arguments, or with a map of another rank."""

    _se_recognised: Recognised
    _se_inplace: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        se = self._se_recognised
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].dim() not in se.dims:
            return super().forward(*args, **kwargs)
        x = args[0]
        return squeeze_excite(
            x,
            *se.weights(self),
            residual=x if se.residual else None,
            inplace=self._se_inplace and not torch.is_grad_enabled(),
            **se.options(),
        )

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"fused: {self._se_recognised}")))

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("TorchScript cannot compile a fused SE layer: call se_fused.restore on the model first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that pickle and deepcopy cannot find it by name.
        state = super().__reduce_ex__(2)[2]
        return _blank, (_original_class(self),), state


_classes: dict[type[Any], type[FusedSE]] = {}


def _fused_class(original: type[Any]) -> type[FusedSE]:
    if original not in _classes:
        _classes[original] = type(f"Fused{original.__name__}", (FusedSE, original), {"__module__": original.__module__})
    return _classes[original]


def _original_class(layer: nn.Module) -> type[Any]:
    original = type(layer).__bases__[-1]
    if type(layer) is not _classes.get(original):
        raise RuntimeError(
            f"the class of a replaced layer was changed since, to {type(layer).__name__}: undo that first"
        )
    return original


def _blank(original: type[Any]) -> FusedSE:
    cls = _fused_class(original)
    return cls.__new__(cls)


def replace(
    model: nn.Module,
    *,
    inplace: bool = False,
    dry_run: bool = False,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Report:
    """Make every SE layer in `model` call `se_fused.squeeze_excite`, after a proof by numbers that this is the same.

    Nothing else of the model changes; `restore` undoes it. Where one layer stands inside another one that also is SE (a
    wrapper x + SE(x)), the outermost is replaced. A layer computes as before where the call is not the one proven
    equal: given further arguments (a mask) or a map of another rank. Hooks on modules inside a layer that are
    registered later are not called until `restore`.

    Args:
        model: any module, also an SE layer itself.
        inplace: let the layers overwrite their input wherever grad mode is off. Only for models that do not read that
            input again.
        dry_run: report, and change nothing.
        include, exclude: shell patterns (`fnmatch`) of the dotted names of layers. A layer is replaced if one of
            `include` matches (None: any name does) and none of `exclude` matches it or a module inside it.

    Returns:
        The `Report`. `Report.model` is `model`.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    includes, excludes = _patterns(include), _patterns(exclude)
    outcome: dict[nn.Module, Recognised | str] = {}

    def unwanted(layer: nn.Module) -> str | None:
        inside = [name for module in layer.modules() for name in names[module]]
        for pattern in excludes or ():
            if any(fnmatchcase(name, pattern) for name in inside):
                return f"excluded by {pattern!r}"
        if includes is None or any(fnmatchcase(name, pattern) for name in names[layer] for pattern in includes):
            return None
        return "no pattern of include matches"

    @functools.cache
    def examine(layer: nn.Module) -> bool:
        """Whether `layer` or one inside it gets named in the report."""
        if isinstance(layer, (FusedSE, SqueezeExcite)):
            outcome[layer] = "already fused"
            return True
        fused_inside = any(isinstance(module, (FusedSE, SqueezeExcite)) for module in layer.modules())
        found = None if fused_inside else recognise(layer)
        if isinstance(found, Recognised):
            found = unwanted(layer) or found
        if not isinstance(found, Recognised):
            inside = [examine(child) for child in layer.children()]
            if any(inside):
                return True
        if found is not None:
            outcome[layer] = found
        return found is not None

    examine(model)
    if not dry_run:
        for layer, found in outcome.items():
            if isinstance(found, Recognised):
                layer._se_recognised, layer._se_inplace = found, inplace  # type: ignore[assignment]
                layer.__class__ = _fused_class(type(layer))
    named = [(name, outcome[layer]) for layer, its_names in names.items() if layer in outcome for name in its_names]
    return Report(
        model,
        {name: found for name, found in named if isinstance(found, Recognised)},
        {name: found for name, found in named if isinstance(found, str)},
    )


def _patterns(given: str | Sequence[str] | None) -> Sequence[str] | None:
    return (given,) if isinstance(given, str) else given


def restore(model: nn.Module) -> nn.Module:
    """Undo `replace` everywhere in `model`, and return it.

    Raises:
        RuntimeError: if the class of a replaced layer was changed again since, as by `fully_shard` on it.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedSE)]
    originals = [_original_class(layer) for layer in layers]
    for layer, original in zip(layers, originals, strict=True):
        del layer._se_recognised, layer._se_inplace
        layer.__class__ = original
    return model
