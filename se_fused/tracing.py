"""Runs a copy of a layer that may be SE, and records the inputs of its one or two fully connected layers.

The run replaces their outputs by a grid of values, so that one run shows act and gate over their whole range, whatever
the weights are.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

# The grid meets or encloses the kinks of the piecewise activations (0, 3, 6, 2.5). Beyond 20, softplus changes its
# formula.
GRID = torch.cat(
    [
        torch.linspace(-12, 12, 97, dtype=torch.float64, device="cpu"),
        torch.linspace(-0.98, 0.98, 50, dtype=torch.float64, device="cpu"),
        torch.tensor([-50.0, -21.0, 21.0, 50.0], dtype=torch.float64, device="cpu"),
    ]
)
# The period of the random numbers: drawing 2048 * 128 different ones takes longer than all the rest. It is prime, so
# that the rows of a matrix differ.
_PERIOD = 1999
_aten = torch.ops.aten
# The operators that compute a fully connected layer, with the positions of their input, weight and bias arguments.
_LAYERS: dict[Any, tuple[int, int, int | None]] = {
    _aten.convolution.default: (0, 1, 2),
    _aten.addmm.default: (1, 2, 0),
    _aten.mm.default: (0, 1, None),
    _aten.bmm.default: (0, 1, None),
}


@dataclass(frozen=True)
class Call:
    """One use of a weight: the names of the parameters, the input, and the grid that replaced the output."""

    weight: str
    bias: str | None
    input: Tensor
    planted: Tensor


@dataclass(frozen=True)
class Trace:
    """One run of a layer: x, its result y, the uses of the weights in order, and whether the layer wrote to x."""

    x: Tensor
    y: Tensor
    calls: list[Call]
    wrote: bool

    def moved(self) -> Trace:
        """With x and y, whose channels are last, as [N, C, *spatial]."""
        return replace(self, x=self.x.movedim(-1, 1), y=self.y.movedim(-1, 1))


def weight_shapes(layer: nn.Module) -> list[tuple[int, ...]] | None:
    """The shapes of the weights of `layer` if they can be SE's: [R, C] and [C, R] in any order, or one [C, C]; else
    None."""
    if isinstance(layer, torch._dynamo.OptimizedModule) or (
        type(layer).__module__.startswith("torch.nn.modules.") and not layer._modules
    ):
        return None
    shapes: list[tuple[int, ...]] = []
    for module in layer.modules():
        parameters = [p for p in module._parameters.values() if p is not None]
        if any(nn.parameter.is_lazy(p) or not p.is_floating_point() for p in parameters):
            return None
        # The largest part of a reparametrised weight has its shape: weight_norm's parts are [out, 1] and [out, in].
        if parameters and (isinstance(module, parametrize.ParametrizationList) or "weight_v" in module._parameters):
            parameters = [max(parameters, key=Tensor.numel)]
        shapes += [tuple(p.shape) for p in parameters if p.dim() > 1]
        # A bias may have the shape [1, C, 1, 1]. So has a weight if R is 1.
        shapes = [shape for shape in shapes if math.prod(shape) > max(shape)] or shapes
        if len(shapes) > 2 or any(len(shape) > 5 or math.prod(shape[2:]) != 1 or 0 in shape for shape in shapes):
            return None
    if not shapes or shapes[0][:2] != shapes[-1][1::-1]:
        return None
    return shapes


def arity(layer: nn.Module) -> int:
    """The number of positional arguments that `forward` requires."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(layer.forward).parameters.values()
    return max(1, sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters))


