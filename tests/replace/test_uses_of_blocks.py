"""What programs do with a model after `replace(model, level="block")`: hooks, training, new readers, other dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from se_blocks import Both, C, Inverted, assert_same, drawn, image
from se_layers import SqueezeExcitation
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from examples import zoo
from se_fused import replace, restore
from se_fused.backends import CPU

pytestmark = pytest.mark.usefixtures("one_thread", "known_layers")


@contextmanager
def joined_calls(block: nn.Module) -> Iterator[mock.Mock]:
    """Counts the calls that `block` computes joined."""
    swap, run = block._se_fused_swap, mock.Mock()
    function_for = swap.function_for

    def counted(*args: object) -> Callable[[Tensor], object] | None:
        function = function_for(*args)
        if function is not None:
            run()
        return function

    with mock.patch.object(swap, "function_for", counted):
        yield run


def watch(modules: list[nn.Module]) -> list[Tensor]:
    """Hooks that note what goes into and comes out of each of `modules`, and change it."""
    seen: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        seen.append(args[0].clone())
        return args[0] + 1

    def after(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
        seen.extend((args[0].clone(), y.clone()))
        return 2 * y

    for module in modules:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, with_kwargs=True)
    return seen


@pytest.mark.parametrize("first", ["hooks", "replace"])
def test_hooks_on_the_block_and_the_model(first: str) -> None:
    """They run, and see and change what they did; the block stays joined."""
    model, x = nn.Sequential(nn.Conv2d(C, C, 1), drawn(Inverted()), nn.Conv2d(C, 3, 1)).eval(), image()
    original = copy.deepcopy(model)
    wanted = watch([original, original[1]])
    if first == "hooks":
        seen = watch([model, model[1]])
    assert list(replace(model, level="block").blocks) == ["1"]
    if first == "replace":
        seen = watch([model, model[1]])
    assert seen == []
    with torch.no_grad(), joined_calls(model[1]) as run:
        y = model(x)
        assert_same(y, original(x))
    assert run.call_count == 1
    assert len(seen) == len(wanted) == 6
    for pair in zip(seen, wanted, strict=True):
        assert_same(*pair)


def test_hooks_inside_before_replace() -> None:
    model, x = drawn(Inverted()), image()
    original = copy.deepcopy(model)
    seen, wanted = watch([model.act, model.project]), watch([original.act, original.project])
    assert replace(model, level="block").alone == {"se": "in its block its act has hooks"}
    with torch.no_grad():
        assert_same(model(x), original(x))
    for pair in zip(seen, wanted, strict=True):
        assert_same(*pair)


def test_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPU, "unchecked", None)
    model, x = drawn(Inverted()), image()
    original = copy.deepcopy(model)
    report = replace(model, level="block")
    reason = "the CPU kernels, with which its block is compared, are not available"
    assert (list(report.replaced), report.blocks, report.alone) == (["se"], {}, {"se": reason})
    assert reason in str(report)
    assert type(model) is Inverted
    with torch.no_grad():
        assert_same(model(x), original(x))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """One step of training; returns the gradients."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    model(x).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    model.eval()
    return gradients


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [lambda model: model, DistributedDataParallel], ids=["alone", "distributed"])
@pytest.mark.usefixtures("process_group")
def test_training(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """The steps of training, whose gradients are those of the original, change weights and statistics: inference
    follows."""
    model, x = drawn(Inverted()).double(), image(dtype=torch.float64)
    original = copy.deepcopy(model)
    replace(model, level="block")
    wrapped, wrapped_original = wrap(model), wrap(original)
    with torch.no_grad():
        untrained = wrapped(x)
    for _ in range(2):
        for pair in zip(step(wrapped, x), step(wrapped_original, x), strict=True):
            assert_same(*pair, 1e-10)
    with torch.no_grad(), joined_calls(model) as run:
        y = wrapped(x)
        assert_same(y, wrapped_original(x), 1e-10)
    assert run.call_count == 1
    assert float((y - untrained).abs().max()) > 1e-2


class Notes(nn.Module):
    """Reads the map that a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.seen = module, []

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        self.seen.append(y)
        return y


@pytest.mark.parametrize("child", ["conv", "bn1", "act", "se", "project"])
def test_a_child_that_reads_a_map_as_well(child: str) -> None:
    model, x = drawn(Inverted()), image()
    original = copy.deepcopy(model)
    replace(model, level="block")
    with torch.no_grad():
        model(x)
        for each in (model, original):
            setattr(each, child, Notes(getattr(each, child)))
        assert_same(model(x), original(x))
        # What was noted lives on, and may not be written over.
        ((seen,), (wanted,)) = (getattr(each, child).seen for each in (model, original))
        assert_same(seen, wanted)


def test_a_forward_that_reads_a_map_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = drawn(Inverted()), image()
    original = drawn(Both())
    original.load_state_dict(model.state_dict())
    replace(model, level="block")
    with torch.no_grad():
        model(x)
        with monkeypatch.context() as patch:
            patch.setattr(Inverted, "forward", Both.forward)
            assert_same(model(x), original(x))
        model.forward = lambda x: Both.forward(model, x)
        assert_same(model(x), original(x))


def test_another_layer() -> None:
    model, x = drawn(Inverted()), image()
    replace(model, level="block")
    with torch.no_grad():
        model(x)
        model.se = SqueezeExcitation(C, 2)
        original = restore(copy.deepcopy(model))
        assert_same(model(x), original(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["timm:mobilenetv3_small_100", "timm:regnety_002", "timm:seresnet18", "torchvision:efficientnet_b0"]
)
def test_networks_in_half_precision(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 96, 96)
    model = zoo.settled(zoo.build(name), x).to(dtype)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        eager, wanted = model(x.to(dtype)), exact(x.to(dtype).double())
        assert len(replace(model, level="block").blocks) > 0
        got = model(x.to(dtype))
    of = [float((y.double() - wanted).square().mean()) ** 0.5 for y in (got, eager)]
    # The joined network rounds as often or less, but elsewhere. With six seeds of the first three the ratio of the two
    # errors was 0.73 to 1.05.
    assert of[0] <= 1.2 * of[1]
