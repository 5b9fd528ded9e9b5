"""Finds the block of each SE layer: the smallest module whose forward shows what stands around the layer."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from .. import tracing
from ..backends import CPU
from ..equivalence import error_of
from ..inside import Inside, is_torch_or_builtin
from ..recognise import COPYING
from ..recognised import Recognised
from ..replaced import Replaced
from ..swap import Swap
from ..undisturbed import are_equal, random_states, undisturbed_inference
from . import fused
from .calls import CONVOLUTIONS
from .cost import WAYS
from .neighbours import Neighbours, join, join_norms
from .program import Program, Value, trace

# A residual block, or a block in which the layer is wrapped twice, is found at the second module above at the latest.
_LEVELS = 3
# Relative, in float64: the sums are taken in another order, but nothing else differs.
_TOLERANCE = 1e-10
_TRANSPARENT = (
    *(bool, int, float, complex, str, bytes, Enum, FunctionType, BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, Tensor, Swap),
)
# Some blocks take only maps of even sides.
_ANY_SIDES, _EVEN_SIDES = ((9, 8, 7), (6, 11, 5)), ((8, 12, 4), (6, 10, 8))
# Elements of the largest map that goes into a block for the comparison.
_REALISTIC = 2**17


@dataclass(frozen=True)
class Block:
    """A module whose forward can be computed by `program` on maps of `dims` dimensions.

    neighbours: of the SE layers in it.
    """

    module: nn.Module
    program: Program
    dims: int
    neighbours: tuple[Neighbours, ...]


def find_blocks(
    model: nn.Module, names: dict[nn.Module, list[str]], layers: dict[nn.Module, Recognised]
) -> tuple[list[Block], dict[nn.Module, str]]:
    """The blocks of these SE layers of `model`, inner ones first; and for each layer without one the reason.

    names: of every module of `model`, all its dotted names.
    """
    if not CPU.has_fast_path():
        return [], dict.fromkeys(layers, "the CPU kernels, with which its block is compared, are not available")
    alone: dict[nn.Module, str] = {}
    chosen: dict[nn.Module, list[nn.Module]] = {}
    for layer in layers:
        if len(names[layer]) > 1:
            alone[layer] = "it is used in several places"
            continue
        found = _block_of(model, names[layer][0], layers)
        if isinstance(found, str):
            alone[layer] = found
        else:
            chosen.setdefault(found, []).append(layer)
    blocks: list[Block] = []
    for module in sorted(chosen, key=lambda module: -names[module][0].count(".")):
        here = {layer: layers[layer] for layer in chosen[module]}
        found_block = _examine(module, here, {*layers, *(block.module for block in blocks)})
        if isinstance(found_block, str):
            alone |= dict.fromkeys(here, found_block)
        else:
            blocks.append(found_block)
    return blocks, alone


def _block_of(model: nn.Module, name: str, layers: dict[nn.Module, Recognised]) -> nn.Module | str:
    """The module above the layer `name` in which most of its neighbours are found, the smallest if several have as
    many; else the reason why there is none."""
    layer, best, reason = model.get_submodule(name), None, "it is not part of a block"
    most = 0
    for module in _above(model, name):
        found = _examine(module, {layer: layers[layer]}, set(layers), proves=False)
        if isinstance(found, str):
            reason = found if best is None else reason
            continue
        (neighbours,) = found.neighbours
        if neighbours.count() > most:
            best, most = module, neighbours.count()
        if not neighbours.at_edge:
            break
    return reason if best is None else best


def _above(model: nn.Module, name: str) -> Iterator[nn.Module]:
    for _ in range(_LEVELS):
        if not name:
            return
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)


def _examine(
    module: nn.Module, layers: dict[nn.Module, Recognised], replaced: set[nn.Module], proves: bool = True
) -> Block | str:
    """`module` as a block of these SE layers, or the reason why it is none.

    replaced: all modules of the model that will be replaced; those inside are called whole. proves: whether the program
    is completed, and compared with the forward.
    """
    reason = _obstacle(module)
    if reason is not None:
        return reason
    paths = {path: layers[each] for path, each in module.named_modules() if each in layers}
    inside = [each for each in module.modules() if each is not module]
    whole = [each for each in inside if each in replaced or isinstance(each, Replaced)]
    with undisturbed_inference(module) as put_back:
        try:
            bare = tracing.bare_copy(module)
            _draw_statistics(bare)
            of_bare = dict(zip(module.modules(), bare.modules(), strict=True))
            leaves = [of_bare[each] for each in whole]
            program = trace(bare, leaves)
            bare.float().requires_grad_(False)
            with torch.inference_mode():
                if trace(bare, leaves) != program:
                    return "its block makes other calls for another dtype, without gradients or in inference mode"
            bare.double().requires_grad_(True)
            pickle.dumps(program)
            program, neighbours = join(program, bare, paths)
            if len(neighbours) < len(paths):
                return "nothing that can be joined with it stands around it"
            dims, found = _dims(bare, neighbours[0]), None
            if proves:
                program = join_norms(program, bare)
                found = _mismatch(bare, program, dims)
        except Exception as error:  # foreign code may fail in any way, which must not end the examination of others
            return f"the calls of its block cannot be followed: {type(error).__name__}: {error}".splitlines()[0]
    if found is None and put_back:
        found = f"a call of its block changes {put_back[0]}"
    return found or Block(module, program, dims, tuple(neighbours))


def _obstacle(module: nn.Module) -> str | None:
    """A property of `module` that keeps it from being a block and that tracing does not show."""
    cls = type(module)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, torch._dynamo.OptimizedModule)):
        return "it is not part of a block"
    if isinstance(module, Replaced):
        return "its block is replaced already"
    if any(isinstance(each, torch.jit.ScriptModule) for each in module.modules()):
        return "its block is scripted by TorchScript"
    if any(parametrize.is_parametrized(each) for each in module.modules()):
        return "a module of its block is reparametrised"
    if any("forward" in vars(each) for each in module.modules()) or cls.__call__ is not nn.Module.__call__:
        return "a forward in its block is overridden on the object, or its class overrides __call__"
    if any(getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in COPYING):
        return f"the class {cls.__name__} of its block defines its own copying"
    inside = set(module.modules())
    named = ((name, value) for each in inside for name, value in vars(each).items())
    opaque = next((name for name, value in named if _is_opaque(value, inside)), None)
    if opaque is not None:
        return f"its block holds an object whose changes cannot be noticed: {opaque}"
    change = Inside(module, cls).change(module)  # such as hooks
    return None if change is None else f"in its block {change}"


def _is_opaque(value: Any, inside: Collection[nn.Module]) -> bool:
    """Whether the inside of `value` can change without a notice. inside: the modules that are watched."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list, set, deque)):
        return any(_is_opaque(each, inside) for each in value)
    if isinstance(value, nn.Module):
        return value not in inside
    if isinstance(value, type):
        return not (is_torch_or_builtin(value) or issubclass(value, (nn.Module, Enum)))
    return not (value is None or isinstance(value, _TRANSPARENT))


