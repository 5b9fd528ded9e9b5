"""Blocks, and changes of them, in which a wrong result was found once at level "block"."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from se_blocks import C, Deep, Inverted, assert_same, drawn, image
from se_layers import SqueezeExcitation
from torch import Tensor, nn

from se_fused import replace, restore

pytestmark = pytest.mark.usefixtures("one_thread")


class CastsToParameter(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(next(self.parameters()).dtype)


class AsksWhetherFrozen(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if any(p.requires_grad for p in self.parameters()) else 2)


class FlooredNorm(nn.BatchNorm2d):
    """A batch norm unless the variance is small."""

    def forward(self, x: Tensor) -> Tensor:
        var = self.running_var.clamp_min(0.1)
        return F.batch_norm(x, self.running_mean, var, self.weight, self.bias, False, 0.0, self.eps)


class Contiguous(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


class Flattens(Inverted):
    """Its view needs the layout that the sum has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(x.shape[0], -1)


class FlattensContiguous(Inverted):
    def __init__(self) -> None:
        super().__init__()
        self.last = Contiguous()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.project(self.se(self.act(self.bn1(self.conv(x))))))
        return self.last(y).view(x.shape[0], -1)


class Pools(Inverted):
    """Its trace holds a function that cannot be pickled."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(super().forward(x), 3, 1, 1)


class Hidden(Inverted):
    """A module that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.LeakyReLU(0.0)]

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), self.hidden[0].negative_slope)


class GainNorm(nn.BatchNorm2d):
    def __init__(self, c: int) -> None:
        super().__init__(c)
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Lowest(nn.Module):
    """A ReLU until its number changes."""

    def __init__(self) -> None:
        super().__init__()
        self.low = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.low)


class OwnNorm(nn.BatchNorm2d):
    pass


class Iterates(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


class Helps(Inverted):
    def helper(self, x: Tensor) -> Tensor:
        return x * 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(super().forward(x))


def with_part(name: str, part: nn.Module, block: type[Inverted] = Inverted) -> nn.Module:
    model = drawn(block())
    setattr(model, name, part.eval())
    return model


def results(model: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """What the replaced and the restored model return or raise."""
    both: list[Any] = []
    for call in (lambda: model(x.clone()), lambda: restore(model)(x.clone())):
        try:
            with torch.no_grad():
                both.append(call())
        except Exception as error:
            both.append(type(error))
    return both[0], both[1]


def assert_equal(got: Any, wanted: Any) -> None:
    if isinstance(wanted, Tensor):
        assert isinstance(got, Tensor)
        assert got.stride() == wanted.stride()
        assert_same(got, wanted)
    else:
        assert got is wanted


def small_variance(model: nn.Module) -> nn.Module:
    model.bn1.running_var.fill_(1e-3)
    return model


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (lambda: drawn(CastsToParameter()), image),
        (lambda: drawn(AsksWhetherFrozen()).requires_grad_(False), image),
        (lambda: small_variance(with_part("bn1", FlooredNorm(C))), image),
        (lambda: drawn(FlattensContiguous()), lambda: image().to(memory_format=torch.channels_last)),
        (lambda: drawn(Flattens()).to(memory_format=torch.channels_last), lambda: torch.randn(2, C, 9, 9)),
        (lambda: drawn(Inverted()).to(memory_format=torch.channels_last), lambda: torch.randn(8, C, 30, 30)),
    ],
    ids=["dtype", "frozen", "floor", "contiguous", "view", "layout"],
)
def test_blocks(model: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    replaced = model()
    replace(replaced, level="block")
    assert_equal(*results(replaced, x()))


@pytest.mark.parametrize("block", [Pools, Hidden])
def test_blocks_that_are_left_alone(block: type[nn.Module]) -> None:
    model = drawn(block())
    assert list(replace(model, level="block").alone) == ["se"]
    pickle.loads(pickle.dumps(model))


def new_dicts(model: nn.Module) -> None:
    for module in (model.bn0, model.bn1, model.project):
        module._parameters = dict(module._parameters)
        module.weight = nn.Parameter(torch.zeros_like(module.weight))


def copied_attributes(model: nn.Module) -> None:
    for module in (model.bn0, model.project, model.se.fc1):
        module.__dict__ = dict(vars(module))
    new_dicts(model)
    model.se.fc1._parameters = {"weight": nn.Parameter(torch.zeros(4, C, 1, 1)), "bias": None}


def new_attributes(model: nn.Module) -> None:
    model.act.__dict__ = {**vars(model.act), "forward": torch.sigmoid}


def subclass(model: nn.Module) -> None:
    model.__class__ = type("Sub", (type(model),), {"helper": lambda self, x: x * 2})


def set_weight(*shape: int) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.project, "weight", nn.Parameter(torch.randn(shape)))


