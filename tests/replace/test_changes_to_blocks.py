"""What happens to a block after `replace(model, level="block")`: modes, changes, copies, and who watches its calls."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
from se_blocks import C, Deep, Inverted, assert_same, drawn, image
from torch import Tensor, nn
from torch.nn.utils import prune

import se_fused
from se_fused import replace, restore
from se_fused.blocks import FusedBlock

pytestmark = pytest.mark.usefixtures("one_thread", "known_layers")


def test_in_training_it_is_the_layer_level() -> None:
    model = drawn(Inverted())
    layer = copy.deepcopy(model)
    replace(model, level="block")
    replace(layer)
    for training in (False, True):
        for each in (model, layer):
            each.train(training)
        x = image()
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [each(own) for each, own in zip((model, layer), xs, strict=True)]
        assert torch.equal(*ys)
        gradients = [
            torch.autograd.grad(y.square().sum(), [own, *each.parameters()])
            for each, own, y in zip((model, layer), xs, ys, strict=True)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.equal(model.bn1.running_mean, layer.bn1.running_mean)


def test_one_batch_norm_in_training() -> None:
    model, x = drawn(Inverted()), image()
    replace(model, level="block")
    model.bn1.train()
    original = restore(copy.deepcopy(model))
    with torch.no_grad():
        assert_same(model(x), original(x))
    assert torch.equal(model.bn1.running_mean, original.bn1.running_mean)


def _load(model: nn.Module) -> None:
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})


def _write_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)
    model.bn2.running_var.data.mul_(3)


def _new_parameter(model: nn.Module) -> None:
    for conv in (model.expand, model.project):
        conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def _new_statistics(model: nn.Module) -> None:
    model.bn1.running_mean = torch.randn(C)


def _prune(model: nn.Module) -> None:
    prune.random_unstructured(model.project, "weight", 0.5)


def _reset(model: nn.Module) -> None:
    model.bn1.reset_running_stats()


def _drop_statistics(model: nn.Module) -> None:
    model.bn2.running_mean = model.bn2.running_var = None


def _drop_other_statistics(model: nn.Module) -> None:
    for norm in (model.bn0, model.bn1):
        norm.running_mean = norm.running_var = None


CHANGES_OF_NUMBERS = [
    _drop_statistics,
    _drop_other_statistics,
    _load,
    _write_data,
    _new_parameter,
    _new_statistics,
    _prune,
    _reset,
    nn.Module.double,
]


CHANGES_OF_STRUCTURE = {
    "act": lambda model: setattr(model, "act", nn.ReLU()),
    "eps": lambda model: setattr(model.bn1, "eps", 0.5),
    "padding": lambda model: setattr(model.conv, "padding_mode", "reflect"),
    "project": lambda model: setattr(model, "project", nn.Conv2d(C, C, 1, groups=2)),
    "gate": lambda model: setattr(model.se, "scale_activation", nn.Hardsigmoid()),
}


@pytest.mark.parametrize("change", CHANGES_OF_NUMBERS)
def test_changes_of_numbers(change) -> None:
    model, x = drawn(Deep()), image()
    replace(model, level="block")
    with torch.no_grad():
        model(x)
    change(model)
    x = x.to(model.conv.weight.dtype)
    with torch.no_grad():
        y = model(x)
        assert_same(y, restore(model)(x))


@pytest.mark.parametrize("name", ["expand", "bn0", "conv", "bn1", "se", "project", "bn2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_module_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    """The block raises where the original does, and else computes the same."""
    model, x = drawn(Deep()), image()
    replace(model, level="block")
    getattr(model, name).to(dtype)
    results = []
    for each in (model, restore(copy.deepcopy(model))):
        try:
            with torch.no_grad():
                results.append(each(x))
        except RuntimeError as error:
            results.append(type(error))
    if isinstance(results[1], Tensor):
        assert_same(*results)
    else:
        assert results[0] is results[1]


class Doubling(Tensor):
    """A weight whose reader gets twice its values."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            args = [each.as_subclass(Tensor) * 2 if isinstance(each, Doubling) else each for each in args]
            return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["expand", "bn0", "conv", "bn1", "project", "bn2"])
