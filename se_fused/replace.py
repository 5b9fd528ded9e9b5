"""`replace` and `restore`: the SE layers of a model, fused where they stand.

A layer keeps its identity: `replace` only changes the object's class, as PyTorch's `fully_shard` does, to a subclass of
what it was with another `forward`. So parameters, state_dict keys, attributes, hooks, mode and references to it stay.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from . import ops
from .inside import SWAP
from .modules import SqueezeExcite
from .near_miss import float64_refusal, near_miss
from .observers import recorded, under_transform
from .recognise import recognise
from .recognised import Recognised
from .report import Report
from .swap import Swap
from .undisturbed import undisturbed


class FusedSE(nn.Module):
    """Comes before the class of a replaced layer, whose `forward` remains for calls that were not checked."""

    # None: it computes as the original does, as one that `type(layer)(...)` makes.
    _se_fused_swap: Swap | None = None

    def extra_repr(self) -> str:
        swap = self._se_fused_swap
        fused = "" if swap is None else f"fused: {swap.recognised}"
        return ", ".join(filter(None, (super().extra_repr(), fused)))

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("TorchScript cannot compile a fused SE layer: call se_fused.restore on the model first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that pickle and deepcopy cannot find it by name.
        original, swap = _original_class(self), self._se_fused_swap
        state = {name: value for name, value in vars(self).items() if name != SWAP}
        if swap is None or swap.change(self) is not None:
            return copyreg.__newobj__, (original,), state  # type: ignore[attr-defined]
        return _blank, (original, swap.recognised, swap.inplace), state

    def __setstate__(self, state: Any) -> None:
        recognised, inplace = self.__dict__.pop(SWAP)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        with contextlib.suppress(AttributeError):  # its children are not whole yet, because they refer to it
            Swap.attach(self, _original_class(self), recognised, inplace)


def _fused_forward(original: type[Any]) -> Callable[..., Any]:
    # The signature stays the original's: torch.fx, transformers and others read it.
    @functools.wraps(original.forward)
    def forward(self: FusedSE, *args: Any, **kwargs: Any) -> Any:
        # Compilers and tracers see the layer as it was written: Inductor fuses it with what stands around it, and
        # TorchScript and ONNX know its operators.
        swap = self._se_fused_swap
        if swap is not None and not recorded():
            x = swap.map_of(args, kwargs)
            weights = None if x is None else swap.weights(self, x)
            if weights is not None:
                assert x is not None
                given = (x, *weights, x if swap.recognised.residual else None, swap.options)
                if swap.inplace and not (torch.is_grad_enabled() or x.requires_grad or under_transform()):
                    # Refused before anything is written: x overlaps itself or a weight, or is an inference tensor.
                    with contextlib.suppress(ValueError):
                        return ops.call(*given, inplace=True)  # type: ignore[misc]
                return ops.call(*given)
        return original.forward(self, *args, **kwargs)

    return forward


_classes: dict[type[Any], type[FusedSE]] = {}


def _fused_class(original: type[Any]) -> type[FusedSE]:
    if original not in _classes:
        members = {"__module__": original.__module__, "forward": _fused_forward(original)}
        _classes[original] = type(f"Fused{original.__name__}", (FusedSE, original), members)
    return _classes[original]


def _original_class(layer: nn.Module) -> type[Any]:
    original = type(layer).__bases__[-1]
    if type(layer) is not _classes.get(original):
        raise RuntimeError(
            f"the class of a replaced layer was changed since, to {type(layer).__name__}: undo that first"
        )
    return original


def _blank(original: type[Any], recognised: Recognised, inplace: bool) -> FusedSE:
    """A layer of which all is to come by its __setstate__."""
    cls = _fused_class(original)
    layer = cls.__new__(cls)
    layer.__dict__[SWAP] = recognised, inplace
    return layer


def _swap(layers: dict[nn.Module, Recognised], inplace: bool) -> dict[nn.Module, str]:
    """Change the classes of layers; of those where that fails, why."""
    failed: dict[nn.Module, str] = {}
    changed: list[tuple[nn.Module, type[Any]]] = []
    for layer in layers:
        original = type(layer)
        try:
            layer.__class__ = _fused_class(original)
        except Exception as error:  # such as of its own __init_subclass__
            failed[layer] = f"its class cannot be changed: {error}"
        else:
            changed.append((layer, original))
    for layer, original in changed:  # now that no class below changes any more
        Swap.attach(layer, original, layers[layer], inplace)
    return failed


class _Examination:
    """One walk over a model: what it holds, and what of that is wanted."""

    def __init__(self, model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.include, self.exclude = include, exclude
        self.outcome: dict[nn.Module, Recognised | str] = {}
        self.seen: dict[nn.Module, bool] = {}

    def unwanted(self, layer: nn.Module) -> str | None:
        inside = [name for module in layer.modules() for name in self.names[module]]
        for pattern in self.exclude or ():
            if any(fnmatchcase(name, pattern) for name in inside):
                return f"excluded by {pattern!r}"
        if self.include is None:
            return None
        if any(fnmatchcase(name, pattern) for name in self.names[layer] for pattern in self.include):
            return None
        return "no pattern of include matches"

    def examine(self, layer: nn.Module) -> bool:
        """Whether `layer` or one inside it has an outcome: the outermost that can be replaced, else the innermost."""
        if layer not in self.seen:
            self.seen[layer] = self._examine(layer)
        return self.seen[layer]

    def _examine(self, layer: nn.Module) -> bool:
        if isinstance(layer, (FusedSE, SqueezeExcite)):
            self.outcome[layer] = "already fused"
            return True
        fused_inside = any(isinstance(module, (FusedSE, SqueezeExcite)) for module in layer.modules())
        found = None if fused_inside else recognise(layer)
        if isinstance(found, Recognised):
            found = self.unwanted(layer) or found
        elif found is not None:
            # What rounds to float32 on the way fails the comparisons in float64, and for no other reason.
            found = float64_refusal(layer) or found
        if not isinstance(found, Recognised):
            inside = [self.examine(child) for child in layer.children()]
            if any(inside):
                return True
        if found is not None:
            self.outcome[layer] = found
        return found is not None

    def near_misses(self) -> dict[nn.Module, str]:
        """The smallest modules that hold SE and have no outcome, with the reason."""
        near: dict[nn.Module, str] = {}
        settled = {module for layer in self.outcome for module in layer.modules()}
        for module in reversed(self.names):  # what is inside comes first
            if module not in settled:
                inside = any(child in settled for child in module.children())
                reason = None if inside else near_miss(module)
                if reason is not None:
                    near[module] = reason
                if inside or reason is not None:
                    settled.add(module)
        return near


def replace(
    model: nn.Module,
    *,
    inplace: bool = False,
    dry_run: bool = False,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Report:
    """Make every SE layer in `model` call `se_fused.squeeze_excite`, after a check by numbers that this is the same.

    Nothing else of the model changes; `restore` undoes it. Where one layer stands inside another one that also is SE (a
    wrapper x + SE(x)), the outermost is replaced.

    A replaced layer computes as the original does where a call or the layer is not what was checked: given a map
    of another rank, or further arguments that are not the defaults; once its inside has changed (a swapped activation,
    an adapter, a pruned or quantised weight, a hook on a module inside; it says so once); and wherever torch.compile,
    torch.export, torch.jit.trace or an ONNX exporter looks at it.

    Args:
        model: any module, also an SE layer itself.
        inplace: let the layers overwrite their input wherever grad mode is off. Only for models that do not read that
            input again.
        dry_run: report, and change nothing.
        include, exclude: shell patterns (`fnmatch`) of the dotted names of layers. A layer is replaced if one of
            `include` matches (None: any name does) and none of `exclude` matches it or a module inside it.

    Returns:
        The `Report`. `Report.model` is `model`. Its `near` misses do not depend on `include` and `exclude`.

    Raises:
        TypeError: for another kind of argument than these.
    """
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"replace: model is {got}; wanted a torch.nn.Module")
    examination = _Examination(model, _patterns("include", include), _patterns("exclude", exclude))
    with undisturbed(model):
        examination.examine(model)
        near = examination.near_misses()
    outcome = examination.outcome
    if not dry_run:
        found = {layer: each for layer, each in outcome.items() if isinstance(each, Recognised)}
        outcome.update(_swap(found, inplace))
    named = [(name, layer) for layer, names in examination.names.items() for name in names]
    found_as = {name: outcome[layer] for name, layer in named if layer in outcome}
    return Report(
        model,
        {name: found for name, found in found_as.items() if isinstance(found, Recognised)},
        {name: found for name, found in found_as.items() if isinstance(found, str)},
        {name: near[module] for name, module in named if module in near},
    )


def _patterns(argument: str, given: Any) -> Sequence[str] | None:
    patterns = (given,) if isinstance(given, str) else given
    if patterns is not None and not (
        isinstance(patterns, Sequence) and all(isinstance(pattern, str) for pattern in patterns)
    ):
        raise TypeError(f"replace: {argument} is {given!r}; wanted a pattern, a list of patterns, or None")
    return patterns


def restore(model: nn.Module) -> nn.Module:
    """Undo `replace` everywhere in `model`, and return it.

    Raises:
        RuntimeError: if the class of a replaced layer was changed again since, as by `fully_shard` on it.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedSE)]
    originals = [_original_class(layer) for layer in layers]
    for layer, original in zip(layers, originals, strict=True):
        layer.__dict__.pop(SWAP, None)
        layer.__class__ = original
    return model
