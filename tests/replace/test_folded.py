"""SE layers with batch norms, doubled gates or channels last: what becomes of them after `replace`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import se_fused
from examples import zoo

zoo.import_torchvision()
from timm.layers import SEModule  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
C, R = 12, 5


class Calls(TorchDispatchMode):
    """Counts the calls of the operation and of batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += func.namespace == "se_fused"
        self.norms += "batch_norm" in str(func)
        return func(*args, **(kwargs or {}))


def is_fused(layer: nn.Module, x: Tensor) -> bool:
    with Calls() as calls, torch.no_grad():
        layer(x)
    assert not (calls.fused and calls.norms)
    return calls.fused > 0


class Normed(nn.Module):
    """Batch norms, with weight and bias or not, at any of the places z, p1, h and p2."""

    def __init__(self, places: dict[str, bool], bias: bool, doubled: bool, last: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, R, bias=bias), nn.Linear(R, C, bias=bias)
        width = {"z": C, "p1": R, "h": R, "p2": C}
        self.norms = nn.ModuleDict({at: nn.BatchNorm1d(width[at], affine=affine) for at, affine in places.items()})
        self.doubled, self.last = doubled, last

    def at(self, place: str, v: Tensor) -> Tensor:
        return self.norms[place](v) if place in self.norms else v

    def forward(self, x: Tensor) -> Tensor:
        z = self.at("z", x.mean((1, 2) if self.last else (2, 3)))
        h = self.at("h", F.silu(self.at("p1", self.fc1(z))))
        s = torch.sigmoid(self.at("p2", self.fc2(h))) * (2 if self.doubled else 1)
        return x * (s[:, None, None] if self.last else s[..., None, None])


def drawn(layer: nn.Module) -> nn.Module:
    """`layer` in eval mode, with statistics and factors of which none is 0 or 1."""
    for norm in layer.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 3)
            for p in norm.parameters():
                nn.init.uniform_(p, -2, 2)
    return layer.eval()


def normed(**places: bool) -> nn.Module:
    return drawn(Normed(places or {"p1": True}, bias=True, doubled=False, last=False))


def results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf)
    wanted = {"x": leaf, **dict(layer.named_parameters())}
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    gradients = torch.autograd.grad(y, list(wanted.values()), weights)
    with torch.no_grad():
        plain = layer(x.clone(memory_format=torch.preserve_format))
    return {"y": y.detach(), "without grad": plain, **dict(zip(wanted, gradients, strict=True))}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, right in wanted.items():
        error = float((got[name].double() - right.double()).abs().max() / right.double().abs().max())
        assert error <= tolerance, (name, error)


affine = st.booleans()
places = st.fixed_dictionaries({}, optional={"z": affine, "p1": affine, "h": affine, "p2": affine})


