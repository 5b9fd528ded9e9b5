"""Spellings of SE are replaced, what only resembles it is not, and no mutant of them computes anything else afterwards.

Whether a replacement is right is decided by running: model and original are compared in results, gradients, what a call
leaves behind, and random states, in both modes, two dtypes and three sizes.
"""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Callable
from itertools import cycle, product
from typing import Any, NamedTuple

import pytest
import torch
from spellings import BLOCKS, LOG, MUTANTS, RELATIVES, SE, SPELLINGS, Block, C, steps
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import se_fused
from se_fused.recognised import Recognised
from se_fused.report import Report

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]

SIZES = ((2, 5, 3, 4), (3, 7, 9, 3), (1, 40, 33, 2))
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
# Sums over all positions cancel: to 6e-5 of the largest number on maps of 40 x 33.
GRADIENT_TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-9}
# The backward of PyTorch's hard sigmoid and hardswish multiplies float64 by a float32 1/6.
ROUGH, ROUGH_TOLERANCE = re.compile("F.hardsigmoid|hardswish|EffectiveSEModule"), 1e-7

WRITTEN = {
    name: spelling
    for name, spelling in SPELLINGS.items()
    if spelling.verdict == "fused" and isinstance(spelling.make, type) and issubclass(spelling.make, SE)
}
# Each spelling with one mutant; each mutant comes up at least twice.
PAIRS = list(zip(WRITTEN, cycle(MUTANTS)))


class Outcome(NamedTuple):
    """What a call gives and leaves behind. values: by name, tensors to be equal up to rounding. exact: all else."""

    values: dict[str, Tensor]
    exact: dict[str, Any]


