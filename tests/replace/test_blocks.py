"""`replace(model, level="block")`: which neighbours are found, equal results, and what happens after a change."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from se_layers import Plus, SqueezeExcitation
from torch import Tensor, nn
from torch.nn.utils import prune

import se_fused
from examples import zoo
from se_fused import replace, restore
from se_fused.blocks import FusedBlock

pytestmark = pytest.mark.usefixtures("one_thread")
ACTS = {"silu": nn.SiLU, "relu": nn.ReLU, "hardswish": nn.Hardswish, "identity": nn.Identity, "gelu": nn.GELU}
C = 16


class Inverted(nn.Module):
    """Depthwise convolution, batch norm, activation, SE, 1x1 convolution, batch norm, residual: MobileNetV3's order."""

    def __init__(self, act: str = "silu", dims: int = 4, bias: bool = False, affine: bool = True) -> None:
        super().__init__()
        conv, norm = {
            3: (nn.Conv1d, nn.BatchNorm1d),
            4: (nn.Conv2d, nn.BatchNorm2d),
            5: (nn.Conv3d, nn.BatchNorm3d),
        }[dims]
        self.conv = conv(C, C, 3, padding=1, groups=C, bias=bias)
        self.bn1 = norm(C, affine=affine)
        self.act = ACTS[act]()
        self.se = se_layer(dims)
        self.project = conv(C, C, 1, bias=bias)
        self.bn2 = norm(C, affine=affine, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.project(self.se(self.act(self.bn1(self.conv(x))))))


class Residual(nn.Module):
    """1x1 convolution, batch norm, SE, residual, activation: SE-ResNet's order, in functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.se = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), SqueezeExcitation(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.bn(self.conv(x)))
        y += x
        return F.relu(y)


class Linear(nn.Module):
    """SE of nn.Linear, for maps of any rank."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.fc2(F.relu(self.fc1(x.flatten(2).mean(2)))))
        return x * s[(..., *(None,) * (x.dim() - 2))]


def se_layer(dims: int) -> nn.Module:
    return SqueezeExcitation(C, 4) if dims == 4 else Linear()


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode with random batch norms."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def image(n: int = 2, dims: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, C, *(9, 8, 7)[: dims - 2]).to(dtype)


