"""`replace` and `restore`: they fuse the SE layers of a model in place, and undo it.

A layer keeps its identity: as PyTorch's `fully_shard` does, `replace` only changes the object's class, to a subclass of
the original class with another `forward`. So parameters, state_dict keys, attributes, hooks, mode and references to the
layer stay the same.
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
    """The first base of a replaced layer's class. The second is the original class, whose `forward` runs the calls that
    were not checked."""

    # None: the layer computes as the original does, for example if it was made by `type(layer)(...)`.
    _se_fused_swap: Swap | None = None

    def extra_repr(self) -> str:
        swap = self._se_fused_swap
        fused = "" if swap is None else f"fused: {swap.recognised}"
        return ", ".join(filter(None, (super().extra_repr(), fused)))

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("TorchScript cannot compile a fused SE layer: call se_fused.restore on the model first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle and deepcopy cannot find the class by name, because it is made at run time.
        original, swap = _original_class(self), self._se_fused_swap
        state = {name: value for name, value in vars(self).items() if name != SWAP}
        if swap is None or swap.change(self) is not None:
            return copyreg.__newobj__, (original,), state  # type: ignore[attr-defined]
        return _blank, (original, swap.recognised, swap.inplace), state

    def __setstate__(self, state: Any) -> None:
        recognised, inplace = self.__dict__.pop(SWAP)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        with contextlib.suppress(AttributeError):  # from a child that refers to this layer, and is not complete yet
            Swap.attach(self, _original_class(self), recognised, inplace)


def _fused_forward(original: type[Any]) -> Callable[..., Any]:
    # functools.wraps keeps the signature of the original, which torch.fx, transformers and others read.
    @functools.wraps(original.forward)
    def forward(self: FusedSE, *args: Any, **kwargs: Any) -> Any:
        # Compilers and tracers see the layer as it was written: Inductor fuses it with the operators around it, and
        # TorchScript and ONNX know its operators.
        swap = self._se_fused_swap
        if swap is not None and not recorded():
            x = swap.map_of(args, kwargs)
            weights = None if x is None else swap.weights(self, x)
            if weights is not None:
                assert x is not None
                given = (x, *weights, x if swap.recognised.residual else None, swap.options)
                if swap.inplace and not (torch.is_grad_enabled() or x.requires_grad or under_transform()):
                    # ValueError, raised before anything is written: x overlaps itself or a weight, or is an inference
                    # tensor. Then the call is not made in place.
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
            f"the class of a replaced layer was changed afterwards, to {type(layer).__name__}: undo that first"
        )
    return original


def _blank(original: type[Any], recognised: Recognised, inplace: bool) -> FusedSE:
    """An empty layer, to be filled by its __setstate__."""
    cls = _fused_class(original)
    layer = cls.__new__(cls)
    layer.__dict__[SWAP] = recognised, inplace
    return layer


def _swap(layers: dict[nn.Module, Recognised], inplace: bool) -> dict[nn.Module, str]:
    """Change the classes of `layers`. Returns the layers for which that fails, with the reason."""
    failed: dict[nn.Module, str] = {}
    changed: list[tuple[nn.Module, type[Any]]] = []
    for layer in layers:
        original = type(layer)
        try:
            layer.__class__ = _fused_class(original)
        except Exception as error:  # for example from the class's own __init_subclass__
            failed[layer] = f"its class cannot be changed: {error}"
        else:
            changed.append((layer, original))
    for layer, original in changed:  # after the loop above, because a Swap records the classes of the modules inside
        Swap.attach(layer, original, layers[layer], inplace)
    return failed


class _Examination:
    """One pass over a model, which finds its SE layers and decides which of them to replace.

    names: every module, with all its dotted names. outcome: for each SE layer that was found, what it computes if it is
    to be replaced, else the reason why not.
    """

    def __init__(self, model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.include, self.exclude = include, exclude
        self.outcome: dict[nn.Module, Recognised | str] = {}
        self._examined: dict[nn.Module, bool] = {}  # by module: the result of `examine`

    def _filtered(self, layer: nn.Module) -> str | None:
        """Why `include` and `exclude` keep `layer` from being replaced; None if they do not."""
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
        """Give `layer` or layers inside it an outcome: to the outermost one that can be replaced, else to the innermost
        ones. Returns whether any of them has an outcome. A module that is used in several places is examined once."""
        if layer not in self._examined:
            self._examined[layer] = self._examine(layer)
        return self._examined[layer]

    def _examine(self, layer: nn.Module) -> bool:
        if isinstance(layer, (FusedSE, SqueezeExcite)):
            self.outcome[layer] = "already fused"
            return True
        fused_inside = any(isinstance(module, (FusedSE, SqueezeExcite)) for module in layer.modules())
        found = None if fused_inside else recognise(layer)
        if isinstance(found, Recognised):
            found = self._filtered(layer) or found
        elif found is not None:
            # A layer that rounds to float32 inside fails the comparisons in float64 for that reason alone.
            found = float64_refusal(layer) or found
        if not isinstance(found, Recognised):
            inside = [self.examine(child) for child in layer.children()]
            if any(inside):
                return True
        if found is not None:
            self.outcome[layer] = found
        return found is not None

    def near_misses(self) -> dict[nn.Module, str]:
        """The smallest modules that contain SE and have no outcome, with the reason."""
        near: dict[nn.Module, str] = {}
        settled = {module for layer in self.outcome for module in layer.modules()}
        for module in reversed(self.names):  # so that inner modules come first
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
    """Make every SE layer in `model` call `se_fused.squeeze_excite`, after a check by numbers that the results agree.

    Nothing else in the model changes; `restore` undoes it. If an SE layer contains another one (a wrapper x + SE(x)),
    the outermost is replaced.

    A replaced layer computes as the original does whenever the check does not cover the call or the layer: for a map of
    another rank, or further arguments that are not the defaults; after a change inside the layer (a swapped activation,
    an adapter, a pruned or quantised weight, a hook on a module inside), which it logs once; and while torch.compile,
    torch.export, torch.jit.trace or an ONNX exporter traces it.

    Args:
        model: any module; it may itself be an SE layer.
        inplace: let the layers overwrite their input while grad mode is off. Only safe for models that do not read that
            input again.
        dry_run: report, but change nothing.
        include, exclude: shell patterns (`fnmatch`) of the dotted names of layers. A layer is replaced if one of
            `include` matches (None: any name does) and none of `exclude` matches it or a module inside it.

    Returns:
        The `Report`. `Report.model` is `model`. Its `near` misses do not depend on `include` and `exclude`.

    Raises:
        TypeError: for an argument of another type.
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
        RuntimeError: if the class of a replaced layer was changed again afterwards, as `fully_shard` does.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedSE)]
    originals = [_original_class(layer) for layer in layers]
    for layer, original in zip(layers, originals, strict=True):
        layer.__dict__.pop(SWAP, None)
        layer.__class__ = original
    return model
