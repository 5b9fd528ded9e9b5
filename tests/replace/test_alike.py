"""Modules of the same structure are examined once, and the result is that of examining each."""

import copy
import math
import time
import weakref
from collections import OrderedDict, deque
from enum import Enum, IntEnum
from typing import NamedTuple

import pytest
import torch
from se_blocks import Inverted, drawn, image
from se_layers import Convolutional, varied
from torch import nn

import se_fused
from examples import zoo
from se_fused import invariance
from se_fused.alike import Alike, structure_of


class Sizes(NamedTuple):
    n: int
    c: int


class Extended(Sizes):
    """It has attributes."""


class Color(Enum):
    RED = 1

    def __eq__(self, other):
        return True

    __hash__ = None


class Act(IntEnum):
    RELU = 1


class Gate(IntEnum):
    SIGMOID = 1


class ByName(type):
    def __eq__(cls, other):
        return True

    def __hash__(cls):
        return 1


First, Second = ByName("Part", (), {}), ByName("Part", (), {})


class Special(torch.Tensor):
    pass


class Slotted(Convolutional):
    __slots__ = ("kept",)


class OwnCopying(Convolutional):
    def __getstate__(self):
        return super().__getstate__()


def changed(change, make=Inverted):
    """A module to which `change` was done."""
    module = make()
    change(module)
    return module


def holding(value):
    """A change: the module gets what `value` returns as an attribute."""
    return lambda module: setattr(module, "held", value())


def with_attribute(value):
    value.kind = 1
    return value


def tie(block):
    block.bn2.weight = block.bn1.weight


def twice(value):
    return [value, value]