def assert_same(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert got.dtype is wanted.dtype
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def found_in(model: nn.Module) -> list[str]:
    return [str(each) for block in replace(model, level="block").blocks.values() for each in block]


@pytest.mark.parametrize("dims", [3, 4, 5])
@pytest.mark.parametrize("act", ACTS)
def test_inverted_residual(act: str, dims: int) -> None:
    model = drawn(Inverted(act, dims))
    original = copy.deepcopy(model)
    found = "bn1 + " + (f"{act} + " if act != "identity" else "") + "se + project + bn2, in place"
    assert found_in(model) == [found]
    assert isinstance(model, FusedBlock)
    assert isinstance(model, Inverted)
    for n in (1, 2, 5):
        x = image(n, dims)
        before = x.clone()
        with torch.no_grad():
            assert_same(model(x), original(x))
        assert torch.equal(x, before)


def test_residual() -> None:
    model = drawn(Residual())
    original = copy.deepcopy(model)
    assert found_in(model) == ["bn + se + residual + relu, in place"]
    x = image()
    before = x.clone()
    with torch.no_grad():
        assert_same(model(x), original(x))
    assert torch.equal(x, before)


@settings(max_examples=60, deadline=None)
@given(
    act=st.sampled_from(sorted(ACTS)), bias=st.booleans(), affine=st.booleans(), n=st.integers(1, 20),
    sides=st.tuples(st.integers(1, 40), st.integers(1, 40)), channels_last=st.booleans(), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_any_map(act, bias, affine, n, sides, channels_last, seed, dtype) -> None:
    model = drawn(Inverted(act, bias=bias, affine=affine), seed).to(dtype)
    original, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    replace(model, level="block")
    x = torch.randn(n, C, *sides).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        got, eager, wanted = model(x), original(x), exact(x.double())
    assert got.dtype is dtype
    assert got.stride() == eager.stride()
    of = [float((y.double() - wanted).abs().max() / wanted.abs().max()) for y in (got, eager)]
    assert of[0] <= 2 * of[1] + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "name",
    [
        "timm:efficientnet_b0", "timm:mobilenetv3_small_100", "timm:seresnet50", "timm:regnety_002", "timm:mixnet_s",
        "timm:tresnet_m", "timm:hgnet_small", "timm:ghostnet_100", "torchvision:mobilenet_v3_small",
        "torchvision:efficientnet_b0",
    ],
)  # fmt: skip
def test_models(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 160, 128)
    model = zoo.settled(zoo.build(name), x)
    original, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    report = replace(model, level="block")
    assert len(report.replaced) == sum(map(len, report.blocks.values())) + len(report.alone)
    assert len(report.blocks) > 0
    with torch.no_grad():
        got, eager, wanted = model(x), original(x), exact(x.double())
        of = [float((y.double() - wanted).abs().max() / wanted.abs().max()) for y in (got, eager)]
        assert of[0] <= max(1e-5, 3 * of[1])
        restore(model)
        assert torch.equal(model(x), eager)
    assert not any(isinstance(module, FusedBlock) for module in model.modules())


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
    model.project.weight = nn.Parameter(torch.randn_like(model.project.weight))


def _new_statistics(model: nn.Module) -> None:
    model.bn1.running_mean = torch.randn(C)


def _prune(model: nn.Module) -> None:
    prune.random_unstructured(model.project, "weight", 0.5)


def _reset(model: nn.Module) -> None:
    model.bn1.reset_running_stats()


def _drop_statistics(model: nn.Module) -> None:
    model.bn2.running_mean = model.bn2.running_var = None


CHANGES_OF_NUMBERS = [
    _drop_statistics,
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
    model, x = drawn(Inverted()), image()
    replace(model, level="block")
    with torch.no_grad():
        model(x)
    change(model)
    x = x.to(model.conv.weight.dtype)
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
    assert len(found_in(model)) == 1
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


class Both(Inverted):
    """Returns the map before SE as well."""

    def forward(self, x: Tensor) -> Tensor:
        u = self.act(self.bn1(self.conv(x)))
        return self.bn2(self.project(self.se(u))) + u


class Twice(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.se(self.bn1(self.conv(self.se(x)))))


class SizeDependent(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[2] > 4 else x


class Counts(Inverted):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Keeps(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return self.bn2(self.project(self.se(self.act(self.bn1(self.last)))))


class Clamped(Inverted):
    """Between batch norm and SE stands what is an identity for all but large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Hardtanh(-1000, 1000)


class WritesOver(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu_(x))


class Noisy(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, training=True))


class IntoShortcut(Residual):
    """The sum is written over the shortcut, which is the block's input."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.se(self.bn(self.conv(x)))
        return F.relu(x)


class Broadcast(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.se(self.bn(self.conv(x))) + x.mean((2, 3), keepdim=True))


class WritesBetween(nn.Module):
    """x changes after the batch norm has read it, and before the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.se = nn.BatchNorm2d(C), SqueezeExcitation(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.se(self.bn(x))
        x.add_(1)
        return y + x


class Parametrised(Inverted):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.project)


class ReadsNumber(Inverted):
    """A number of a buffer, which may change, decides."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flag", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.flag else x


class ReadsParameter(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * next(iter(self.parameters()))[0, 0, 0, 0].item()


class Autocasts(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class ReadsDtype(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.dtype is torch.float32 else 1)


class ReadsMode(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if torch.is_inference_mode_enabled() else 1)


class CountsElsewhere(Inverted):
    def __init__(self) -> None:
        super().__init__()
        self.elsewhere = SimpleNamespace(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        self.elsewhere.calls += 1
        return super().forward(x)


class Clips(Inverted):
    """The map is changed after the batch norm has read it, in a way that only infinite numbers show."""

    def forward(self, x: Tensor) -> Tensor:
        c = self.conv(x)
        u = self.bn1(c)
        c.clamp_(-1e30, 1e30)
        return self.se(u)


UNJOINED = [
    *(ReadsNumber, ReadsParameter, Autocasts, ReadsDtype, ReadsMode, CountsElsewhere, Clips, Parametrised),
    *(Twice, SizeDependent, Counts, Keeps, WritesOver, Noisy),
]


@pytest.mark.parametrize("block", [Broadcast, WritesBetween, Both, Clamped, IntoShortcut, *UNJOINED])
def test_what_is_not_joined(block: type[nn.Module]) -> None:
    """A block is left alone, or joined without what another reads; in both cases it computes what it did."""
    model = drawn(block())
    original = copy.deepcopy(model)
    report = replace(model, level="block")
    assert list(report.replaced) == ["se"]
    if block in UNJOINED:
        assert list(report.alone) == ["se"]
    for factor in (1, 1e5):
        xs = [image() * factor] * 2
        ys = []
        for each in (model, original):
            torch.manual_seed(1)
            x = xs[0].clone()
            with torch.no_grad():
                ys.append((each(x), x))
        for got, wanted in zip(*ys, strict=True):
            assert_same(got, wanted, 3e-2 if block is Autocasts else 1e-5)
    if block is Counts:
        assert model.calls == original.calls == 2


def test_infinite_numbers_reach_who_read_them() -> None:
    model, x = drawn(Clips()), image()
    x[0, 0] = torch.inf
    original = copy.deepcopy(model)
    replace(model, level="block")
    with torch.no_grad():
        assert torch.equal(model(x).isnan(), original(x).isnan())


def test_a_batch_norm_of_tiny_scale_in_float16() -> None:
    """1e-5 times a weight is below the numbers of float16."""
    model = drawn(Inverted())
    nn.init.constant_(model.bn2.weight, 1e-5)
    nn.init.constant_(model.bn2.bias, 0)
    model.bn2.running_mean.zero_()
    exact, model = copy.deepcopy(model).half().double(), model.half()
    replace(model, level="block")
    x = torch.zeros_like(image()).half()  # without the residual
    model.conv.bias = exact.conv.bias = None
    with torch.no_grad():
        wanted, got = exact(x.double()), model(x)
    assert float((got.double() - wanted).abs().max()) <= 2e-2 * float(wanted.abs().max())


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


def test_the_residual_of_the_layer_itself() -> None:
    """x * (1 + s) of a layer after a batch norm: its residual is not the map before that."""
    model = drawn(
        nn.Sequential(
            nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU(), Plus(SqueezeExcitation(C, 4)), nn.Conv2d(C, C, 1)
        )
    )
    original, x = copy.deepcopy(model), image()
    assert len(replace(model, level="block").replaced) == 1
    with torch.no_grad():
        assert_same(model(x), original(x))


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


def test_no_call_reads_what_it_was_not_made_for() -> None:
    model, x = drawn(Inverted()), image()
    original = copy.deepcopy(model)
    replace(model, level="block")
    with torch.no_grad():
        assert model(x[:0]).shape == original(x[:0]).shape
        for strided in (x[:, :, ::2], x.mT, x.expand(3, 2, C, 9, 8)[1]):
            assert_same(model(strided), original(strided))
        with pytest.raises(RuntimeError, match="channels"):
            model(torch.randn(2, C + 1, 9, 8))
        with pytest.raises(RuntimeError, match=r"dtype|type"):
            model(x.double())


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"replace: level is 'network'; wanted 'layer' or 'block'"):
        replace(nn.Identity(), level="network")
    model = drawn(Inverted())
    report = replace(model, level="block", dry_run=True)
    assert len(report.blocks) == 1
    assert type(model) is Inverted
    assert type(model.se) is SqueezeExcitation
    assert "bn1 + silu + se + project + bn2, in place" in str(report)
