"""Finds the block of each SE layer: the smallest module whose forward shows what stands around the layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial

import torch
from torch import Tensor, nn

from .. import tracing
from ..alike import Alike, paths_of
from ..backends import CPU
from ..equivalence import error_of
from ..inside import Inside
from ..recognised import Recognised
from ..replaced import Replaced
from ..undisturbed import are_equal, random_states, undisturbed_inference
from . import fused
from .calls import CONVOLUTIONS
from .cost import WAYS
from .examine import maps_of, obstacle, read
from .forwards import InlineBlock, Kind, arguments_for
from .neighbours import Neighbours, join, join_norms
from .program import Program

# A residual block, or a block in which the layer is wrapped twice, is found at the second module above at the latest.
_LEVELS = 3
# Relative, in float64: the sums are taken in another order, but nothing else differs.
_TOLERANCE = 1e-10
# Elements of the largest map that goes into a block for the comparison.
_REALISTIC = 2**17


@dataclass(frozen=True)
class Block:
    """A module whose forward can be computed by these programs, on maps of `dims` dimensions.

    joined: by the kind of the call, those for inference, in which layers are joined with their neighbours. inline:
    those in which each SE layer that is written into the forward is one call. neighbours: of the SE layers in it.
    """

    module: nn.Module
    joined: dict[Kind, Program]
    inline: dict[Kind, Program]
    dims: int
    neighbours: tuple[Neighbours, ...]


def find_blocks(
    model: nn.Module,
    names: dict[nn.Module, list[str]],
    layers: dict[nn.Module, Recognised],
    written: dict[nn.Module, InlineBlock],
    alike: Alike,
) -> tuple[list[Block], dict[nn.Module, str]]:
    """The blocks of these SE layers of `model`, inner ones first; and for each layer without one the reason.

    names: of every module of `model`, all its dotted names. written: the modules with SE written into their forwards.
    alike: what was found in modules of the same structure.
    """
    if not CPU.has_fast_path():
        reason = "the CPU kernels, with which its block is compared, are not available"
        return [], dict.fromkeys((*layers, *written), reason)
    alone: dict[nn.Module, str] = {}
    chosen: dict[nn.Module, list[nn.Module]] = {}
    for layer in layers:
        if len(names[layer]) > 1:
            alone[layer] = "it is used in several places"
            continue
        found = _block_of(model, names[layer][0], layers, written, alike)
        if isinstance(found, str):
            alone[layer] = found
        else:
            chosen.setdefault(found, []).append(layer)
    blocks: list[Block] = []
    for block in written.values():
        # Blocks of the same structure share their forwards.
        joined = alike.once(_join_inline, block.module, block, facts=id(block.forwards))
        if isinstance(joined, str):
            alone[block.module] = joined
        else:
            blocks.append(changed(joined, module=block.module))
    for module in sorted(chosen, key=lambda module: -names[module][0].count(".")):
        here = {layer: layers[layer] for layer in chosen[module]}
        found_block = _examined(module, here, {*layers, *written, *(block.module for block in blocks)}, alike)
        if isinstance(found_block, str):
            alone |= dict.fromkeys(here, found_block)
        else:
            blocks.append(found_block)
    return blocks, alone


def _examined(
    module: nn.Module, layers: dict[nn.Module, Recognised], replaced: set[nn.Module], alike: Alike, proves: bool = True
) -> Block | str:
    """`_examine`, or what it found in a module of the same structure."""
    facts = paths_of(layers, module), tuple(layers.values()), paths_of(replaced, module), proves
    found = alike.once(_examine, module, layers, replaced, proves, facts=facts)
    return found if isinstance(found, str) else changed(found, module=module)


def _block_of(
    model: nn.Module,
    name: str,
    layers: dict[nn.Module, Recognised],
    written: Collection[nn.Module],
    alike: Alike,
) -> nn.Module | str:
    """The module above the layer `name` in which most of its neighbours are found, the smallest if several have as
    many; else the reason why there is none."""
    layer, best, reason = model.get_submodule(name), None, "it is not part of a block"
    most = 0
    for module in _above(model, name):
        if module in written:
            return "another layer is written into the forward of its block"
        found = _examined(module, {layer: layers[layer]}, {*layers, *written}, alike, proves=False)
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
    module: nn.Module, layers: dict[nn.Module, Recognised], replaced: set[nn.Module], proves: bool
) -> Block | str:
    """`module` as a block of these SE layers, or the reason why it is none.

    replaced: all modules of the model that will be replaced; those inside are called whole. proves: whether the program
    is completed, and compared with the forward.
    """
    reason = obstacle(module)
    if reason is not None:
        return reason
    paths = {path: layers[each] for path, each in module.named_modules() if each in layers}
    inside = [each for each in module.modules() if each is not module]
    whole = [each for each in inside if each in replaced or isinstance(each, Replaced)]
    with undisturbed_inference(module) as put_back:
        try:
            bare = tracing.bare_copy(module)
            kind = Kind.of(False, {}, arguments_for(type(module)))[0]
            of_bare = dict(zip(module.modules(), bare.modules(), strict=True))
            program = read(bare, [of_bare[each] for each in whole])
            program, neighbours = join(program, bare, paths)
            if len(neighbours) < len(paths):
                return "nothing that can be joined with it stands around it"
            dims, found = _dims(bare, neighbours[0]), None
            if proves:
                program = join_norms(program, bare)
                found = _mismatch(bare, program, dims, kind)
        except Exception as error:  # foreign code may fail in any way, which must not end the examination of others
            return f"the calls of its block cannot be followed: {type(error).__name__}: {error}".splitlines()[0]
    if found is None and put_back:
        found = f"a call of its block changes {put_back[0]}"
    return found or Block(module, {kind: program}, {}, dims, tuple(neighbours))


def _join_inline(module: nn.Module, block: InlineBlock) -> Block | str:
    """`block` with its inline layers joined with their neighbours, or the reason why they are not."""
    joined: dict[Kind, Program] = {}
    neighbours: list[Neighbours] = []
    with undisturbed_inference(module):
        bare = tracing.bare_copy(module)
        for kind, inline in block.forwards.items():
            if kind.training:
                continue
            known = next((done for other, done in joined.items() if block.forwards[other] == inline), None)
            try:
                program, found = join(inline, bare, {})
                program = join_norms(program, bare)
                reason = _mismatch(bare, program, block.dims, kind) if known is None else None
            except Exception as error:  # foreign code may fail in any way
                reason = f"its block cannot be joined: {type(error).__name__}: {error}".splitlines()[0]
            if reason is not None:
                if not joined:
                    return reason
                continue
            joined[kind] = known or program
            neighbours = neighbours or found
    if not neighbours:
        return "nothing that can be joined with it stands around it"
    return Block(module, joined, block.forwards, block.dims, tuple(neighbours))


def _dims(bare: nn.Module, neighbours: Neighbours) -> int:
    """The number of dimensions of the block's maps: that of its convolution, else that of the SE layer."""
    for module in bare.modules():
        if isinstance(module, CONVOLUTIONS):
            return len(module.kernel_size) + 2
    return 4 if 4 in neighbours.recognised.dims else neighbours.recognised.dims[0]


