"""Names channel attention other than SE (ECA, split attention, ...), which `replace` does not serve.

As in `near_miss`, a copy of the module runs on the meta device, where nothing is computed. A dispatch mode tracks which
tensors come from the map x, how they were pooled, what they passed since then, and whether they multiply a map.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .near_miss import (
    GATES,
    LAYERS,
    MAX_OPERATORS,
    REDUCTIONS,
    SIDES,
    N,
    TooLong,
    first_run,
    weights_of,
)

# A block with attention in its own forward has tens of modules inside.
_MAX_MODULES = 40
_DEPTH = 3
_CHANNEL_GUESSES = 3
# For modules whose weights leave the number of channels open, as ECA's do.
_ANY_CHANNELS = 24

ECA = "a gate from neighbouring channels (ECA)"
CONTEXT = "layers on a mean that a softmax over the positions weights (global context)"
BRANCHES = "gates of several maps, by a softmax over the maps (split attention, selective kernels)"
STRIPS = "a gate from strips of the map (coordinate attention)"
WINDOWS = "a gate from windows of the map (gather-excite)"
SPATIAL = "a spatial gate"
ALONE = "a gate from each channel alone, without fully connected layers"
STATISTICS = "a gate for each element, from the statistics of its channel (SimAM)"
ANOTHER = "a gate from one map for another one"


def relatives(
    modules: Iterable[nn.Module], known: Iterable[nn.Module], blocks: Iterable[nn.Module] = ()
) -> dict[str, str]:
    """What `relative` says of the smallest of `modules`, by class, as in {"EcaModule": "a gate ..., 16 modules"}.

    modules: with each module before those inside it. known: modules not to ask about, nor about those inside them or
    around them. blocks: modules not to ask about, nor about those around them.
    """
    settled = {*blocks, *(inner for module in known for inner in module.modules())}
    answers: dict[object, str | None] = {}
    counts: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    for module in reversed(list(modules)):
        if module in settled:
            continue
        name = None
        inside = any(child in settled for child in module.children())
        if not inside and _may_be_one(module):
            structure = _structure(module)
            if structure not in answers:
                answers[structure] = relative(module)
            name = answers[structure]
        if name is not None:
            cls = type(module).__name__
            counts[cls] += 1
            names[cls] = list(dict.fromkeys([*names.get(cls, ()), name]))
        if inside or name is not None:
            settled.add(module)
    return {cls: f"{'; or '.join(names[cls])}, {n} module{'s' * (n > 1)}" for cls, n in counts.items()}


def relative(module: nn.Module) -> str | None:
    """Name the channel attention other than SE that `module` computes; None if there is none that is certain.

    `module` is only read; the random state of PyTorch stays as it was. Not to be asked about SE layers.
    """
    if not _may_be_one(module):
        return None
    found = first_run(module, _trials(module), _Flow)
    return None if found is None else found[0].name


def _may_be_one(module: nn.Module) -> bool:
    """Whether `module` could multiply tensors in a forward of its own, and is small enough to be examined."""
    if type(module).__module__.startswith("torch.") or isinstance(module, torch.jit.ScriptModule):
        return False
    if type(module).forward in (nn.Module.forward, nn.Sequential.forward):
        return False
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        return False
    inside = list(module.modules())
    # A recurrent layer runs its operators step by step on the meta device.
    return len(inside) <= _MAX_MODULES and not any(isinstance(each, nn.RNNBase) for each in inside)


def _structure(module: nn.Module) -> tuple[object, ...]:
    """Equal for modules that get the same answer: of the same classes, with weights of the same shapes but for the
    widths, of which it only matters which ones are equal and which are 1."""
    widths = {1: 0}
    shapes = [
        (*(widths.setdefault(size, len(widths)) for size in p.shape[:2]), *p.shape[2:]) for p in module.parameters()
    ]
    return (*map(type, module.modules()), *shapes)


def _trials(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of x that `module` may take, the likelier ones first."""
    shapes = list(weights_of(module, _DEPTH))
    # A weight with one or two inputs is one of ECA, or of a spatial gate on the mean and the maximum, not of the map.
    widths = [c for c in dict.fromkeys([shape[i] for i in (1, 0) for shape in shapes]) if c > 2]
    spatial = [s for s in SIDES if s not in {size for shape in shapes for size in shape[:2]}]
    ranks = dict.fromkeys([2, *(len(shape) - 2 for shape in shapes if 2 < len(shape) < 6)])
    for c in (*widths[:_CHANNEL_GUESSES], _ANY_CHANNELS):
        for rank in ranks:
            yield (N, c, *(spatial or SIDES)[:rank])