def _draw_statistics(bare: nn.Module) -> None:
    """Give batch norms statistics with which a mistake shows: new ones have the mean 0 and the variance 1."""
    for module in bare.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(tracing.numbers(module.num_features))
            module.running_var.copy_(tracing.numbers(module.num_features).abs() + 0.5)


def _dims(bare: nn.Module, neighbours: Neighbours) -> int:
    """The number of dimensions of the block's maps: that of its convolution, else that of the SE layer."""
    for module in bare.modules():
        if isinstance(module, CONVOLUTIONS):
            return len(module.kernel_size) + 2
    return 4 if 4 in neighbours.recognised.dims else neighbours.recognised.dims[0]


def _mismatch(bare: nn.Module, program: Program, dims: int) -> str | None:
    """How the program differs from the forward of `bare`; None if it does not."""
    found = _map_of(bare, program, dims)
    if found is None:
        return "no map that its block takes was found"
    c, sides = found
    side = max(4, 2 * round((_REALISTIC / c) ** (1 / (dims - 2)) / 2))
    realistic = (side + 1, side, side) if sides is _ANY_SIDES else (side + 2, side, side)
    shapes = [(n, c, *of[: dims - 2]) for n, of in zip((2, 3, 1), (*sides, realistic), strict=True)]
    hows = [fused.How.of(program, bare, CPU.unchecked, way) for way in WAYS]
    runs = [program.bind(bare, partial(fused.bind, root=bare, how=how)) for how in hows]
    before = Inside(bare, type(bare))
    buffers = {name: buffer.clone() for name, buffer in bare.named_buffers()}
    maps = [tracing.random_map(*shape) for shape in shapes]
    maps += [maps[0] * 1e8, maps[1] * 1e-8]
    states = random_states()
    for x in maps:
        given = x.clone()
        wanted = bare(given)
        if not isinstance(wanted, Tensor):
            return "its block returns more than a map"
        for run in runs:
            if not torch.equal(given, x):
                return "its block writes over its input"
            got = run(given)
            error = error_of(got, wanted) if got.shape == wanted.shape else float("inf")
            if error > _TOLERANCE:
                where = f"on a map of shape {list(x.shape)}"
                return f"its block, joined, differs by {error:.1e} of its largest number, {where}"
    if not are_equal(states, random_states()):
        return "its block draws random numbers"
    if any(not torch.equal(buffer, buffers[name]) for name, buffer in bare.named_buffers()):
        return "a call changes a buffer of its block"
    change = before.change(bare, marks=True)
    return f"a call leaves something behind in its block: {change}" if change else None


def _map_of(bare: nn.Module, program: Program, dims: int) -> tuple[int, tuple[tuple[int, ...], ...]] | None:
    """A number of channels, and sides, of maps with which the forward of `bare` runs."""
    readers = [call for call in program.calls if Value(0) in call.values()]
    first = [call.target for call in readers if call.kind == "module"]
    modules: list[Any] = [*map(bare.get_submodule, first), *bare.modules()]
    likely = [each.in_channels for each in modules if isinstance(each, CONVOLUTIONS)]
    likely += [each.num_features for each in modules if isinstance(each, _BatchNorm)]
    likely += [each.in_features for each in modules if isinstance(each, nn.Linear)]
    for call in readers:  # one that splits x has the numbers of channels of the parts
        likely += [sum(arg) for arg in call.args if isinstance(arg, (list, tuple)) and _are_numbers(arg)]
    for sides in (_ANY_SIDES, _EVEN_SIDES):
        for c in dict.fromkeys(likely):
            try:
                bare(tracing.random_map(2, c, *sides[0][: dims - 2]))
            except Exception:  # of a number that does not fit, or anything else: then the next one is tried
                continue
            return c, sides
    return None


def _are_numbers(values: list[Any] | tuple[Any, ...]) -> bool:
    return all(type(value) is int for value in values)