def test_a_weight_of_a_subclass(name: str) -> None:
    model, x = drawn(Deep()), image()
    replace(model, level="block")
    named = getattr(model, name)._parameters
    named["weight"] = named["weight"].detach().as_subclass(Doubling)
    with torch.no_grad():
        y = model(x)
        assert_same(y, restore(model)(x))


@pytest.mark.parametrize("change", CHANGES_OF_STRUCTURE)
def test_changes_of_structure(change: str, caplog) -> None:
    model, x = drawn(Inverted()), image()
    replace(model, level="block")
    CHANGES_OF_STRUCTURE[change](model)
    original = restore(copy.deepcopy(model))
    with torch.no_grad(), caplog.at_level(logging.WARNING, "se_fused"):
        for _ in range(2):
            assert_same(model(x), original(x))
    assert "a replaced Inverted computes as it did before" in caplog.text


def test_hooks() -> None:
    """A hook inside a block, which reads a map that would not exist there, sees what it always saw."""
    model, x, seen = drawn(Inverted()), image(), []
    wanted = model.act(model.bn1(model.conv(x)))
    replace(model, level="block")
    handle = model.act.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        model(x)
        assert torch.equal(seen[0], wanted)
        handle.remove()
        model(x)
    assert len(seen) == 1
    model.register_forward_hook(lambda module, args, y: y + 1)
    with torch.no_grad():
        assert_same(model(x), restore(copy.deepcopy(model))(x))


def test_a_list_that_the_forward_reads() -> None:
    class Listed(Inverted):
        def __init__(self) -> None:
            super().__init__()
            self.extra: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + sum(self.extra)

    model, x = drawn(Listed()), image()
    assert len(replace(model, level="block").blocks) == 1
    with torch.no_grad():
        y = model(x)
        model.extra.append(1.0)
        assert_same(model(x), y + 1)


def test_copies() -> None:
    model, x = drawn(Inverted()), image()
    replace(model, level="block")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.optim.swa_utils.AveragedModel(model).module,
    ]
    with torch.no_grad():
        wanted = model(x)
        for other in copies:
            assert isinstance(other, FusedBlock)
            assert "fused: bn1 + silu + se" in repr(other)
            assert torch.equal(other.eval()(x), wanted)
        copies[0].bn1.weight.zero_()  # a copy has modules of its own
        assert torch.equal(model(x), wanted)
        assert not torch.equal(copies[0](x), wanted)


def test_a_weight_of_another_shape() -> None:
    model, x = drawn(nn.Sequential(*list(Inverted().children()))), image()
    replace(model, level="block")
    model[4].weight = nn.Parameter(torch.randn(C, C, 3, 3))
    original = restore(copy.deepcopy(model))
    with torch.no_grad():
        assert_same(model(x), original(x))


def test_a_model_is_freed_without_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        model = drawn(Inverted())
        weight = weakref.ref(model.project.weight)
        replace(model, level="block")
        with torch.no_grad():
            model(image())
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_who_watches() -> None:
    """Compilers, exporters, tracers, modes and a forced backend see the block as it was written."""
    model, x = drawn(Inverted()), image()
    original = copy.deepcopy(model)
    replace(model, level="block")
    with torch.no_grad():
        wanted = original(x)
        assert_same(torch.export.export(model, (x,)).module()(x), wanted)
        assert_same(torch.jit.trace(model, x)(x), wanted)
        assert_same(torch.compile(model, backend="eager")(x), wanted)
        with se_fused.use_backend("reference"):
            assert_same(model(x), wanted)
        with torch.profiler.profile() as profile:
            assert_same(model(x), wanted)
        assert any("batch_norm" in event.name for event in profile.events())
        with torch.autocast("cpu"):
            assert_same(model(x), original(x), 3e-2)
        assert_same(torch.func.vmap(model)(x.unsqueeze(0))[0], wanted)
    with torch.inference_mode():
        assert_same(model(x), wanted)