def _mismatch(bare: nn.Module, program: Program, dims: int, kind: Kind) -> str | None:
    """How the program differs from the forward of `bare`, in calls of this kind; None if it does not."""
    given, numbers = kind.examples(arguments_for(type(bare)))
    taken = maps_of(bare, program, dims)
    if taken is None:
        return "no map that its block takes was found"
    side = max(4, 2 * round((_REALISTIC / taken.channels) ** (1 / (dims - 2)) / 2))
    realistic = (side + 1 + taken.is_even, *(side,) * (dims - 3))
    shapes = [taken.shape(n, sides) for n, sides in zip((2, 3, 1), (*taken.sides, realistic), strict=True)]
    hows = [fused.How.of(program, bare, CPU.unchecked, way) for way in WAYS]
    runs = [program.bind(bare, partial(fused.bind, root=bare, how=how)) for how in hows]
    before = Inside(bare, type(bare))
    buffers = {name: buffer.clone() for name, buffer in bare.named_buffers()}
    maps = [tracing.random_map(*shape) for shape in shapes]
    maps += [maps[0] * 1e8, maps[1] * 1e-8]
    states = random_states()
    for x in maps:
        x_given = x.clone()
        wanted = bare(x_given, **given)
        if not isinstance(wanted, Tensor):
            return "its block returns more than a map"
        for run in runs:
            if not torch.equal(x_given, x):
                return "its block writes over its input"
            got = run(x_given, *numbers)
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