@settings(max_examples=30)
@given(places, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_results_and_gradients_are_those_of_the_layer(
    places: dict[str, bool], bias: bool, doubled: bool, last: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = drawn(Normed(places, bias, doubled, last))
    original = copy.deepcopy(layer)
    assert len(se_fused.replace(layer).replaced) == 1
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        shape = (3, 8, 5, C) if last else (3, C, 8, 5)
        x = torch.randn(shape, dtype=dtype)
        layer.to(dtype), original.to(dtype)
        assert is_fused(layer, x)
        assert_same(results(layer, x), results(original, x), tolerance)


@pytest.mark.parametrize("mean", [0, 30])
@pytest.mark.parametrize("norms", [{"p1": True, "p2": True}, {"z": True}, {"z": True, "p1": True, "h": True}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_the_layer(dtype: torch.dtype, norms: dict[str, bool], mean: float) -> None:
    torch.manual_seed(0)
    layer = drawn(Normed(norms, bias=True, doubled=True, last=False))
    if "z" in norms:
        layer.norms["z"].running_mean.add_(mean)
    layer.to(dtype)
    exact, x = copy.deepcopy(layer).double(), (torch.randn(4, C, 9, 7) + mean).to(dtype)
    wanted, eager = exact(x.double()), layer(x)
    se_fused.replace(layer)
    assert is_fused(layer, x)
    assert (layer(x).double() - wanted).abs().max() <= 1.5 * (eager.double() - wanted).abs().max()


def test_weights_that_are_much_larger_than_the_map_are_not_folded() -> None:
    layer = normed(p1=True)
    original = copy.deepcopy(layer)
    se_fused.replace(layer)
    for side, fused in ((1, False), (4, True)):
        x = torch.randn(1, C, 1, side)
        assert is_fused(layer, x) == fused
        torch.testing.assert_close(layer(x), original(x))


def test_training_is_that_of_the_layer() -> None:
    torch.manual_seed(0)
    layer = normed(p1=True, p2=True)
    original = copy.deepcopy(layer)
    se_fused.replace(layer)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (layer, original)]
    for _ in range(3):
        x = torch.randn(6, C, 3, 4)
        for each, optimizer in zip((layer, original), optimizers, strict=True):
            each.train()(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    state = original.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())
    assert torch.equal(layer(x), original(x))
    assert is_fused(layer.eval(), x)
    assert_same(results(layer, x), results(original.eval(), x), 2e-5)


def test_the_mode_of_each_norm_counts() -> None:
    layer, x = normed(p1=True, p2=False), torch.randn(3, C, 4, 2)
    se_fused.replace(layer)
    layer.train()
    assert not is_fused(layer, x)
    layer.norms["p1"].eval()
    assert not is_fused(layer, x)
    layer.norms["p2"].eval()
    assert is_fused(layer, x)
    layer.eval().norms["p1"].train()
    assert not is_fused(layer, x)


def without_statistics(norm: nn.Module) -> None:
    norm.running_mean = norm.running_var = None


def of_one_channel(norm: nn.Module) -> None:
    norm.running_mean, norm.weight = torch.ones(1), nn.Parameter(torch.ones(1))


# Whether the layer stays fused; None: the original raises.
CHANGES: dict[str, tuple[Callable[[Any], object], bool | None]] = {
    "statistics in place": (lambda norm: norm.running_var.mul_(3), True),
    "statistics through .data": (lambda norm: norm.running_var.data.mul_(3), True),
    "other statistics": (lambda norm: setattr(norm, "running_mean", torch.randn(R)), True),
    "weight": (lambda norm: nn.init.normal_(norm.weight), True),
    "no bias": (lambda norm: setattr(norm, "bias", None), True),
    "no statistics": (without_statistics, False),
    "float64": (lambda norm: norm.double(), None),
    "one channel": (of_one_channel, None),
    "eps": (lambda norm: setattr(norm, "eps", 0.5), False),
    "a hook": (lambda norm: norm.register_forward_hook(lambda *_: None), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_norm_are_followed(change: str) -> None:
    torch.manual_seed(0)
    act, stays = CHANGES[change]
    layer, x = normed(p1=True), torch.randn(3, C, 4, 2)
    original = copy.deepcopy(layer)
    se_fused.replace(layer)
    torch.manual_seed(1)
    act(layer.norms["p1"])
    torch.manual_seed(1)
    act(original.norms["p1"])
    if stays is None:
        for each in (original, layer):
            with pytest.raises(RuntimeError):
                each(x)
        return
    torch.testing.assert_close(layer(x), original(x))
    assert is_fused(layer, x) == stays


def test_copies_stay_fused() -> None:
    layer, x = normed(p1=True, h=True), torch.randn(3, C, 4, 2)
    wanted = layer(x)
    se_fused.replace(layer)
    for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert is_fused(each, x)
        torch.testing.assert_close(each(x), wanted)


def test_restore() -> None:
    layer, x = normed(p1=True), torch.randn(3, C, 4, 2)
    wanted = layer(x)
    se_fused.replace(layer)
    assert torch.equal(se_fused.restore(layer)(x), wanted)


class Apart(nn.Module):
    """A bias that is added apart, so that under autocast the result is float32 as it is."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, R), nn.Linear(R, C, bias=False)
        self.b2 = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        s = self.fc2(F.relu(self.fc1(x.mean((2, 3)))))
        return x * torch.sigmoid(s[..., None, None] + self.b2 if self.b2.dim() > 1 else (s + self.b2)[..., None, None])


@pytest.mark.parametrize("shape", [(C,), (1, C, 1, 1), (C, 1, 1)])
def test_a_bias_added_apart(shape: tuple[int, ...]) -> None:
    layer, x = Apart(*shape), torch.randn(3, C, 4, C)
    original = copy.deepcopy(layer)
    assert len(se_fused.replace(layer).replaced) == 1
    assert is_fused(layer, x)
    assert_same(results(layer, x), results(original, x), 2e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = layer(x.bfloat16()), original(x.bfloat16())
    assert got.dtype is wanted.dtype is torch.float32
    assert torch.equal(got, wanted)
    for other in ((1,), (1, 1, 1, 1), (1, C, 1, 1), (1, 1, 1, C), (3, C, 4, C)):  # which a sum broadcasts
        layer.b2 = original.b2 = nn.Parameter(torch.randn(other))
        try:
            wanted = original(x)
        except (RuntimeError, IndexError):
            continue
        torch.testing.assert_close(layer(x), wanted)


class Counting(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return super().forward(x)


class Debiased(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        bias = 1 - 0.9 ** float(self.num_batches_tracked)
        return F.batch_norm(x, self.running_mean / bias, self.running_var, self.weight, self.bias)


@pytest.mark.parametrize("norm", [Counting, Debiased])
def test_norms_with_a_forward_of_their_own_are_kept(norm: type[nn.Module]) -> None:
    layer = SEModule(32, norm_layer=norm).eval()
    layer.bn.num_batches_tracked.fill_(5000)
    assert list(se_fused.replace(layer).skipped.values()) == [
        "it holds buffers: bn.running_mean, bn.running_var, bn.num_batches_tracked"
    ]


class LastIfItFits(nn.Module):
    """Takes the last axis for the channels if its size is C."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, R), nn.Linear(R, C)

    def forward(self, x: Tensor) -> Tensor:
        last = x.shape[-1] == C
        s = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((1, 2) if last else (2, 3))))))
        return x * (s[:, None, None] if last else s[..., None, None])


@pytest.mark.parametrize("shape", [(2, C, 7, 5), (2, 7, 5, C), (2, C, 7, C), (2, C, C, C)])
def test_an_order_that_depends_on_the_shape(shape: tuple[int, ...]) -> None:
    layer, x = LastIfItFits(), torch.randn(shape)
    wanted = layer(x)
    report = se_fused.replace(layer)
    torch.testing.assert_close(layer(x), wanted)
    assert report.replaced == {}


class AnyOrder(Apart):
    """Channels first, but for maps of the other order too."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != C:
            return self(x.movedim(-1, 1)).movedim(1, -1)
        return super().forward(x)


def test_another_number_of_channels_computes_as_before() -> None:
    layer, x = AnyOrder(C), torch.randn(2, 7, 5, C)
    wanted = layer(x)
    assert len(se_fused.replace(layer).replaced) == 1
    torch.testing.assert_close(layer(x), wanted)


def test_autocast() -> None:
    torch.manual_seed(0)
    layer, x = normed(p1=True), torch.randn(3, C, 4, 2)
    exact = copy.deepcopy(layer).double()(x.double())
    se_fused.replace(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype is torch.bfloat16
    assert (y.double() - exact).abs().max() <= 0.02 * exact.abs().max()


@pytest.mark.parametrize("level", ["layer", "block"])
def test_a_network(level: str) -> None:
    torch.manual_seed(0)
    model = drawn(zoo.build("timm:rexnet_100").eval())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        eager = model(x)
        report = se_fused.replace(model, level=level)
        assert len(report.replaced) == 13
        assert report.skipped == report.near == {}
        assert (model(x) - wanted).abs().max() <= 3 * (eager - wanted).abs().max() + 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_doubled_gate_is_exact(inplace: bool) -> None:
    """Relative to the smallest gates, and for infinite numbers."""
    layer = Normed({}, bias=True, doubled=True, last=False).eval()
    with torch.no_grad():
        layer.fc2.bias.copy_(torch.linspace(-30, 30, C))
        layer.fc1.weight.abs_()
        layer.fc2.weight.abs_()
    exact, x = copy.deepcopy(layer).double(), torch.randn(3, C, 4, 2)
    assert str(next(iter(se_fused.replace(layer, inplace=inplace).replaced.values()))).endswith("2 * sigmoid")
    x[0, 0, 0, 0] = torch.inf
    wanted = exact(x.double())
    assert is_fused(layer, x.clone())
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=0)
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=0)
    assert (y.data_ptr() == x.data_ptr()) == inplace


def orders(x: Tensor) -> dict[str, Tensor]:
    """`x` [N, H, W, C] in several orders of its memory."""
    return {
        "contiguous": x.contiguous(),
        "[N, C, H, W]": x.movedim(-1, 1).contiguous().movedim(1, -1),
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "every other": torch.stack([x, x], -1)[..., 0],
    }


@pytest.mark.parametrize("inplace", [False, True])
def test_channels_last(inplace: bool) -> None:
    torch.manual_seed(0)
    layer = Normed({}, bias=True, doubled=False, last=True).eval()
    original = copy.deepcopy(layer)
    assert str(next(iter(se_fused.replace(layer, inplace=inplace).replaced.values()))).endswith("channels last")
    for name, x in orders(torch.randn(3, 6, 5, C)).items():
        wanted = original(x)
        with torch.no_grad():
            given = x.clone(memory_format=torch.preserve_format)
            y = layer(given)
        torch.testing.assert_close(y, wanted, msg=name)
        assert y.stride() == wanted.stride(), name
        assert (y.data_ptr() == given.data_ptr()) == inplace
        assert_same(results(layer, x), results(original, x), 2e-5)


def test_tokens() -> None:
    class Tokens(SEModule):
        def forward(self, x: Tensor) -> Tensor:
            z = x.mean(1)[..., None, None]
            return x * self.gate(self.fc2(self.act(self.fc1(z)))).flatten(1)[:, None]

    layer, x = Tokens(16).eval(), torch.randn(2, 197, 16)
    wanted = layer(x)
    assert next(iter(se_fused.replace(layer).replaced.values())).dims == (3,)
    assert is_fused(layer, x)
    torch.testing.assert_close(layer(x), wanted)