def numbers(*shape: int) -> Tensor:
    """Normally distributed numbers in float64 on the CPU, which repeat after 1999."""
    count = math.prod(shape)
    few = torch.randn(min(count, _PERIOD), dtype=torch.float64, device="cpu")
    return few.repeat(-(-count // _PERIOD))[:count].reshape(shape)


def random_map(*shape: int) -> Tensor:
    """A map with both signs, away from zero (because y is divided by x), and with a different mean in each channel."""
    x = numbers(*shape) + numbers(*shape[:2], *(1 for _ in shape[2:]))
    return x + torch.copysign(torch.full_like(x, 0.5), x)


def detached_copy(
    layer: nn.Module, parameter: Callable[[nn.Parameter], nn.Parameter], tensor: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A copy in eval mode, without hooks, whose parameters and other tensors are those that the two functions return.

    Raises:
        ValueError: if the layer defines copying so that the copy contains modules of the original, which must not run.
    """
    memo: dict[int, Any] = {}
    for module in layer.modules():
        for name, value in vars(module).items():
            if "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
        for t in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = parameter(t) if isinstance(t, nn.Parameter) else tensor(t)
    detached = copy.deepcopy(layer, memo)
    if not set(detached.modules()).isdisjoint(layer.modules()):
        raise ValueError("its own way of copying gives itself")
    return detached.eval()


def bare_copy(layer: nn.Module) -> nn.Module:
    """A float64 copy on the CPU with random parameters, in eval mode, without hooks and reparametrisations.

    The parameters are random because real ones can hide the formula: a zero-initialised W2 makes every gate constant.
    """
    if isinstance(layer, torch.jit.ScriptModule):
        return copy.deepcopy(layer).cpu().double().eval()

    def tensor(t: Tensor) -> Tensor:
        # Tensors on the meta device have no numbers; any will do, as for the parameters.
        own = torch.ones_like(t, device="cpu") if t.is_meta else t.detach().clone()
        return own.to("cpu", torch.float64 if t.is_floating_point() else t.dtype)

    bare = detached_copy(layer, _random, tensor)
    for module in list(bare.modules()):
        if isinstance(module, _BatchNorm):
            _randomise(module)
        if parametrize.is_parametrized(module):
            _remove_parametrizations(module)
    return bare


def _random(p: Tensor) -> nn.Parameter:
    # This scale makes the first layer's output as large as its input, so that it reaches both sides of act's kinks.
    return nn.Parameter(numbers(*p.shape) * (2 / math.sqrt(p.shape[1]) if p.dim() > 1 else 1))


def _randomise(norm: _BatchNorm) -> None:
    """Give `norm` statistics, and factors away from 0: they would map the whole grid to its middle."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        t = getattr(norm, name)
        if isinstance(t, Tensor):
            drawn = numbers(*t.shape)
            if name == "weight":
                drawn = drawn + torch.copysign(torch.full_like(drawn, 0.5), drawn)
            t.data = drawn.abs() + 0.5 if name == "running_var" else drawn


def set_mode(layer: nn.Module, training: bool) -> None:
    """Set the mode of `layer` except that of its batch norms, which are folded in eval mode only."""
    layer.train(training)
    for module in layer.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _remove_parametrizations(module: nn.Module) -> None:
    """Replace the parametrized parameters of `module` by plain random ones.

    PyTorch's `remove_parametrizations` would delete their properties from the class, which the original layer shares.
    """
    lists = module._modules.pop("parametrizations")
    assert isinstance(lists, nn.ModuleDict)
    module.__class__ = type(module).__bases__[0]
    for name, parametrization in lists.items():
        largest = max(parametrization.parameters(recurse=False), key=Tensor.numel)
        module.register_parameter(name, _random(largest))


def trial_maps(shapes: list[tuple[int, ...]]) -> Iterator[Tensor]:
    """Maps of the ranks and numbers of channels that the weights allow, the likelier ones first; for each number of
    channels the maps with C last follow.

    All sizes differ and H > W, so that every mistaken axis or kernel size shows. N is so large that W1 z has room for
    the whole grid.
    """
    sizes = shapes[0][:2]
    spatial = [s for s in (2, 3, 5, 7, 11) if s not in sizes]
    n = max(2, -(-len(GRID) // min(sizes)))
    while n in (*sizes, *spatial):
        n += 1
    likely = max(1, len(shapes[0]) - 2) if len(shapes[0]) > 2 else 2
    for c in sorted(set(sizes), reverse=True):
        for rank in sorted((1, 2, 3), key=lambda rank: (rank != likely, rank != 3)):
            yield random_map(n, c, *spatial[rank - 1 :: -1])
        for rank in (2, 1):
            yield random_map(n, c, *spatial[rank - 1 :: -1]).movedim(1, -1).contiguous()


class _Plant(TorchDispatchMode):
    """Records each use of the weights and replaces its output by the grid."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.names: dict[int, str] = {}
        for prefix, module in layer.named_modules():
            for name, value in {**module._parameters, **module._buffers, **vars(module)}.items():
                if isinstance(value, Tensor):
                    self.names[value.untyped_storage().data_ptr()] = f"{prefix}.{name}".lstrip(".")

    def _name(self, args: tuple[Any, ...], position: int | None) -> str | None:
        t = None if position is None else args[position]
        return self.names.get(t.untyped_storage().data_ptr()) if isinstance(t, Tensor) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        where = _LAYERS.get(func)
        weight = self._name(args, where[1]) if where else None
        if where is None or weight is None:
            return out
        planted = GRID.repeat(-(-out.numel() // len(GRID)))[: out.numel()].reshape(out.shape)
        self.calls.append(Call(weight, self._name(args, where[2]), args[where[0]].clone(), planted))
        return planted.clone()


def trace(bare: nn.Module, x: Tensor, arity: int) -> Trace | None:
    """Run `bare` on `x`. Returns None unless the run is like SE's: y has the shape of x, and the input of the first
    fully connected layer is smaller than the map."""
    given = x.clone()
    # If a layer takes several inputs, the others may be the pooled map.
    pooled = [x.mean(tuple(range(2, x.dim())), keepdim=True)] * (arity - 1)
    try:
        with _Plant(bare) as plant:
            y = bare(given, *pooled)
    except Exception:  # foreign code may fail in any way on a map that it was not made for
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or not plant.calls:
        return None
    return Trace(x, y, plant.calls, not torch.equal(given, x)) if plant.calls[0].input.numel() < x.numel() else None
