"""SE that is written into a block: in every mode, with further arguments, and after changes."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from se_blocks import assert_same, drawn
from spellings import BLOCKS, LOG, Block, C, MBConv, host
from test_spellings import ROUGH, Operators, difference
from torch import Tensor, nn

from examples import zoo
from se_fused import replace, restore
from se_fused.blocks import FusedBlock

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def calls_in(model: nn.Module, *args: object, **kwargs: object) -> int:
    """How many calls of the operation `model` makes."""
    with Operators() as operators:
        model(*args, **kwargs)
    return operators.calls


def image(n: int = 2) -> Tensor:
    return torch.randn(n, C, 9, 8)


@pytest.mark.parametrize("rate", [None, 0, 0.0, 0.1, 0.9])
@pytest.mark.parametrize("training", [False, True])
def test_any_drop_rate(rate: float | None, training: bool) -> None:
    block = drawn(MBConv()).train(training)
    original = copy.deepcopy(block)
    assert list(replace(block).inline) == [""]
    results = []
    for each in (block, original):
        torch.manual_seed(0)
        results.append(each(image(), drop_connect_rate=rate))
    assert_same(*results)
    # Where the forward itself draws a tensor of the map's size, it cannot be followed.
    assert (calls_in(block, image(), rate) > 0) == (not training or not rate)


@pytest.mark.parametrize("build", ["efficientnet_pytorch:efficientnet-b0", "monai:efficientnet-b0"])
def test_whole_networks_train(build: str) -> None:
    torch.manual_seed(0)
    model = zoo.build(build).double().train()
    original = copy.deepcopy(model)
    assert sum(map(len, replace(model).inline.values())) == 16
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for each in (model, original):
        torch.manual_seed(0)
        y = each(x)
        gradients.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(each.parameters()))])
    largest = max(float(b.abs().max()) for b in gradients[1])
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).abs().max()) <= 1e-7 * float(b.abs().max().clamp_min(1e-6 * largest))
    assert calls_in(model, x) >= 16


def test_other_arguments_compute_as_before() -> None:
    block = drawn(MBConv())
    replace(block)
    for odd in (True, "text", torch.tensor(0.5)):
        assert calls_in(block, image(), odd) == 0
    with pytest.raises(TypeError, match="rate"):
        block(image(), rate=0.5)
    with pytest.raises(TypeError, match="multiple values"):
        block(image(), inputs=image())


def test_frozen_batch_norms_train() -> None:
    block = drawn(MBConv())
    original = copy.deepcopy(block)
    replace(block)
    for each in (block, original):
        each.train()
        each._bn1.eval()
    assert difference_once(block, original) is None
    assert calls_in(block, image()) > 0


def difference_once(got: nn.Module, wanted: nn.Module) -> str | None:
    x = image()
    outputs = [each(x) for each in (got, wanted)]
    gradients = [
        torch.autograd.grad(y.square().sum(), list(each.parameters()))
        for y, each in zip(outputs, (got, wanted), strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        if float((a - b).abs().max()) > 1e-4 * float(b.abs().max().clamp_min(1e-2)):
            return f"{a} is not {b}"
    return None


def test_a_mode_that_was_not_examined_computes_as_before() -> None:
    block = drawn(MBConv())
    replace(block)
    block._se_reduce.train()  # it has a child, and could ask for its mode
    assert calls_in(block, image()) == 0


def test_copies_and_pickles_stay_fused() -> None:
    block = drawn(MBConv())
    original = copy.deepcopy(block)
    replace(block)
    x = image()
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert isinstance(copied, FusedBlock)
        assert calls_in(copied, x) > 0
        nn.init.zeros_(copied._se_expand.weight)
        assert not torch.allclose(copied(x), block(x))
    assert_same(block(x), original(x))
    assert list(block.state_dict()) == list(original.state_dict())
    assert type(restore(block)) is MBConv
    assert torch.equal(block(x), original(x))


def test_changes_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(drawn(MBConv()))
    replace(model)
    x = image()
    before = model(x)
    seen: list[Tensor] = []
    handle = model[0]._se_reduce.register_forward_hook(lambda module, args, y: seen.append(y))
    with caplog.at_level(logging.WARNING, logger="se_fused"):
        assert_same(model(x), before)
    assert len(seen) == 1
    assert "its _se_reduce has hooks" in caplog.text
    handle.remove()
    assert calls_in(model, x) > 0
    with torch.no_grad():
        model[0]._se_reduce.weight.mul_(2)
    original = restore(copy.deepcopy(model))
    assert_same(model(x), original(x))


def test_weights_of_another_dtype_compute_as_before() -> None:
    block = drawn(Block()).to(torch.bfloat16)
    replace(block)
    assert calls_in(block, image().bfloat16()) > 0
    block.fc1.float(), block.fc2.float()
    with pytest.raises(RuntimeError, match="dtype"):
        block(image().bfloat16())


def test_under_autocast() -> None:
    block = drawn(MBConv())
    original = copy.deepcopy(block)
    replace(block)
    x = image()
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = block(x), original(x)
    assert y.dtype is wanted.dtype
    assert_same(y.float(), wanted.float(), 2e-2)


def test_a_second_replace_changes_nothing() -> None:
    model = nn.Sequential(Block(), Block())
    first = replace(model, exclude="1")
    assert set(first.inline) == {"0"}
    assert first.skipped == {"1": "excluded by '1'"}
    second = replace(model)
    assert set(second.inline) == {"1"}
    assert second.skipped == {"0": "already fused"}


def test_dry_run() -> None:
    model = nn.Sequential(Block())
    assert set(replace(model, dry_run=True).inline) == {"0"}
    assert type(model[0]) is Block


def test_inplace_writes_over_the_map_in_inference_only() -> None:
    block = host(Block, lambda m, x: F.relu(m.se(x)))()
    original = copy.deepcopy(block)
    replace(block, inplace=True)
    x = image()
    before = x.clone()
    assert_same(block(x), original(before))
    assert torch.equal(x, before)
    with torch.no_grad():
        assert_same(block(x), original(before))
    assert not torch.equal(x, before)


def test_gates_in_a_child() -> None:
    class Gate(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, 4, 1), nn.ReLU(), nn.Conv2d(4, C, 1), nn.Sigmoid())

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Gate()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x * self.gate(x))

    report = replace(nn.Sequential(Parent(), Gate()))
    assert list(report.inline) == ["0"]
    assert list(report.near) == ["1"]


@pytest.mark.parametrize("name", [name for name, spelling in BLOCKS.items() if spelling.verdict == "fused"])
def test_level_block_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = BLOCKS[name].make()
    drawn(model)
    original = copy.deepcopy(model)
    report = replace(model, level="block")
    assert sum(map(len, report.inline.values())) + len(report.replaced) == BLOCKS[name].layers
    assert difference(model, original, rough=bool(ROUGH.search(name))) is None
    LOG.clear()


COUNTER = 0


def test_what_happens_outside_is_kept() -> None:
    def prints(m: nn.Module, x: Tensor) -> Tensor:
        print("shape")
        return m.se(m.conv(x))

    def counts(m: nn.Module, x: Tensor) -> Tensor:
        global COUNTER
        COUNTER += 1
        return m.se(m.conv(x))

    for forward in (prints, counts):
        report = replace(host(Block, forward)())
        assert report.inline == {}
        assert "prints, or writes to a global variable" in report.near[""]