DIFFERENT = {
    "an attribute": holding(lambda: 2),
    "a number that is equal": holding(lambda: 2.0),
    "a number that counts as equal": holding(lambda: True),
    "the sign of zero": holding(lambda: -0.0),
    "the type of a number": lambda b: setattr(b.bn1, "eps", 1),
    "the contents of a list": holding(lambda: [1, [2]]),
    "a member of an enum": holding(lambda: Act.RELU),
    "an equal member of another": holding(lambda: Gate.SIGMOID),
    "a member that equals all": holding(lambda: Color.RED),
    "a class": holding(lambda: First),
    "an equal class": holding(lambda: Second),
    "a set": holding(lambda: {0, 8}),
    "a set in another order": holding(lambda: {8, 0}),
    "two lists": holding(lambda: [[0], [0]]),
    "a list twice": holding(lambda: twice([0])),
    "two tuples": holding(lambda: [tuple(range(2)), tuple(range(2))]),
    "a tuple twice": holding(lambda: twice(tuple(range(2)))),
    "a named tuple": holding(lambda: Sizes(1, 2)),
    "the numbers in a named tuple": holding(lambda: Sizes(1, 3)),
    "a function": holding(lambda: math.sin),
    "an attribute inside": lambda b: setattr(b.conv, "padding_mode", "reflect"),
    "the class of a module inside": lambda b: setattr(b, "act", nn.ReLU()),
    "a child": lambda b: setattr(b, "drop", nn.Identity()),
    "no bias": lambda b: setattr(b.se, "bias", None),
    "a shape": lambda b: setattr(b, "conv", nn.Conv2d(16, 16, 5, padding=2, groups=16)),
    "a dtype": lambda b: b.half(),
    "a device": lambda b: b.to("meta"),
    "strides": lambda b: b.to(memory_format=torch.channels_last),
    "a parameter that is not trained": lambda b: b.bn1.weight.requires_grad_(False),
    "a parameter for two": tie,
    "the mode of a module inside": lambda b: b.bn1.eval(),
    "a hook": lambda b: b.act.register_forward_hook(print),
    "the number of batches": lambda b: b.bn1.num_batches_tracked.add_(1),
    "a norm without statistics": lambda b: setattr(b, "bn1", nn.BatchNorm2d(16, track_running_stats=False)),
    "the numbers of a buffer": lambda b: b.register_buffer("mask", torch.ones(3)),
    "a buffer that is not saved": lambda b: b.register_buffer("mask", torch.ones(3), persistent=False),
    "the numbers of a tensor": holding(lambda: torch.ones(3)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_makes_a_structure_another(name):
    structure = structure_of(changed(DIFFERENT[name]))
    assert structure is not None
    assert structure != structure_of(Inverted())
    assert all(structure != structure_of(changed(change)) for other, change in DIFFERENT.items() if other != name)
    if name != "a hook":  # each has a number of its own
        assert structure == structure_of(changed(DIFFERENT[name]))


def test_numbers_of_parameters_and_statistics_make_no_other_structure():
    assert structure_of(drawn(Inverted(), 1)) == structure_of(drawn(Inverted(), 2))


def dead():
    return weakref.proxy(nn.Identity())


def nested(depth):
    found = []
    for _ in range(depth):
        found = [found]
    return found


OPAQUE = {
    "an object": holding(object),
    "an object in a list": holding(lambda: [{"a": object()}]),
    "a kind of dict": holding(type("Names", (OrderedDict,), {})),
    "a dict with attributes": holding(lambda: with_attribute(OrderedDict())),
    "a named tuple with attributes": holding(lambda: with_attribute(Extended(1, 2))),
    "a deque": holding(lambda: deque(maxlen=3)),
    "a dead reference": lambda b: vars(b).update(held=dead()),
    "a number of a million digits": holding(lambda: 1 << 4_000_000),
    "a list in a list in a list": holding(lambda: nested(5000)),
    "a table": holding(lambda: list(range(100_000))),
    "a large buffer": lambda b: b.register_buffer("mask", torch.ones(99, 999)),
    "many buffers": lambda b: [b.register_buffer(f"mask{i}", torch.ones(999)) for i in range(20)],
    "a kind of tensor": holding(lambda: torch.ones(3).as_subclass(Special)),
    "a tensor with attributes": holding(lambda: with_attribute(torch.ones(3))),
    "a tensor with a gradient": holding(lambda: [torch.ones(3, requires_grad=True)]),
    "a parameter in a list": holding(lambda: [nn.Parameter(torch.ones(3))]),
    "a norm in a list": holding(lambda: [nn.BatchNorm2d(3)]),
    "a sparse tensor": lambda b: b.register_buffer("mask", torch.eye(3).to_sparse()),
    "a quantised tensor": holding(lambda: torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)),
    "slots": lambda b: setattr(b, "se", Slotted()),
    "a copying of its own": lambda b: setattr(b, "se", OwnCopying()),
    "a replaced layer": lambda b: se_fused.replace(b),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # about quantised and sparse tensors
@pytest.mark.parametrize("name", OPAQUE)
def test_what_has_no_structure(name):
    started = time.process_time()
    model = nn.Sequential(changed(OPAQUE[name]), Convolutional(16, 4))
    assert structure_of(model) is None
    report = se_fused.replace(model, level="block")
    assert "1" in report.replaced
    assert time.process_time() - started < 10


def test_an_examination_is_shared_with_its_facts():
    alike, calls = Alike(), []

    def examine(module, fact):
        calls.append((module, fact))
        return fact

    first, second, third = Inverted(), Inverted(), Inverted("relu")
    found = [alike.once(examine, each, fact, facts=fact) for fact in (1, 2) for each in (first, second, third)]
    assert found == [1, 1, 1, 2, 2, 2]
    assert calls == [(first, 1), (third, 1), (first, 2), (third, 2)]


def test_equal_layers_are_examined_once(monkeypatch):
    calls = []
    violation = invariance.violation
    monkeypatch.setattr(
        "se_fused.equivalence.invariance.violation", lambda *args: (calls.append(args), violation(*args))[1]
    )
    report = se_fused.replace(nn.Sequential(*(Convolutional() for _ in range(5)), varied(activation=nn.SiLU)))
    assert len(report.replaced) == 6
    assert len(calls) == 2


class Sometimes(Convolutional):
    """SE only if `factor` is 1."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return super().forward(x) * self.factor


def test_layers_of_one_class_that_compute_something_else():
    model = nn.Sequential(*map(Sometimes, (1, 3, 1, 3)))
    x = torch.randn(2, 24, 5, 5)
    wanted = copy.deepcopy(model)(x)
    report = se_fused.replace(model)
    assert set(report.replaced) == {"0", "2"}
    torch.testing.assert_close(model(x), wanted)


def test_blocks_of_which_one_layer_is_excluded():
    model = drawn(nn.Sequential(*(Inverted() for _ in range(4)))).eval()
    x = image()
    with torch.no_grad():
        wanted = copy.deepcopy(model)(x)
        report = se_fused.replace(model, level="block", exclude="1.se")
        assert set(report.blocks) == {"0", "2", "3"}
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


class Inline(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.down, self.up, self.act = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), act

    def forward(self, x):
        u = self.act(self.bn(self.conv(x)))
        return u * torch.sigmoid(self.up(torch.relu(self.down(u.mean((2, 3), keepdim=True)))))


def test_blocks_with_a_layer_written_into_them():
    model = drawn(nn.Sequential(*(Inline(act) for act in (nn.SiLU(), nn.SiLU(), nn.Tanh(), nn.SiLU())))).eval()
    x = image()
    with torch.no_grad():
        wanted = copy.deepcopy(model)(x)
        report = se_fused.replace(model, level="block")
        assert set(report.inline) == set(report.blocks) == set("0123")
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
        for block in model:
            block.bn.weight.mul_(2)
            assert not torch.equal(model(x), wanted)
            block.bn.weight.div_(2)
        torch.testing.assert_close(se_fused.restore(model)(x), wanted, rtol=1e-5, atol=1e-5)


def facts_of(report):
    """All that a report says, without the modules themselves."""
    return {name: repr(value) for name, value in vars(report).items() if name != "model"}


@pytest.mark.parametrize("name", ["timm:regnety_002", "torchvision:mobilenet_v3_small"])
def test_a_report_is_that_of_examining_each(name, monkeypatch):
    model = zoo.build(name)
    shared = se_fused.replace(model, level="block", dry_run=True)
    monkeypatch.setattr("se_fused.alike.structure_of", lambda module: None)
    assert facts_of(shared) == facts_of(se_fused.replace(model, level="block", dry_run=True))
    assert shared.replaced
