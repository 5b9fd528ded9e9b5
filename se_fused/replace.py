"""`replace` and `restore`: they fuse the SE layers of a model in place, and undo it.

A layer keeps its identity: as PyTorch's `fully_shard` does, `replace` only changes the object's class, to a subclass of
the original class with another `forward`. So parameters, state_dict keys, attributes, hooks, mode and references to the
layer stay the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace as changed
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .alike import Alike, paths_of
from .blocks import Block, BlockSwap, FusedBlock, InlineBlock, find_blocks, find_inline
from .inside import SWAP
from .modules import SqueezeExcite
from .near_miss import GATE_ALONE, float64_refusal, near_miss
from .options import refuse
from .recognise import recognise
from .recognised import Recognised
from .relatives import relatives
from .replaced import Replaced, change_classes, original_class
from .report import Report
from .swap import LayerSwap, compute
from .tracing import weight_shapes
from .undisturbed import undisturbed

# A gate is multiplied with its map by one of so many modules around it.
_LEVELS = 3


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
        return None if weights is None else compute(x, weights, swap.recognised, swap.options, swap.inplace)


class _Examination:
    """One pass over a model, which finds its SE layers and decides which of them to replace.

    names: every module, with all its dotted names. outcome: for each SE layer that was found, what it computes if it is
    to be replaced, else the reason why not. inline: the modules with SE written into their forwards that are to be
    replaced.
    """

    def __init__(self, model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.include, self.exclude = include, exclude
        self.outcome: dict[nn.Module, Recognised | str] = {}
        self.inline: dict[nn.Module, InlineBlock] = {}
        self.alike = Alike()
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
        if isinstance(layer, (FusedSE, SqueezeExcite)) or _has_fused_inline(layer):
            self.outcome[layer] = "already fused"
            return True
        fused_inside = any(isinstance(module, (Replaced, SqueezeExcite)) for module in layer.modules())
        is_possible = not fused_inside and weight_shapes(layer) is not None
        found = self.alike.once(recognise, layer) if is_possible else None
        refused = isinstance(found, str)
        if isinstance(found, Recognised):
            found = self._filtered(layer) or found
        elif found is not None:
            # A layer that rounds to float32 inside fails the comparisons in float64 for that reason alone.
            found = float64_refusal(layer) or found
        if not isinstance(found, Recognised):
            inside = [self.examine(child) for child in layer.children()]
            if any(inside):
                return True
        if refused and self._note_inline(layer, self._inline_in(layer)):
            return True
        if found is not None:
            self.outcome[layer] = found
        return found is not None

    def _inline_in(self, module: nn.Module, known: Collection[nn.Module] = ()) -> InlineBlock | str | None:
        """What `find_inline` finds in `module`."""
        found = self.alike.once(find_inline, module, known, facts=paths_of(known, module))
        return changed(found, module=module) if isinstance(found, InlineBlock) else found

    def _note_inline(self, module: nn.Module, found: InlineBlock | str | None) -> bool:
        """Note that `module` has SE written into its forward, if that was found. Returns whether it was."""
        if not isinstance(found, InlineBlock):
            return False
        reason = self._filtered(module)
        if reason is None:
            self.inline[module] = found
        else:
            self.outcome[module] = reason
        return True

    def look_inside(self) -> dict[nn.Module, str]:
        """Find SE written into forwards. Returns the other modules that contain SE and have no outcome, the smallest
        ones, with the reason."""
        near: dict[nn.Module, str] = {}
        settled = {module for layer in (*self.outcome, *self.inline) for module in layer.modules()}
        # Modules that return a gate, each with the number of modules around it that do not multiply by it.
        waiting: dict[nn.Module, int] = {}
        for module in reversed(self.names):  # so that inner modules come first
            if module in settled:
                continue
            if any(child in settled for child in module.children()):
                settled.add(module)
                self._look_beside(module, near)
                continue
            reason = near_miss(module)
            gates = waiting.keys() & set(module.modules())
            if reason == GATE_ALONE and not gates:
                near[module] = reason
                waiting[module] = 0
                continue
            if reason is None and not gates:
                continue
            found = self._inline_in(module)
            if self._note_inline(module, found):
                near = {each: why for each, why in near.items() if each not in gates}
            elif reason is not None and not gates:
                near[module] = reason if found is None else f"{reason}; {found}"
            elif reason is None and found is None:
                waiting |= {gate: waiting[gate] + 1 for gate in gates}
                if all(waiting[gate] < _LEVELS for gate in gates):
                    continue
            settled.add(module)
        return near

    def _look_beside(self, module: nn.Module, near: dict[nn.Module, str]) -> None:
        """Find SE that is written into the forward of `module`, beside an SE layer that is a child of it."""
        if isinstance(module, nn.Sequential) or self.outcome.keys().isdisjoint(module.children()):
            return
        found_before = self.outcome.keys() | self.inline.keys() | near.keys()
        known = [inner for inner in module.modules() if inner in found_before]
        reason = near_miss(module, known)
        if reason is not None:
            found = self._inline_in(module, known)
            if not self._note_inline(module, found):
                near[module] = reason if found is None else f"{reason}; {found}"


def _has_fused_inline(module: nn.Module) -> bool:
    swap = getattr(module, SWAP, None)
    return isinstance(swap, BlockSwap) and swap.has_inline


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
    the outermost is replaced. Where SE is written into the forward of a block, the block makes one call in its place.

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
        near = examination.look_inside()
        seen = relatives(examination.names, [*examination.outcome, *near], examination.inline)
    outcome, inline = examination.outcome, examination.inline
    found = {layer: each for layer, each in outcome.items() if isinstance(each, Recognised)}
    blocks, alone = list[Block](), dict[nn.Module, str]()
    if level == "block":
        blocks, alone = find_blocks(model, examination.names, found, inline, examination.alike)
    if not dry_run:
        facts = {layer: (recognised, inplace) for layer, recognised in found.items()}
        outcome.update(change_classes(FusedSE, LayerSwap, facts))
        unjoined = [Block(each.module, {}, each.forwards, each.dims, ()) for each in inline.values()]
        of_blocks = {block.module: (block.joined, block.inline, block.dims, inplace) for block in (*unjoined, *blocks)}
        outcome.update(change_classes(FusedBlock, BlockSwap, of_blocks))
    named = [(name, layer) for layer, names in examination.names.items() for name in names]
    found_as = {name: outcome[layer] for name, layer in named if layer in outcome}
    return Report(
        model,
        {name: found for name, found in found_as.items() if isinstance(found, Recognised)},
        {name: found for name, found in found_as.items() if isinstance(found, str)},
        {name: inline[module].layers for name, module in named if module in inline and module not in outcome},
        {name: near[module] for name, module in named if module in near},
        {name: block.neighbours for name, module in named for block in blocks if block.module is module},
        {name: alone[layer] for name, layer in named if layer in alone},
        seen,
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