class Operators(TorchDispatchMode):
    """Counts the calls of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.namespace == "se_fused"
        return func(*args, **(kwargs or {}))


def random_like(t: Tensor) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(t.numel())).to(t.dtype)


def maps_of(model: nn.Module, size: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Tensor]:
    """Random maps, of which the first sample of three has channels of zeros, where all positions are the maximum."""
    n, *spatial = size
    shape = (n, C, *spatial[: getattr(model, "dims", 4) - 2])
    is_last = getattr(model, "is_last", False)
    drawn = torch.Generator().manual_seed(n)
    offsets = torch.randn(*shape[:2], *(1 for _ in shape[2:]), generator=drawn)
    maps = [(torch.randn(shape, generator=drawn) + offsets).to(dtype) for _ in range(count)]
    for x in maps if n == 3 else ():
        x[0, ::2] = 0
    return [x.movedim(1, -1).contiguous() for x in maps] if is_last else maps


def attributes(model: nn.Module) -> dict[str, Any]:
    """What the modules hold beside parameters and children, by name."""
    own = vars(nn.Module()).keys()
    return {
        f"{name}.{key}{path}": value
        for name, module in model.named_modules()
        for key, held in {**vars(module), **module._buffers}.items()
        if key not in own and not key.startswith("_se_")
        for path, value in ((_pytree.keystr(p), v) for p, v in _pytree.tree_flatten_with_path(held)[0])
    }


def call(model: nn.Module, maps: list[Tensor], options: dict[str, Any]) -> Outcome:
    """Run `model` with and without gradients. A refusal counts too: of a batch norm on one number, of autograd after a
    write."""
    LOG.clear()
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes 2 ms, for GPUs
    values, exact = {}, {}
    for grad in (False, True):
        leaves = [m.clone().requires_grad_(grad) for m in maps]
        try:
            with torch.set_grad_enabled(grad):
                y = model(*leaves, **options)
        except ValueError as refusal:
            return Outcome({}, {"the call": str(refusal)})
        results = [t for t in _pytree.tree_leaves(y) if isinstance(t, Tensor)]
        values |= {f"result {i}, {grad=}": t.detach() for i, t in enumerate(results)}
        values |= {f"map {i} afterwards, {grad=}": t.detach().clone() for i, t in enumerate(leaves)}
        exact[f"the results, {grad=}"] = type(y), [(t.dtype, t.shape, t.requires_grad) for t in results]
    exact["random numbers"] = float(torch.rand(()))
    wanted = {f"map {i}": m for i, m in enumerate(leaves)} | dict(model.named_parameters())
    recorded = [t for t in results if t.requires_grad]
    gradients: Any = [None] * len(wanted)
    if recorded:
        weights = [random_like(t) for t in recorded]
        try:
            gradients = torch.autograd.grad(recorded, list(wanted.values()), weights, allow_unused=True)
        except RuntimeError as refusal:
            exact["the backward"] = type(refusal)
    values |= {f"the gradient of {name}": g for name, g in zip(wanted, gradients, strict=True) if g is not None}
    for name, held in (attributes(model) | {f"LOG[{i}]": each for i, each in enumerate(LOG)}).items():
        if isinstance(held, Tensor):
            values[name] = held.detach().clone()
            exact[name] = held.dtype, held.requires_grad
        elif isinstance(held, float):
            values[name] = torch.tensor(held, dtype=torch.float64)
        else:
            exact[name] = held if isinstance(held, (int, str, type(None))) else type(held)
    return Outcome(values, exact)


def difference(got: nn.Module, wanted: nn.Module, rough: bool = False) -> str | None:
    """Where two models differ; None if they do not. Both end in float64 and training mode."""
    inputs, calls = getattr(wanted, "inputs", (1,)), getattr(wanted, "calls", ({},))
    for dtype, tolerance in TOLERANCE.items():
        got.to(dtype), wanted.to(dtype)
        got.load_state_dict(wanted.state_dict())  # calls in float32 have left statistics that differ by rounding
        for training, size, count, options in product((False, True), SIZES, inputs, calls):
            got.train(training), wanted.train(training)
            maps = maps_of(wanted, size, count, dtype)
            of_gradients = max(GRADIENT_TOLERANCE[dtype], ROUGH_TOLERANCE if rough else 0)
            found = differing(call(got, maps, options), call(wanted, maps, options), tolerance, of_gradients)
            if found is not None:
                return f"{found}: {dtype}, {training=}, {size=}, maps={count}, {options=}"
    return None


def differing(got: Outcome, wanted: Outcome, tolerance: float, of_gradients: float) -> str | None:
    if got.exact != wanted.exact:
        return f"not the same: {sorted({*map(str, got.exact.items())} ^ {*map(str, wanted.exact.items())})}"
    if got.values.keys() != wanted.values.keys():
        return f"only one of them has: {sorted(got.values.keys() ^ wanted.values.keys())}"
    for name, b in wanted.values.items():
        a = got.values[name]
        bound = of_gradients if name.startswith("the gradient") else tolerance
        a, b, odd = a.double(), b.double(), ~b.isfinite()
        if not torch.allclose(a[odd], b[odd], equal_nan=True):
            return f"{name} differs where it is not finite"
        a, b = a.masked_fill(odd, 0), b.masked_fill(odd, 0)
        error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
        if not error <= bound:
            return f"{name} is off by {error:.1e} of its largest number"
    return None


def examined(make: Callable[[], nn.Module], name: str) -> tuple[nn.Module, nn.Module, Report]:
    """A model after `replace`, the same before it, and the report."""
    torch.manual_seed(zlib.crc32(name.encode()))
    model = make()
    for module in model.modules():
        # In training on one map, the mean over all positions after a batch norm is its bias: zero at first, so that
        # gradients are nothing but rounding.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    original = copy.deepcopy(model)
    return model, original, se_fused.replace(model)


def layers_in(report: Report) -> list[Recognised]:
    inside = getattr(report, "inline", {})
    return [*report.replaced.values(), *(layer for layers in inside.values() for layer in layers)]


def test_the_table_is_large() -> None:
    assert len(SPELLINGS) >= 120
    assert len(SPELLINGS) == len({**BLOCKS, **RELATIVES}) + len(steps())
    assert {spelling.verdict for spelling in SPELLINGS.values()} == {"fused", "kept", "open", "far"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    spelling = SPELLINGS[name]
    model, original, report = examined(spelling.make, name)
    assert difference(model, original, rough=bool(ROUGH.search(name))) is None
    mentions = {**report.skipped, **report.near, **getattr(report, "seen", {})}
    layers = layers_in(report)
    if spelling.verdict == "fused":
        assert len(layers) == spelling.layers, mentions
        with Operators() as operators:
            model.eval()(*maps_of(model, SIZES[0], 1, torch.float64))
        assert operators.calls >= spelling.layers
    elif spelling.verdict == "open":
        assert layers or mentions
    else:
        assert layers == []
        assert mentions or spelling.verdict == "far"
        assert not spelling.reason or any(re.search(spelling.reason, reason) for reason in mentions.values()), mentions


@pytest.mark.parametrize(("name", "mutant"), PAIRS)
def test_mutant_computes_as_before(name: str, mutant: str) -> None:
    model, original, _ = examined(MUTANTS[mutant](WRITTEN[name].make), name)
    assert difference(model, original, rough=bool(ROUGH.search(name))) is None


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_differs_from_its_original(mutant: str) -> None:
    original, changed = Block(), MUTANTS[mutant](Block)()
    changed.load_state_dict(original.state_dict())
    assert changed.inputs != original.inputs or difference(original, changed) is not None
