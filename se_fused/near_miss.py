"""Finds SE in modules that `replace` cannot replace: written into a block, without the product, grouped, ...

A copy of the module runs on the meta device, where nothing is computed. A dispatch mode tracks which tensors come from
the map x, which were pooled, which fully connected layers those passed, and whether they multiply a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import tracing

N = 2
# Spatial sizes, larger than the kernels and strides of common blocks.
SIDES = (37, 41, 43, 47, 53, 59, 61)
_CHANNEL_GUESSES = 4
# A block with SE runs tens of operators, a loop over positions thousands.
MAX_OPERATORS = 500
# The layers of SE have names such as fc1, fc.0 or fc.0.linear. Deeper weights belong to a module inside, which is
# examined itself.
_DEPTH = 3
LAYERS = {"convolution", "mm", "bmm", "addmm", "baddbmm"}
REDUCTIONS = {"mean", "sum", "amax", "max", "var", "std", "var_mean", "linalg_vector_norm"}
GATES = {"sigmoid", "hardsigmoid", "tanh"}
# Operators that are not views, but return the same numbers.
_COPIES = {"clone", "_to_copy", "_unsafe_view"}
GATE_ALONE = "it returns the gate only, its parent multiplies"
_WINDOWS = "it pools windows of a fixed size"


@dataclass(frozen=True)
class _Layer:
    """A fully connected layer from `inputs` channels to `outputs` channels."""

    inputs: int
    outputs: int
    groups: int = 1


@dataclass(frozen=True)
class _Map:
    """A tensor computed from x. plain: it is x itself, in any shape, or x pooled in part."""

    plain: bool


@dataclass(frozen=True)
class _Pooled:
    """A tensor computed from a map of `channels` channels by pooling and `layers`; `last` changed its numbers last."""

    channels: int
    plain: bool
    layers: tuple[_Layer, ...] = ()
    last: str = ""

    @property
    def is_gate(self) -> bool:
        """Whether there are layers, and they lead back to the channels of the pooled map."""
        return bool(self.layers) and self.layers[0].inputs == self.layers[-1].outputs == self.channels


class TooLong(Exception):
    """Ends a run with more operators than a block has."""


class _Flow(TorchDispatchMode):
    """Follows x through a run. `gate` is the pooled tensor that a map was multiplied by, `cast` the dtype that x was
    cast to, `in_block` whether other layers compute a map, `spatial_gate` whether a map of one channel multiplied
    another, and `windows` whether windows were pooled instead of the whole map."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Keeps the tensors alive too, so that no id is used twice.
        self._tags: dict[int, tuple[Tensor, _Map | _Pooled]] = {id(x): (x, _Map(plain=True))}
        self._one_channel = False
        self._operators = 0
        self.gate: _Pooled | None = None
        self.cast: torch.dtype | None = None
        self.in_block = self.spatial_gate = self.windows = False

    def tag(self, value: object) -> _Map | _Pooled | None:
        return self._tags[id(value)][1] if id(value) in self._tags else None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self._operators += 1
        if self._operators > MAX_OPERATORS:
            raise TooLong
        out = func(*args, **(kwargs or {}))
        given = [t for t in _pytree.tree_leaves((args, kwargs)) if id(t) in self._tags]
        results = [t for t in _pytree.tree_leaves(out) if isinstance(t, Tensor)]
        if given and results:
            tag = self._follow(func, args, given, results[0])
            for t in results:
                self._tags[id(t)] = t, tag
        return out

    def _follow(self, func: Any, args: tuple[Any, ...], given: list[Tensor], out: Tensor) -> _Map | _Pooled:
        name = func.overloadpacket.__name__.rstrip("_")
        dtypes = {t.dtype for t in args if isinstance(t, Tensor)}
        if name in LAYERS and len(dtypes) > 1:
            # The meta device raises no error for this.
            raise TypeError(f"one layer of {' and '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}")
        kept = func.is_view or name in _COPIES
        maps = [t for t in given if isinstance(self.tag(t), _Map)]
        pooled = [tag for t in given if isinstance(tag := self.tag(t), _Pooled)]
        if self.cast is None and out.is_floating_point() and out.dtype != given[0].dtype:
            self.cast = out.dtype
        if name in ("mul", "addcmul") and maps:
            self._multiply(maps, pooled, out)
        if maps:
            x, tag = maps[0], self.tag(maps[0])
            assert isinstance(tag, _Map)
            if name in LAYERS:
                one_channel = name == "convolution" and args[1].shape[0] == 1
                self._one_channel |= one_channel
                self.in_block |= not one_channel
            if out.numel() < x.numel() and (name in REDUCTIONS or "pool" in name):
                return self._pool(name, args, x, tag, out)
            return _Map(plain=tag.plain and kept and out.numel() == x.numel())
        # Where branches meet, such as mean and maximum, the one with the most layers counts.
        gate = max(pooled, key=lambda tag: len(tag.layers))
        if name.startswith("upsample"):
            return _Map(plain=False)
        layer = _layer(name, args, given[0])
        if layer is not None:
            return replace(gate, layers=(*gate.layers, layer), last="layer")
        return gate if kept else replace(gate, last=name)

    def _pool(self, name: str, args: tuple[Any, ...], x: Tensor, tag: _Map, out: Tensor) -> _Map | _Pooled:
        sizes = [size for size in out.shape if size != 1]
        if sizes not in [[size for size in (N, c) if size != 1] for c in (*x.shape[1:2], *x.shape[-1:])]:
            return tag
        if name.startswith(("avg_pool", "max_pool")):
            self.windows |= list(args[1]) != list(x.shape[-len(args[1]) :])
        return _Pooled(out.numel() // N, tag.plain)

    def _multiply(self, maps: list[Tensor], pooled: list[_Pooled], out: Tensor) -> None:
        sizes = [t.numel() for t in maps]
        for gate in pooled:
            if gate.is_gate and gate.channels in out.shape[1:] and max(sizes) == out.numel():
                self.gate = gate
                self.in_block |= not (gate.plain and all(self.tag(t) == _Map(plain=True) for t in maps))
        self.spatial_gate |= self._one_channel and any(min(sizes) * c == out.numel() for c in out.shape[1:] if c > 1)


def _layer(name: str, args: tuple[Any, ...], pooled: Tensor) -> _Layer | None:
    """The fully connected layer that an operator applies to the tensor `pooled`; None if it is not one."""
    if name == "convolution":
        weight, groups = args[1], args[8]
        pointwise = weight is not pooled and math.prod(weight.shape[2:]) == 1
        return _Layer(weight.shape[1] * groups, weight.shape[0], groups) if pointwise else None
    if name in LAYERS:
        a, b = args[-2:]
        return _Layer(b.shape[-2], b.shape[-1]) if a is pooled else _Layer(a.shape[-1], a.shape[-2])
    return None


def near_miss(module: nn.Module, known: Collection[nn.Module] = ()) -> str | None:
    """Describe the SE inside `module`, which is not an SE layer that `replace` can replace; None if there is none.

    known: modules inside that are left out, because they were asked about before; other SE layers inside count as that
    of `module`. `module` is only read; the random state of PyTorch stays as it was. None also if `module` fails on
    every map that is tried.
    """
    run = _run(module, known)
    if run is None:
        return None
    flow, x, y, note = run
    if flow.gate is None:
        return _gate_alone(flow, x, y)
    layers = flow.gate.layers
    what, arity = _described(layers), tracing.arity(module)
    inputs = f"it needs {arity} inputs" if arity > 1 else ""
    if flow.in_block:
        return "; ".join(filter(None, (f"SE written into the block: {what} on a pooled map, then a product", inputs)))
    unusual = len(layers) > 2 or any(layer.groups > 1 for layer in layers)
    reasons = [
        "it has a spatial gate beside the channel gate (scSE)" if flow.spatial_gate else "",
        what if unusual else "",
        _WINDOWS if flow.windows else note,
        "" if isinstance(y, Tensor) and y.shape == x.shape else "its result is not one map of the shape of x",
        inputs,
    ]
    stated = [reason for reason in reasons if reason]
    return "; ".join(stated) or float64_refusal(module) or f"it is not only {what}, a gate and a product"


def float64_refusal(module: nn.Module) -> str | None:
    """Why `module` is SE in its own dtype but not in float64, in which `recognise` examines it; None if it is not so.

    `module` is only read.
    """
    run = _run(module)
    if run is None or run[0].gate is None:
        return None
    x = run[1].double()
    flow, why = _Flow(x), None
    try:
        run_on_meta(flow, meta_copy(module, torch.float64), x)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(": ")
    if flow.cast is not None:
        why = f"it casts to {str(flow.cast).removeprefix('torch.')}"
    return None if why is None else f"it does not run in float64: {why}"


def _gate_alone(flow: _Flow, x: Tensor, y: object) -> str | None:
    tag = flow.tag(y)
    if not isinstance(y, Tensor) or not isinstance(tag, _Pooled) or not tag.is_gate:
        return None
    # A classifier's head returns [N, C] without a gate, a pooling branch (ASPP) is one layer and then an activation.
    is_map = y.dim() > 2 and y.numel() in (N * tag.channels, x.numel())
    if tag.last in GATES or (is_map and (tag.last == "layer" or len(tag.layers) > 1)):
        return GATE_ALONE
    return None


def _described(layers: tuple[_Layer, ...]) -> str:
    groups = max(layer.groups for layer in layers)
    count = ("one", "two", "three")[len(layers) - 1] if len(layers) <= 3 else str(len(layers))
    sizes = [f"R={layer.outputs}" for layer in layers[:-1]] + [f"C={layers[-1].outputs}"]
    if groups > 1:
        sizes.append(f"{groups} groups")
    kind = f"{'grouped ' * (groups > 1)}fully connected layer{'s' * (len(layers) > 1)}"
    return f"{count} {kind} [{', '.join(sizes)}]"


def _run(module: nn.Module, known: Collection[nn.Module] = ()) -> tuple[_Flow, Tensor, object, str] | None:
    """Run a copy of `module` on the first x that it takes. Returns the flow, x, the result, and a note on what is
    unusual about x; None if it takes no x that is tried."""
    if isinstance(module, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule, nn.ModuleList, nn.ModuleDict)) or (
        type(module).__module__.startswith("torch.nn.") and not module._modules
    ):
        return None
    shapes = list(weights_of(module, _DEPTH))
    # A recurrent layer has square weights too, but on the meta device it runs its operators step by step.
    if not _leads_back(shapes) or any(isinstance(inner, nn.RNNBase) for inner in module.modules()):
        return None
    trials: dict[tuple[int, ...], str] = {}
    for sizes, note in _trials(module, shapes):
        trials.setdefault(sizes, note)
    found = first_run(module, trials, _Flow, known)
    return None if found is None else (*found, trials[tuple(found[1].shape)])