@dataclass(frozen=True)
class _Part:
    """A tensor computed from x. over: what it has numbers for: the whole "map", or its "channels", "positions",
    "strips" or "windows". channels, sizes: of the map it comes from. passed: what it passed since."""

    over: str
    channels: int
    sizes: tuple[int, ...]
    passed: frozenset[str] = frozenset()

    @property
    def is_map(self) -> bool:
        return self.over in ("map", "windows")

    def after(self, step: str) -> _Part:
        """This part after `step`. What a layer computes is no gate yet, whatever its input was."""
        kept = self.passed - {"gate", "softmax"} if step == "layer" else self.passed
        return replace(self, passed=kept | {step})

    def shaped(self, out: Tensor) -> _Part | None:
        """The part that `out` is, which holds numbers of this map, such as some of its channels."""
        if not self.is_map:
            return self
        channels, rest = divmod(out.numel() // N, math.prod(self.sizes))
        if rest == 0:
            return replace(self, channels=channels)
        if out.dim() == len(self.sizes) + 2:
            return replace(self, channels=out.shape[1], sizes=tuple(out.shape[2:]))
        return None


class _Flow(TorchDispatchMode):
    """Follows x through a run. `name` is that of the first product, or sum, that is channel attention."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Keeps the tensors alive too, so that no id is used twice.
        self._parts = {id(x): (x, _Part("map", x.shape[1], tuple(x.shape[2:])))}
        self._operators = 0
        self.name: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self._operators += 1
        if self._operators > MAX_OPERATORS:
            raise TooLong
        out = func(*args, **(kwargs or {}))
        parts = [self._parts[id(t)][1] for t in _pytree.tree_leaves((args, kwargs)) if id(t) in self._parts]
        results = [t for t in _pytree.tree_leaves(out) if isinstance(t, Tensor)]
        for t in results if parts else ():
            part = self._follow(func.overloadpacket.__name__.rstrip("_"), args, parts, t)
            if part is not None:
                self._parts[id(t)] = t, part
        return out

    def _follow(self, name: str, args: tuple[Any, ...], parts: list[_Part], out: Tensor) -> _Part | None:
        """What `out` is, a result of the operator `name` on `parts`; None if it is not to be followed."""
        first = parts[0]
        maps = [part for part in parts if part.is_map]
        if name == "convolution":
            return _convolved(first, args[1], args[8], out) if id(args[0]) in self._parts else None
        if name in LAYERS:
            return _multiplied(parts, out)
        if (name in REDUCTIONS or "pool" in name) and out.numel() < args[0].numel():
            return _pooled(first, name, out)
        if name.startswith("upsample") and first.is_map:
            return replace(first.after("upsampled"), sizes=tuple(out.shape[2:]))
        if name == "_softmax":
            return first.after("softmax") if _weighs(first, out.shape[args[1]], out.numel() // N) else first
        # As a ReLU6, a hardtanh may also be the activation of a map.
        if name in GATES or (name in ("hardtanh", "clamp") and len(args) == 3 and not first.is_map):
            return first.after("gate")
        if name in ("mul", "addcmul", "add"):
            self.name = self.name or next(
                (each for m in maps for part in parts if part is not m and (each := _named(name, part, m))), None
            )
        return _joined(name, parts, out) if maps or len({part.over for part in parts}) == 1 else None


def _joined(name: str, parts: list[_Part], out: Tensor) -> _Part | None:
    """What an operator computes from `parts` element by element: a map if one of them is."""
    maps = [part for part in parts if part.is_map]
    pooled = [part for part in parts if not part.is_map]
    joined = max(maps or parts, key=lambda part: part.channels * math.prod(part.sizes))
    passed = {step for part in maps or parts for step in part.passed}
    if maps and len(parts) > 1 and name == "mul":
        passed.discard("gate")  # it may have been applied just now
    if maps and any(part.over == "channels" and "layer" not in part.passed for part in pooled):
        passed.add("statistics")
    if maps and name == "mul" and any("softmax" in part.passed for part in pooled if part.over == "positions"):
        passed.add("weighted")
    return replace(joined, passed=frozenset(passed)).shaped(out)


def _convolved(part: _Part, weight: Tensor, groups: int, out: Tensor) -> _Part | None:
    kernel, depthwise = math.prod(weight.shape[2:]), groups > 1 and weight.shape[1] == 1
    if part.over == "channels":
        if kernel > 1 and math.prod(out.shape[2:]) >= part.channels:
            return part.after("neighbours")
        return part if depthwise else part.after("layer")
    if part.over == "strips" or (part.over == "positions" and out.shape[1] == 1):
        return part.after("layer")
    sizes = tuple(out.shape[2:])
    if math.prod(sizes) == math.prod(part.sizes):
        sizes = part.sizes  # the positions may be flattened
    if out.shape[1] == 1 and part.is_map:
        return _Part("positions", part.channels, sizes)
    gathers = depthwise and math.prod(sizes) < math.prod(part.sizes)
    if gathers or (part.over == "windows" and kernel == 1):
        return _Part("windows", part.channels, sizes, part.passed & {"upsampled"}).shaped(out)
    return _Part("map", part.channels, sizes).shaped(out)


def _multiplied(parts: list[_Part], out: Tensor) -> _Part | None:
    """What a product of matrices computes from `parts`: a layer if there is one of them, or a weighted mean."""
    first = parts[0]
    if len(parts) > 1:
        m = next((part for part in parts if part.over == "map"), None)
        weighted = any(part.over == "positions" and "softmax" in part.passed for part in parts)
        if m is None or not weighted or out.numel() // N != m.channels:
            return None
        return replace(m, over="channels", passed=frozenset({"weighted"}))
    if first.is_map:
        return replace(first, passed=first.passed & {"upsampled"}).shaped(out)
    return None if first.over == "positions" else first.after("layer")


def _pooled(part: _Part, name: str, out: Tensor) -> _Part | None:
    numbers, positions = out.numel() // N, math.prod(part.sizes)
    passed = part.passed & {"weighted"} if part.is_map else part.passed
    if numbers == part.channels:
        return replace(part, over="channels", passed=passed)
    if numbers == positions:
        return replace(part, over="positions", passed=passed)
    if numbers in [part.channels * positions // size for size in part.sizes]:
        return replace(part, over="strips", passed=passed)
    if not part.is_map:
        return part
    if numbers % positions and "pool" in name:
        return replace(part, over="windows", sizes=tuple(out.shape[2:]), passed=frozenset())
    return part.shaped(out)


def _weighs(part: _Part, size: int, numbers: int) -> bool:
    """Whether a softmax over `size` of all `numbers` weighs maps against each other, or the positions of a map."""
    return (part.over == "channels" and size < numbers) or (part.over == "positions" and size == math.prod(part.sizes))


def _named(name: str, gate: _Part, m: _Part) -> str | None:
    """Name the operator `name` on `gate` and the map `m`, if it is channel attention."""
    passed = gate.passed
    if gate.over == "channels" and {"weighted", "layer"} <= passed:
        return CONTEXT
    # Where the map is a gate itself, as a class is of which the score is multiplied, neither is applied to the other.
    if name == "add" or "gate" in m.passed:
        return None
    if gate.over == "channels" and "neighbours" in passed:
        return ECA
    if gate.over == "channels" and {"layer", "softmax"} <= passed:
        return BRANCHES
    if "gate" not in passed:
        return None
    if gate.over == "channels":
        return ALONE if "layer" not in passed else ANOTHER if gate.channels != m.channels else None
    if gate.over == "positions":
        return SPATIAL if m.channels > 1 else None
    if gate.over == "strips":
        return STRIPS
    if gate.over == "windows":
        return WINDOWS if "upsampled" in passed and m.over == "map" else None
    return STATISTICS if "statistics" in passed - m.passed else None
