"""SE that is written into a block: in every mode, with further arguments, and after changes."""

from __future__ import annotations

import copy
import logging
import pickle
import random
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from se_blocks import assert_same, drawn
from spellings import BLOCKS, LOG, Block, C, MBConv, host
from test_spellings import ROUGH, Operators, difference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples import zoo
from se_fused import replace, restore
from se_fused.blocks import FusedBlock

zoo.import_torchvision()
from timm.layers import SEModule  # noqa: E402

LOGGER = logging.getLogger("a library")
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


@pytest.mark.parametrize("rate", [None, 0.0, 0.1, 0.9])
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


def gated(block: nn.Module, x: Tensor) -> Tensor:
    return x * torch.sigmoid(block.fc2(torch.relu(block.fc1(x.mean((2, 3), keepdim=True)))))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.fc1, self.fc2 = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1)


class Masked(Plain):
    """It asks for the rank of an argument, which may be a number."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        x = self.conv(x)
        return gated(self, x if mask is None else x * (mask.unsqueeze(1) if mask.dim() == 3 else mask))


def statistics(x: Tensor) -> Tensor:
    return x.mean((2, 3)) if x.dtype is torch.float64 else x.mean()


class DependsOnDtype(Plain):
    """A rank in it depends on the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return gated(self, x * 3 if statistics(x).dim() == 0 else x)