Follower = TypeVar("Follower", bound=TorchDispatchMode)


def first_run(
    module: nn.Module,
    trials: Iterable[tuple[int, ...]],
    follow: Callable[[Tensor], Follower],
    known: Collection[nn.Module] = (),
) -> tuple[Follower, Tensor, object] | None:
    """Run a copy of `module` on an x of the first of the shapes `trials` that it takes. Returns the mode that `follow`
    made for x, x, and the result; None if it takes none, or if the run is too long. known: modules inside that return
    their input instead."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    try:
        bare = meta_copy(module)
        for original, each in zip(module.modules(), list(bare.modules()), strict=True):
            if original in known:
                each.forward = nn.Identity().forward
    except Exception:  # foreign code may fail in any way
        return None
    for sizes in trials:
        x = torch.empty(sizes, dtype=dtype, device="meta")
        flow = follow(x)
        try:
            return flow, x, run_on_meta(flow, bare, x)
        except TooLong:
            return None
        except Exception:  # the module does not take this map
            continue
    return None


def run_on_meta(flow: TorchDispatchMode, bare: nn.Module, x: Tensor) -> object:
    """The result of `bare` on x, and on other maps of the same shape if it needs more inputs."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("meta"),
        flow,
    ):
        return bare(x, *(torch.empty_like(x) for _ in range(tracing.arity(bare) - 1)))


