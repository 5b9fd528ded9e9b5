"""What the examination of every block needs: what rules one out, a copy to run, its calls, and a map that it takes."""

from __future__ import annotations

import contextlib
import dis
import functools
import pickle
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import product
from types import BuiltinFunctionType, FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from .. import tracing
from ..code import asks_for_modes, functions_of
from ..inside import Inside, is_torch_or_builtin
from ..recognise import COPYING
from ..replaced import Replaced
from ..swap import Swap
from .calls import CONVOLUTIONS
from .program import Program, Value
from .trace import trace

_TRANSPARENT = (
    *(bool, int, float, complex, str, bytes, Enum, FunctionType, BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, Tensor, Swap),
)
# Names of functions that a program would call once, or never.
_SPEAKS = {"print", "warn"}
# By the number of sides; some blocks take only even ones. Volumes are small, because convolutions of them in float64
# are slow: MONAI's efficientnet-b0 in 3-D took 103 s with up to 500 positions, and takes 16 s with up to 64.
_SIDES = {1: ((9,), (6,)), 2: ((9, 8), (6, 11)), 3: ((3, 4, 2), (4, 3, 5))}
_EVEN_SIDES = {1: ((8,), (6,)), 2: ((8, 12), (6, 10)), 3: ((4, 6, 2), (2, 4, 8))}


def obstacle(module: nn.Module) -> str | None:
    """A property of `module` that keeps it from being a block and that tracing does not show."""
    try:
        return _obstacle(module)
    except Exception as error:  # foreign objects may fail in any way
        return f"its block cannot be looked through: {type(error).__name__}: {error}".splitlines()[0]


def _obstacle(module: nn.Module) -> str | None:
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
    act = next(filter(None, map(_acts_outside, map(type, module.modules()))), None)
    if act is not None:
        return f"a forward in its block {act}"
    inside = set(module.modules())
    named = ((name, value) for each in inside for name, value in vars(each).items())
    opaque = next((name for name, value in named if _is_opaque(value, inside)), None)
    if opaque is not None:
        return f"its block holds an object whose changes cannot be noticed: {opaque}"
    change = Inside(module, cls).change(module)  # such as hooks
    return None if change is None else f"in its block {change}"


@functools.cache
def _acts_outside(cls: type[Any]) -> str | None:
    """What the forward of a class, or a function that it names, does that its calls do not show; None if nothing."""
    for function, codes in functions_of(cls):
        for code in codes:
            if not _SPEAKS.isdisjoint(code.co_names):
                return "prints or warns"
            if any(each.opname == "STORE_GLOBAL" for each in dis.get_instructions(code)):
                return "writes to a global variable"
            for name in code.co_names:
                value = function.__globals__.get(name)
                if not isinstance(value, (ModuleType, type)) and _is_opaque(value, ()):
                    return f"uses a global object whose changes cannot be noticed, {name}"
    mode = asks_for_modes(cls)
    return f"asks for {mode}" if mode else None


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


def read(
    bare: nn.Module,
    leaves: Collection[nn.Module],
    extras: Mapping[str, Any] = MappingProxyType({}),
    sample: Tensor | None = None,
    modeless: Collection[nn.Module] = (),
) -> Program:
    """The calls of `bare`, as `trace` reads them. modeless: modules whose modes the forward may not read.

    Raises:
        Exception: as `trace` does.
        ValueError: if they depend on dtype, grad mode, inference mode, autocast or the mode of one of `modeless`.
    """
    # Two readings in which everything differs. They miss what depends on two of these at once, so `obstacle` refuses a
    # forward that asks for one of the modes by name.
    whole: list[FunctionType] = []
    with torch.enable_grad(), torch.autocast("cpu"), _autocast_on_gpus():
        program = trace(bare, leaves, extras, sample, whole=whole)
    bare.float().requires_grad_(False)
    try:
        with torch.inference_mode():
            other = trace(bare, leaves, extras, None if sample is None else sample.float(), modeless, whole)
    finally:
        bare.double().requires_grad_(True)
    if other != program:
        raise ValueError("its block makes other calls for another dtype, in another grad mode or under autocast")
    pickle.dumps(program)
    return program


@contextlib.contextmanager
def _autocast_on_gpus() -> Iterator[None]:
    """As torch.autocast("cuda"), which warns where there is no GPU."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@dataclass(frozen=True)
class Maps:
    """Maps that a forward takes: their channels, the sides of some, whether their channels are last, and whether all
    sides are even."""

    channels: int
    sides: tuple[tuple[int, ...], ...]
    is_last: bool
    is_even: bool

    def shape(self, n: int, spatial: Iterable[int]) -> tuple[int, ...]:
        return (n, *spatial, self.channels) if self.is_last else (n, self.channels, *spatial)


def maps_of(bare: nn.Module, program: Program | None, dims: int) -> Maps | None:
    """Maps of `dims` dimensions with which the forward of `bare` runs; program: its calls, if known."""
    readers = [call for call in program.calls if Value(0) in call.values()] if program else []
    first = [call.target for call in readers if call.kind == "module"]
    modules: list[Any] = [*map(bare.get_submodule, first), *bare.modules()]
    likely = [each.in_channels for each in modules if isinstance(each, CONVOLUTIONS)]
    likely += [each.num_features for each in modules if isinstance(each, _BatchNorm)]
    likely += [each.in_features for each in modules if isinstance(each, nn.Linear)]
    for call in readers:  # one that splits x has the numbers of channels of the parts
        likely += [sum(arg) for arg in call.args if isinstance(arg, (list, tuple)) and _are_numbers(arg)]
    likely += [size for p in bare.parameters() if p.dim() > 1 for size in p.shape[1::-1]]
    for is_last, is_even, c in product((False, True), (False, True), dict.fromkeys(likely)):
        maps = Maps(c, (_EVEN_SIDES if is_even else _SIDES)[dims - 2], is_last, is_even)
        with contextlib.suppress(Exception):  # of a number that does not fit, or anything else: the next one is tried
            for sides in maps.sides:  # of one alone, a side could be taken for the channels
                bare(tracing.random_map(*maps.shape(2, sides)))
            return maps
    return None


def _are_numbers(values: list[Any] | tuple[Any, ...]) -> bool:
    return all(type(value) is int for value in values)
