"""`replace` and `restore`: they fuse the SE layers of a model in place, and undo it.

A layer keeps its identity: as PyTorch's `fully_shard` does, `replace` only changes the object's class, to a subclass of
the original class with another `forward`. So parameters, state_dict keys, attributes, hooks, mode and references to the
layer stay the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .blocks import BlockSwap, FusedBlock, find_blocks
from .inside import SWAP
from .modules import SqueezeExcite
from .near_miss import float64_refusal, near_miss
from .observers import under_transform
from .options import refuse
from .recognise import recognise
from .recognised import Recognised
from .replaced import Replaced, change_classes, original_class
from .report import Report
from .swap import LayerSwap
from .undisturbed import undisturbed


class FusedSE(Replaced):
    """The first base of a replaced layer's class."""

    _se_fused_swap: LayerSwap | None = None

    def extra_repr(self) -> str:
        swap = self._se_fused_swap
        fused = "" if swap is None else f"fused: {swap.recognised}"
        return ", ".join(filter(None, (super().extra_repr(), fused)))

    def _fused_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        swap = self._se_fused_swap
        x = None if swap is None else swap.map_of(args, kwargs)
        if swap is None or x is None:
            return None
        weights = swap.weights(self, x)
        if weights is None:
            return None
        given = (x, *weights, x if swap.recognised.residual else None, swap.options)
        if swap.inplace and not (torch.is_grad_enabled() or x.requires_grad or under_transform()):
            # ValueError, raised before anything is written: x overlaps itself or a weight, or is an inference
            # tensor. Then the call is not made in place.
            with contextlib.suppress(ValueError):
                return ops.call(*given, inplace=True)  # type: ignore[misc]
        return ops.call(*given)


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
    level: str = "layer",
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
        level: "layer", or "block": also let the module around each layer compute the layer together with its neighbours
            (batch norm and activation before it; residual and activation, or 1x1 convolution and batch norm, after it).
            That is for inference: in eval mode with grad mode off, without autocast. In all other calls the module
            computes as it would at level "layer".
        inplace: let the layers overwrite their input while grad mode is off. Only safe for models that do not read that
            input again.
        dry_run: report, but change nothing.
        include, exclude: shell patterns (`fnmatch`) of the dotted names of layers. A layer is replaced if one of
            `include` matches (None: any name does) and none of `exclude` matches it or a module inside it.

    Returns:
        The `Report`. `Report.model` is `model`. Its `near` misses do not depend on `include` and `exclude`.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for an unknown level.
    """
    if level not in ("layer", "block"):
        refuse(ValueError, "level", repr(level), "'layer' or 'block'", "replace")
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"replace: model is {got}; wanted a torch.nn.Module")
    examination = _Examination(model, _patterns("include", include), _patterns("exclude", exclude))
    with undisturbed(model):
        examination.examine(model)
        near = examination.near_misses()
    outcome = examination.outcome
    found = {layer: each for layer, each in outcome.items() if isinstance(each, Recognised)}
    blocks, alone = find_blocks(model, examination.names, found) if level == "block" else ([], {})
    if not dry_run:
        facts = {layer: (recognised, inplace) for layer, recognised in found.items()}
        outcome.update(change_classes(FusedSE, LayerSwap, facts))
        change_classes(FusedBlock, BlockSwap, {block.module: (block.program, block.dims) for block in blocks})
    named = [(name, layer) for layer, names in examination.names.items() for name in names]
    found_as = {name: outcome[layer] for name, layer in named if layer in outcome}
    return Report(
        model,
        {name: found for name, found in found_as.items() if isinstance(found, Recognised)},
        {name: found for name, found in found_as.items() if isinstance(found, str)},
        {name: near[module] for name, module in named if module in near},
        {name: block.neighbours for name, module in named for block in blocks if block.module is module},
        {name: alone[layer] for name, layer in named if layer in alone},
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
    modules = [module for module in model.modules() if isinstance(module, Replaced)]
    originals = [original_class(module) for module in modules]
    for module, original in zip(modules, originals, strict=True):
        module.__dict__.pop(SWAP, None)
        module.__class__ = original
    return model
