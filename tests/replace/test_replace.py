"""`replace` and `restore` on real models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import se_fused
from examples import zoo
from se_fused.options import HardSigmoid
from se_fused.replace import FusedSE, replace, restore

torchvision = zoo.import_torchvision()
from se_layers import Plus  # noqa: E402
from timm.layers import EffectiveSEModule, SEModule  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite  # noqa: E402
from timm.models.senet import SEModule as LegacySE  # noqa: E402
from torchvision.ops import SqueezeExcitation  # noqa: E402

# In float64. It is not `cases.TOLERANCE`, which is for one layer: rounding piles up over a network. Up to 4e-13 was
# measured, after up to 16 SE layers and three times as many normalisations.
RTOL = 1e-11
MODELS = {
    "torchvision:mobilenet_v3_small": (SqueezeExcitation, 9),
    "torchvision:mobilenet_v3_large": (SqueezeExcitation, 8),
    "torchvision:efficientnet_b0": (SqueezeExcitation, 16),
    "torchvision:regnet_y_400mf": (SqueezeExcitation, 16),
    "timm:seresnet18": (SEModule, 8),
    "timm:regnety_002": (SEModule, 13),
    "timm:legacy_seresnet18": (LegacySE, 8),
    "timm:mobilenetv3_small_100": (SqueezeExcite, 9),
    "timm:semnasnet_075": (SqueezeExcite, 8),
    "timm:lcnet_050": (SqueezeExcite, 2),
    "timm:ese_vovnet19b_slim": (EffectiveSEModule, 4),
}


pytestmark = pytest.mark.usefixtures("one_thread", "known_layers")


def se_model(**options) -> nn.Module:
    return zoo.build("timm:mobilenetv3_small_100", **options).eval()


def lively(name: str, x: Tensor) -> nn.Module:
    """The model without the zeros in the scales of residual branches, which hide fresh SE layers."""
    model = zoo.build(name).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = 0.9
    with torch.no_grad():
        for _ in range(2):
            model(x)
    return model


def digest(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Outputs and gradients in eval and train mode, computed on a copy, so that `model` does not change."""
    found = {}
    for mode in ("eval", "train"):
        own = copy.deepcopy(model).train(mode == "train")
        given = x.clone().requires_grad_()
        # Stochastic depth and the dropout of the classifier draw from the global generator.
        torch.manual_seed(0)
        y = own(given)
        y.backward(torch.randn_like(y))
        found[f"{mode}: output"] = [y.detach()]
        found[f"{mode}: gradient of x"] = [given.grad]
        found[f"{mode}: gradients of parameters"] = [p.grad for p in own.parameters()]
        found[f"{mode}: buffers"] = [b.double() for b in own.buffers()]
    return found


def assert_close(got: dict[str, list[Tensor]], wanted: dict[str, list[Tensor]], hard_gates: int) -> None:
    """Equal in float64, except that F.hardsigmoid's backward uses a float32 1/6, off by 2**-25 in each layer."""
    for name, tensors in wanted.items():
        rtol = RTOL + (2**-25 * hard_gates if "gradient" in name else 0)
        # Some gradients are 0 except for rounding (of a bias before a normalisation), so the scale is the largest one.
        scale = max(t.abs().max().item() for t in tensors)
        error = max((a - b).abs().max().item() for a, b in zip(got[name], tensors, strict=True))
        assert error <= rtol * scale, f"{name}: {error:.1e}, the largest number being {scale:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_model_keeps_its_numbers_its_state_and_comes_back(name: str) -> None:
    kind, count = MODELS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    model = lively(name, x)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    state = {key: t.data_ptr() for key, t in model.state_dict().items()}
    layers = [key for key, module in modules.items() if isinstance(module, kind)]
    wanted = digest(model, x)

    report = replace(model)

    assert report.model is model
    assert list(report.replaced) == layers
    assert len(layers) == count
    assert report.skipped == {}
    assert {key: t.data_ptr() for key, t in model.state_dict().items()} == state
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys()
    assert all(now[key] is p for key, p in parameters.items())
    assert sum(isinstance(module, FusedSE) for module in model.modules()) == count
    assert_close(digest(model, x), wanted, sum(isinstance(se.gate, HardSigmoid) for se in report.replaced.values()))

    assert restore(model) is model
    back = dict(model.named_modules())
    assert back.keys() == modules.keys()
    assert all(back[key] is module and not isinstance(module, FusedSE) for key, module in modules.items())
    restored = digest(model, x)
    assert all(torch.equal(a, b) for key in wanted for a, b in zip(restored[key], wanted[key], strict=True))


