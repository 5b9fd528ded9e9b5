"""`factory`: models of timm and torchvision that are built with fused layers."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch import nn

from examples import zoo
from se_fused import factory, restore
from se_fused.replace import FusedSE

torchvision = zoo.import_torchvision()
import timm  # noqa: E402
from timm.layers import EcaModule, SEModule  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite  # noqa: E402
from torchvision.models.mobilenetv3 import MobileNetV3, _mobilenet_v3_conf  # noqa: E402
from torchvision.ops import SqueezeExcitation  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "known_layers")
HARD = partial(SqueezeExcitation, scale_activation=nn.Hardsigmoid)


def mobilenet(se_layer) -> nn.Module:
    settings, last = _mobilenet_v3_conf("mobilenet_v3_small")
    for setting in settings:
        setting.block = partial(torchvision.models.mobilenetv3.InvertedResidual, se_layer=se_layer)
    return MobileNetV3(settings, last, block=settings[0].block)


def resnet(se_layer) -> nn.Module:
    return timm.create_model("resnet18", block_args={"attn_layer": se_layer})


# What makes a model from what makes its SE layers, that, and how many layers it then has.
MODELS = {
    "timm, se_layer": (lambda layer: timm.create_model("efficientnet_b0", se_layer=layer), SqueezeExcite, 16),
    "timm, attn_layer": (resnet, SEModule, 8),
    "torchvision, se_layer": (mobilenet, HARD, 9),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_built_fused(name: str) -> None:
    make, se_layer, count = MODELS[name]
    torch.manual_seed(0)
    wanted = make(se_layer).eval()
    torch.manual_seed(0)
    model = make(factory(se_layer)).eval()
    assert sum(isinstance(module, FusedSE) for module in model.modules()) == count
    assert list(model.state_dict()) == list(wanted.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted(x))
        assert torch.equal(restore(model)(x), wanted(x))


def test_the_arguments_are_those_of_the_layer() -> None:
    assert inspect.signature(factory(SEModule)) == inspect.signature(SEModule)
    assert factory(SEModule).__name__ == "SEModule"
    assert factory(SEModule)(32, rd_channels=4).fc1.weight.shape == (4, 32, 1, 1)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = factory(SEModule)(32)
    assert isinstance(layer, FusedSE)
    assert layer.fc1.weight.is_meta


def test_a_layer_that_is_no_se_is_an_error() -> None:
    with pytest.raises(ValueError, match="no SE layer of the EcaModule was replaced"):
        factory(EcaModule)(32)
