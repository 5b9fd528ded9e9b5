"""Reads a forward with SE written into it, in each mode and for each kind of arguments, and compares results."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .. import tracing
from ..equivalence import FORMULA_TOLERANCE, GRADIENT_TOLERANCE, error_of
from ..inside import Inside
from ..recognised import Recognised
from ..replaced import Replaced
from ..swap import is_same
from ..undisturbed import undisturbed_inference
from . import fused
from .calls import CONVOLUTIONS
from .examine import maps_of, obstacle, read
from .inline import Parts
from .program import Number, Program


class Mark(Enum):
    """An argument that has the default value of its parameter, and one that may have any value."""

    DEFAULT = "default"
    OTHER = "other"


class Kind(NamedTuple):
    """What a program depends on: the mode, and each argument after x. Of a number only whether it is 0 counts."""

    training: bool
    arguments: tuple[Any, ...]

    @classmethod
    def of(cls, training: bool, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[Kind, list[Any]]:
        """The kind of a call with these further arguments, and the numbers among them that a program takes."""
        if not given:
            return cls(training, (Mark.DEFAULT,) * len(defaults)), []
        if not given.keys() <= defaults.keys():
            return cls(training, (Mark.OTHER,)), []
        arguments, numbers = list[Any](), list[Any]()
        for name, default in defaults.items():
            value = given.get(name, default)
            arguments.append(_kind_of(value, default))
            if isinstance(arguments[-1], Number):
                numbers.append(value)
        return cls(training, tuple(arguments)), numbers

    def examples(self, names: Collection[str]) -> tuple[dict[str, Any], list[Any]]:
        """Arguments of a call of this kind, and the numbers among them."""
        kinds = dict(zip(names, self.arguments, strict=True))
        given = {
            name: kind.example if isinstance(kind, Number) else kind
            for name, kind in kinds.items()
            if kind is not Mark.DEFAULT
        }
        return given, [value for name, value in given.items() if isinstance(kinds[name], Number)]


def _kind_of(value: Any, default: Any) -> Any:
    if is_same(value, default):
        return Mark.DEFAULT
    if type(value) in (int, float):
        return Number(type(value), value == 0)
    return value if value is None or type(value) in (bool, str) else Mark.OTHER


@dataclass(frozen=True)
class InlineBlock:
    """A module with SE layers written into its forward, for maps of `dims` dimensions.

    forwards: the programs in which each of them is one call. layers: the SE layers.
    """

    module: nn.Module
    forwards: dict[Kind, Program]
    dims: int
    layers: tuple[Recognised, ...]


def find_inline(module: nn.Module, known: Collection[nn.Module] = ()) -> InlineBlock | str | None:
    """`module`, if SE layers that can be replaced are written into its forward; a reason why not, if something there
    resembles one; else None. known: modules inside that are called whole."""
    reason = obstacle(module)
    if reason is not None or tracing.arity(module) > 1:
        return reason
    with undisturbed_inference(module) as put_back:
        try:
            bare = tracing.bare_copy(module)
            pairs = zip(module.modules(), bare.modules(), strict=True)
            leaves = [own for each, own in list(pairs)[1:] if isinstance(each, Replaced) or each in known]
            found = None
            for dims, shapes in _shapes(bare):
                found = _read(module, bare, leaves, dims, shapes) or found
                if isinstance(found, InlineBlock):
                    break
        except Exception as error:  # foreign code may fail in any way, which must not end the examination of others
            return f"its calls cannot be followed: {type(error).__name__}: {error}".splitlines()[0]
    if put_back and isinstance(found, InlineBlock):
        return f"a call of it changes {put_back[0]}"
    return found


def _read(
    module: nn.Module, bare: nn.Module, leaves: list[nn.Module], dims: int, shapes: list[tuple[int, ...]]
) -> InlineBlock | str | None:
    """What `find_inline` returns, for maps of `dims` dimensions. bare: a copy to run, whose modules `leaves` are called
    whole. shapes: of maps that it takes.

    The first kind of call, that of inference with the defaults, decides; others that fail compute as before.
    """
    parts, forwards = Parts(), dict[Kind, Program]()
    compared: list[tuple[bool, Program]] = []
    arguments = arguments_for(type(module))
    layers: list[Recognised] = []
    sample = tracing.random_map(*shapes[0])
    for kind in (*_kinds(False, arguments), *_kinds(True, arguments)):
        extras = {name: each for name, each in zip(arguments, kind.arguments, strict=True) if each is not Mark.DEFAULT}
        try:
            # The mode of a module with children must be that of the block, which is asked in each call.
            childless = [each for each in bare.modules() if not each._modules and each is not bare]
            program = read(bare.train(kind.training), leaves, extras, sample, childless)
            program, inline = parts.rewrite(program, bare, (sample, *kind.examples(arguments)[1]))
            reason = parts.reason
            if inline:
                is_known = (kind.training, program) in compared
                reason = _difference(bare, program, shapes[is_known:], *kind.examples(arguments))
                compared.append((kind.training, program))
        except Exception:  # foreign code may fail in any way, in other calls than those of inference
            if not forwards:
                raise
            continue
        if not forwards and (reason or not inline):
            return reason
        if inline and reason is None:
            forwards[kind] = program
            layers = layers or [each.recognised for each in inline]
    return InlineBlock(module, forwards, dims, tuple(layers))


def arguments_for(cls: type[nn.Module]) -> dict[str, Any]:
    """The arguments after x of the forward of a class, with their defaults."""
    _, _, *others = inspect.signature(cls.forward).parameters.values()
    return {p.name: p.default for p in others if p.default is not p.empty}


def _kinds(training: bool, arguments: dict[str, Any]) -> Iterator[Kind]:
    """The defaults, and if there is just one argument, what else it may be."""
    yield Kind(training, (Mark.DEFAULT,) * len(arguments))
    for default in arguments.values() if len(arguments) == 1 else ():
        if isinstance(default, bool):
            yield Kind(training, (not default,))
        elif default is None or isinstance(default, (int, float)):
            of = float if default is None else type(default)
            yield from (Kind(training, (Number(of, is_zero),)) for is_zero in (True, False))


def _shapes(bare: nn.Module) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """Numbers of dimensions of maps that `bare` takes, one unless it has no convolutions, each with two shapes.

    Raises:
        ValueError: if there are none.
    """
    ranks = [len(each.kernel_size) + 2 for each in bare.modules() if isinstance(each, CONVOLUTIONS)]
    takes_any = False
    for dims in dict.fromkeys([*ranks[:1], 4, 3, 5]):
        maps = maps_of(bare.eval(), None, dims)
        if maps is not None:
            takes_any = True
            yield dims, [maps.shape(n, sides) for n, sides in zip((2, 3), maps.sides, strict=True)]
            if ranks:
                return
    if not takes_any:
        raise ValueError("no map that it takes was found")


def _difference(
    bare: nn.Module, program: Program, shapes: list[tuple[int, ...]], given: dict[str, Any], numbers: list[Any]
) -> str | None:
    """How results, gradients, buffers or random numbers of `program` and of the forward differ; None if they do not."""
    bind = partial(fused.bind, root=bare, how=fused.How.of(program, bare, None))
    joined = program.bind(bare, bind)
    before = Inside(bare, type(bare))
    for shape in shapes:
        x, grad = tracing.random_map(*shape), shape is not shapes[-1]
        if not grad and x.dim() > 3:  # where a call may copy the map, or not
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        wanted = _run(bare, lambda x: bare(x, **given), x, grad)
        got = _run(bare, lambda x: joined(x, *numbers), x, grad)
        what = next((what for what in wanted if not _agree(got[what], wanted[what], what)), None)
        if what is not None:
            where = f"in {'train' if bare.training else 'eval'} mode on a map of shape {list(shape)}"
            return f"its {what} differ from those with one call for each SE layer, {where}"
    change = before.change(bare, marks=True)
    return f"a call leaves something behind in it: {change}" if change else None


def _run(bare: nn.Module, call: Callable[[Tensor], Any], x: Tensor, grad: bool) -> dict[str, list[Any]]:
    """What a call computes and changes, from the same state of buffers and random numbers."""
    buffers = {name: buffer.clone() for name, buffer in bare.named_buffers()}
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too
    leaf = x.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        given = leaf.clone()  # the forward may write to it
        leaves, structure = _pytree.tree_flatten(call(given))
    found: dict[str, list[Any]] = {"results": leaves, "structures": [structure], "inputs": [given]}
    found["random numbers"] = [torch.get_rng_state()]
    found["buffers"] = [buffer.clone() for buffer in bare.buffers()]
    outputs = [y for y in leaves if isinstance(y, Tensor) and y.requires_grad]
    if outputs:
        weights = [tracing.numbers(*y.shape).reshape(y.shape) for y in outputs]
        inputs = [leaf, *bare.parameters()]
        found["gradients"] = list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))
    with torch.no_grad():
        for name, buffer in bare.named_buffers():
            buffer.copy_(buffers[name])
    return found


def _agree(got: list[Any], wanted: list[Any], what: str) -> bool:
    tolerance = GRADIENT_TOLERANCE if what == "gradients" else FORMULA_TOLERANCE
    return len(got) == len(wanted) and all(_is_close(*pair, tolerance) for pair in zip(got, wanted, strict=True))


def _is_close(got: Any, wanted: Any, tolerance: float) -> bool:
    if not isinstance(got, Tensor) or not isinstance(wanted, Tensor):
        return type(got) is type(wanted) and bool(got == wanted)
    if got.shape != wanted.shape or got.dtype is not wanted.dtype or got.requires_grad is not wanted.requires_grad:
        return False
    if not wanted.is_floating_point() or wanted.numel() == 0:
        return torch.equal(got, wanted)
    return error_of(got, wanted) <= tolerance