def set_bias(model: nn.Module) -> None:
    model.project.bias = nn.Parameter(torch.randn(1))


def without_first_layer(model: nn.Module) -> None:
    model.se.fc1.weight = model.se.fc1.bias = None


def layer_without_reduction() -> nn.Module:
    return with_part("se", SqueezeExcitation(C, C))


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (lambda: drawn(Deep()), new_dicts),
        (lambda: drawn(Deep()), copied_attributes),
        (lambda: drawn(Deep()), new_attributes),
        (lambda: with_part("bn1", GainNorm(C)), lambda model: model.bn1.gain.fill_(3)),
        (lambda: with_part("act", Lowest()), lambda model: model.act.low.fill_(-0.5)),
        (lambda: drawn(Inverted()), set_weight(C, C // 4, 2, 2)),
        (lambda: drawn(Inverted()), set_weight(C, C // 4, 1, 4)),
        (lambda: drawn(Inverted()), set_weight(C, C)),
        (lambda: drawn(Inverted(bias=True)), set_bias),
        (layer_without_reduction, without_first_layer),
        (lambda: drawn(Deep()), lambda model: model.project.to(memory_format=torch.channels_last)),
    ],
)
def test_changes(model: Callable[[], nn.Module], change: Callable[[nn.Module], Any]) -> None:
    replaced, x = model(), torch.randn(8, C, 30, 30)
    assert len(replace(replaced, level="block").blocks) == 1
    with torch.no_grad():
        replaced(x)
    change(replaced)
    assert_equal(*results(replaced, x))


@pytest.mark.parametrize(
    ("model", "owner", "name", "value"),
    [
        (lambda: with_part("bn1", OwnNorm(C)), nn.BatchNorm2d, "forward", lambda self, x: x),
        (lambda: drawn(nn.Sequential(*Inverted().children())), nn.Sequential, "forward", lambda self, x: x),
        (lambda: drawn(Iterates(*Inverted().children())), Iterates, "__iter__", lambda self: iter([])),
        (lambda: drawn(Helps()), Helps, "helper", lambda self, x: x * 2),
        (lambda: drawn(Helps()), None, "helper", lambda self, x: x * 2),
        (lambda: drawn(Helps()), Inverted, "forward", lambda self, x: x * 2),
    ],
)
def test_changes_of_classes(model, owner, name, value, monkeypatch) -> None:
    replaced, x = model(), image()
    assert len(replace(replaced, level="block").blocks) == 1
    with torch.no_grad():
        before = replaced(x)
        with monkeypatch.context() as patch:
            patch.setattr(owner or type(replaced), name, value, raising=False)
            changed = replaced(x)
            assert not torch.equal(changed, before)
            if owner is not None:
                assert_same(changed, restore(copy.deepcopy(replaced))(x))
        assert_same(replaced(x), before)


def test_another_class() -> None:
    model, x = drawn(Helps()), image()
    replace(model, level="block")
    with torch.no_grad():
        before = model(x)
        subclass(model)
        assert_same(model(x), 2 * before)