class Unsqueezes(Plain):
    """The rank of a value changes in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = gated(self, self.conv(x))
        z = y + 1 if y.dim() == 4 else y - 1
        v = y.unsqueeze_(1)
        return z if v.dim() == 5 else v


@pytest.mark.parametrize(("cls", "count"), [(Masked, 1), (DependsOnDtype, 0), (Unsqueezes, 1)])
def test_questions_for_ranks(cls: type[nn.Module], count: int) -> None:
    block, x = drawn(cls()).eval(), image()
    wanted = block(x)
    assert sum(map(len, replace(block).inline.values())) == count
    assert_same(block(x), wanted)


class Sharing(Block):
    """Two SE with the same weights and batch norms of their own."""

    def around(self) -> dict[str, nn.Module]:
        return {**super().around(), "bn1": nn.BatchNorm1d(C), "bn2": nn.BatchNorm1d(C)}

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv(x)
        for bn in (self.bn1, self.bn2):
            u = self.product(u, torch.sigmoid(bn(self.layers(self.squeeze(u)))))
        return u


def test_layers_that_share_their_weights() -> None:
    block = drawn(Sharing())
    original = copy.deepcopy(block)
    assert len(replace(block).inline[""]) == 2
    assert calls_in(block, image()) == 2
    assert difference(block, original) is None


class Beside(Block):
    """An SE layer as a module, and another one in the forward."""

    def around(self) -> dict[str, nn.Module]:
        return {**super().around(), "inner": SEModule(C)}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inner(self.conv(x)))


@pytest.mark.parametrize("level", ["layer", "block"])
@pytest.mark.parametrize("depth", [0, 1])
def test_beside_an_se_layer(level: str, depth: int) -> None:
    """The layer is a child of the block, or deeper inside it."""
    block = drawn(Beside())
    if depth:
        block.inner = nn.Sequential(block.inner, nn.Conv2d(C, C, 1))
    original, model = copy.deepcopy(block), nn.Sequential(block)
    report = replace(model, level=level)
    assert list(report.replaced) == ["0.inner" + ".0" * depth]
    # Beside a layer that is deeper inside, the other one is not looked for.
    assert list(report.inline) == ["0"] * (depth == 0)
    assert calls_in(block, image()) == 2 - depth
    assert difference(block, original) is None


def test_beside_a_replaced_se_layer() -> None:
    block = drawn(Beside())
    original = copy.deepcopy(block)
    replace(block.inner)
    assert list(replace(block).inline) == [""]
    assert calls_in(block, image()) == 2
    assert difference(block, original) is None


def test_around_an_se_layer_and_an_inline_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.se, self.block = SEModule(C), MBConv()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.se(x))

    report = replace(drawn(Net()))
    assert (list(report.replaced), list(report.inline), report.near) == (["se"], ["block"], {})


def test_beside_an_excluded_se_layer() -> None:
    report = replace(nn.Sequential(Beside()), exclude="*.inner")
    assert report.skipped == dict.fromkeys(("0", "0.inner"), "excluded by '*.inner'")


def test_other_arguments_compute_as_before() -> None:
    block = drawn(MBConv())
    replace(block)
    for odd in (True, 1, "text", torch.tensor(0.5)):
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


def test_a_map_that_is_written_between() -> None:
    def bounded(m: nn.Module, x: Tensor) -> Tensor:
        u = m.conv(x)
        s = m.gate(m.layers(m.squeeze(u)))
        F.hardtanh_(u, -1e3, 1e3)  # changes nothing in small numbers
        return m.product(u, s)

    block = host(Block, bounded)()
    original = copy.deepcopy(block)
    report = replace(block)
    assert report.inline == {}
    assert "its map is written to before the product" in report.near[""]
    x = 1e5 * image()
    assert torch.equal(block(x), original(x))


COUNTER, TABLE, GENERATOR = 0, {(9, 8): 2.0}, random.Random(0)


def count() -> None:
    global COUNTER
    COUNTER += 1


def shouts(x: Tensor) -> Tensor:
    print("shape")
    return x


def offloaded(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return m.se(m.conv(x))


def without_autocast(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return m.se(m.conv(x))


OUTSIDE = {
    "prints": lambda m, x: (print("shape"), m.se(m.conv(x)))[1],
    "prints in a function": lambda m, x: shouts(m.se(m.conv(x))),
    "warns": lambda m, x: (warnings.warn("old", stacklevel=2), m.se(m.conv(x)))[1],
    "counts": lambda m, x: (count(), m.se(m.conv(x)))[1],
    "logs": lambda m, x: (LOGGER.info("called"), m.se(m.conv(x)))[1],
    "draws": lambda m, x: x if m.training and GENERATOR.random() < 0.01 else m.se(m.conv(x)),
    "a set of sizes": lambda m, x: m.se(m.conv(x)) * (2 if x.shape[2] in {14, 28} else 1),
    "a table of sizes": lambda m, x: m.se(m.conv(x)) * TABLE.get(x.shape[2], 1.0),
    "sizes as text": lambda m, x: m.se(m.conv(x)) * TABLE.get(f"{x.shape[2]}x{x.shape[3]}", 1.0),
    "the text of a shape": lambda m, x: m.se(m.conv(x)) * (2 if repr(x.shape) == "torch.Size([2, 12, 14, 14])" else 1),
    "checkpoints": lambda m, x: checkpoint(lambda u: m.se(m.conv(u)), x, use_reentrant=False),
    "offloads": offloaded,
    "ends autocast on GPUs": without_autocast,
    "names a device": lambda m, x: m.se(m.conv(x.to(torch.device("cpu")))),
    "reads the mode of a child": lambda m, x: F.dropout(m.se(m.conv(x)), 0.5, m.fc1.training),
    "compares the modes of children": lambda m, x: m.se(m.conv(x)) * (3 if m.fc1.training != m.fc2.training else 1),
    "asks for autocast without gradients": lambda m, x: (
        m.se(m.conv(x)) * (3 if torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled() else 1)
    ),
    "asks for inference mode and a mode": lambda m, x: (
        m.se(m.conv(x)) * (3 if torch.is_inference_mode_enabled() and not m.fc1.training else 1)
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_its_calls_do_not_show_keeps_a_block(name: str) -> None:
    report = replace(host(Block, OUTSIDE[name])())
    assert report.inline == {}


NUMBERS = {
    "whose type matters": lambda m, x, k=None: m.se(m.conv(x)) * (2 if isinstance(k, float) else 1),
    "of another type": lambda m, x, k=2.0: m.se(m.conv(x)) * (2 if isinstance(k, int) else k),
    "looked up": lambda m, x, k=None: m.se(m.conv(x)) * {3.0: 2.0}.get(k, 1.0),
    "as text": lambda m, x, k=None: m.se(m.conv(x)) * (2 if f"{k}" == "3.0" else 1),
    "of times": lambda m, x, k=1: sum(m.se(m.conv(x)) for _ in range(max(1, int(k)))),
    "compared": lambda m, x, k=0.5: m.se(m.conv(x)) * (2 if k > 1 else 1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    block = host(Block, NUMBERS[name])()
    original = copy.deepcopy(block)
    assert list(replace(block).inline) == [""]
    x = image()
    for k in (1, 2, 3, 0.5, 1.5, 2.0, 3.0):
        assert_same(block(x, k), original(x, k))


def test_a_map_that_is_the_input_in_one_layout() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        u = x.contiguous(memory_format=torch.channels_last)
        u *= m.gate(m.layers(m.squeeze(u)))[:, :, None, None]
        return m.conv(u) + x

    block = host(Block, forward)()
    original = copy.deepcopy(block)
    replace(block)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = image().contiguous(memory_format=layout)
        given = x.clone()
        with torch.no_grad():
            assert_same(block(x), original(given))
        assert torch.equal(x, given)


def test_arguments_that_cannot_be_pickled() -> None:
    block = host(Block, lambda m, x, pool=False: F.max_pool2d(m.se(m.conv(x)), 2) if pool else m.se(m.conv(x)))()
    assert list(replace(block).inline) == [""]
    for program in block._se_fused_swap.facts[1].values():
        pickle.dumps(program)


def test_generators_of_gpus_are_left_alone() -> None:
    torch.manual_seed(1234)
    before = str(torch.cuda._lazy_seed_tracker.get_calls())
    replace(Block())
    assert str(torch.cuda._lazy_seed_tracker.get_calls()) == before