@pytest.mark.parametrize("name", ["timm:repvgg_a0", "timm:ecaresnet26t"])
def test_models_with_nothing_to_replace(name: str) -> None:
    report = replace(zoo.build(name))
    assert report.replaced == report.skipped == {}


class Block(nn.Module):
    """A block with one SE layer in two places, in one of them wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SEModule(16)
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_shared_layer_is_replaced_in_all_places() -> None:
    model, x = Block().double(), torch.randn(2, 16, 5, 4, dtype=torch.float64)
    wanted = model(x)
    report = replace(model)
    assert list(report.replaced) == ["first", "second.1"]
    assert model.first is model.second[1]
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    restore(model)
    assert torch.equal(model(x), wanted)


def test_outermost_layer_of_a_nest_is_replaced() -> None:
    model = nn.Sequential(Plus(SEModule(16)), nn.Sequential(SEModule(16))).double()
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    wanted = model(x)
    report = replace(model)
    assert list(report.replaced) == ["0", "1"]
    assert report.replaced["0"].residual
    assert not isinstance(model[0].inner, FusedSE)
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


def test_inner_layer_is_replaced_where_the_outer_one_cannot_be() -> None:
    model = nn.Sequential(SEModule(16), nn.BatchNorm2d(16), nn.ReLU())
    report = replace(model)
    assert list(report.replaced) == ["0"]
    assert report.skipped == {}


def test_root_that_is_a_layer() -> None:
    layer = SEModule(16)
    report = replace(layer)
    assert list(report.replaced) == [""]
    assert isinstance(report.model, FusedSE)
    assert "(the model)" in str(report)
    assert restore(report.model) is layer
    assert type(layer) is SEModule


def test_dry_run_changes_nothing() -> None:
    model = se_model()
    before = {name: (type(m), vars(m).keys()) for name, m in model.named_modules()}
    report = replace(model, dry_run=True)
    assert {name: (type(m), vars(m).keys()) for name, m in model.named_modules()} == before
    assert report.replaced == replace(model).replaced != {}


def test_second_time_skips_all() -> None:
    model = se_model()
    first = replace(model)
    second = replace(model)
    assert second.replaced == {}
    assert second.skipped == dict.fromkeys(first.replaced, "already fused")
    assert replace(nn.Sequential(se_fused.SqueezeExcite(16))).skipped == {"0": "already fused"}


def test_include_and_exclude() -> None:
    model = nn.ModuleDict(
        {"a": SEModule(16), "b": SEModule(16), "c": nn.Sequential(SEModule(16), nn.ReLU()), "d": Plus(SEModule(16))}
    )

    def outcome(**patterns) -> tuple[list[str], dict[str, str]]:
        report = replace(model, dry_run=True, **patterns)
        return list(report.replaced), report.skipped

    assert outcome() == (["a", "b", "c.0", "d"], {})
    none = "no pattern of include matches"
    assert outcome(include="a") == (["a"], dict.fromkeys(["b", "c.0", "d.inner"], none))
    assert outcome(include=["[ab]", "c.*"]) == (["a", "b", "c.0"], {"d.inner": none})
    assert outcome(include=[]) == ([], dict.fromkeys(["a", "b", "c.0", "d.inner"], none))
    assert outcome(include="d.inner") == (["d.inner"], dict.fromkeys(["a", "b", "c.0"], none))
    assert outcome(exclude=["a", "c*"]) == (["b", "d"], {"a": "excluded by 'a'", "c.0": "excluded by 'c*'"})
    # A wrapper is not replaced where a layer inside it is excluded.
    assert outcome(include="[ad]*", exclude="d.inner")[0] == ["a"]


def test_fused_layer_shows_its_formula() -> None:
    model = nn.Sequential(SEModule(32), nn.ReLU())
    replace(model)
    assert "fused: SEModule: C=32" in repr(model)


def calls_of_fused_op(function: Callable[[], object]) -> int:
    """How often the package's own operators run; 0 without its kernels."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.namespace == "se_fused"
            return func(*args, **(kwargs or {}))

    with Count() as mode:
        function()
    return mode.count


def test_replaced_layers_call_the_fused_operation() -> None:
    if se_fused.explain(torch.zeros(1, 2, 1, 1), None, None, torch.zeros(2, 2), None).backend == "reference":
        pytest.skip("no compiled kernels here")
    model, x = se_model(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert calls_of_fused_op(lambda: model(x)) == 0
        count = len(replace(model).replaced)
        assert calls_of_fused_op(lambda: model(x)) >= count


@pytest.mark.parametrize("name", ["resnet18", "keras:resnet", "timm:no_such_model", "torchvision:no_such_model"])
def test_zoo_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"wanted torchvision:<model>|no_such_model"):
        zoo.build(name)