def weights_of(module: nn.Module, depth: int) -> Iterator[tuple[int, ...]]:
    """The shapes [outputs, inputs, *kernel] of the weights up to `depth` names below `module`, as registered."""
    groups = getattr(module, "groups", 1)
    for p in module._parameters.values():
        if p is not None and not nn.parameter.is_lazy(p) and p.dim() > 1:
            grouped = groups if isinstance(groups, int) and p.dim() > 2 else 1
            yield (p.shape[0], p.shape[1] * grouped, *p.shape[2:])
    for name, child in module._modules.items():
        reparametrised = name == "parametrizations" or isinstance(child, parametrize.ParametrizationList)
        if child is not None and (depth > 0 or reparametrised):
            yield from weights_of(child, depth if reparametrised else depth - 1)


def _leads_back(shapes: list[tuple[int, ...]]) -> bool:
    """Whether one, two or three weights of kernel size 1 lead from some number of channels back to the same number."""
    steps: dict[int, set[int]] = {}
    for outputs, inputs, *kernel in shapes:
        if math.prod(kernel) == 1:
            steps.setdefault(inputs, set()).add(outputs)
    return any(
        start in ends or any(start in two or any(start in steps.get(r, ()) for r in two) for two in second)
        for start, ends in steps.items()
        for second in [[steps.get(r, set()) for r in ends]]
    )


def _trials(module: nn.Module, shapes: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Shapes of x that `module` may take, the likelier ones first, each with a note on what is unusual about it."""
    channels = list(dict.fromkeys(shape[1] for shape in shapes))[:_CHANNEL_GUESSES]
    taken = {size for shape in shapes for size in shape[:2]}
    spatial = [size for size in SIDES if size not in taken] or list(SIDES)
    # A gain may look like a weight, [C, 1, 1], of another rank than the map.
    ranks = list(dict.fromkeys([*(len(shape) - 2 for shape in shapes if 2 < len(shape) < 6), 2, 1, 3]))
    for c in channels:
        for rank in ranks:
            yield (N, c, *spatial[:rank]), ""
    for c in channels:
        yield (N, spatial[0], c), "its channels come last, as in [B, L, C]"
        yield (N, *spatial[:2], c), "its channels come last, as in [B, H, W, C]"
    kernels = [m.kernel_size for m in module.modules() if isinstance(m, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))]
    for kernel in dict.fromkeys(kernels):
        for rank in ranks:
            window = (kernel,) * rank if isinstance(kernel, int) else kernel
            yield (N, channels[0], *window), _WINDOWS


def meta_copy(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy on the meta device, in eval mode and without hooks. dtype: of its floating-point tensors, if given."""

    def tensor(t: Tensor) -> Tensor:
        own = dtype if dtype is not None and t.is_floating_point() else t.dtype
        return torch.empty(t.shape, dtype=own, device="meta")

    return tracing.detached_copy(module, lambda p: nn.Parameter(tensor(p), requires_grad=False), tensor)
