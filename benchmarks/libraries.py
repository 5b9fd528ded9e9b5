"""The models of public libraries by name, with random weights: nothing is downloaded. `make census` installs all."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from examples import zoo

# The largest scale of a layer that a network starts with as good as without.
_ASLEEP = 1e-3
# Words in the source of a network that has a channel gate: SE, or one of its relatives.
_GATES = re.compile(
    r"squeeze_?(and_?)?excit|(\b|Effective)SE(Block|Module|Layer)|se_(layer|ratio|module)|(create|get)_attn|channel_?att|cbam"
    r"|\beca|\bese\b|selective_?kernel|split_?attn",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Model:
    """How a model is built, and the shape of its input; None: images, of a size that it takes."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] | None = None


def _may_have_gates(builder: Callable[..., Any]) -> bool:
    """Whether the file that defines `builder` speaks of channel gates. Most files of a library of networks do not."""
    return _GATES.search(inspect.getsource(sys.modules[builder.__module__])) is not None


def _timm() -> dict[str, Model]:
    import timm

    listed = (name for name in timm.list_models() if _may_have_gates(timm.model_entrypoint(name)))
    return {name: Model(partial(zoo.build, f"timm:{name}")) for name in listed}


def _torchvision() -> dict[str, Model]:
    models = zoo.import_torchvision().models

    def build(name: str) -> nn.Module:
        named = inspect.signature(models.get_model_builder(name)).parameters
        return zoo.build(f"torchvision:{name}", **dict.fromkeys({"weights_backbone"} & {*named}))

    return {name: Model(partial(build, name)) for name in models.list_models()}


def _transformers() -> dict[str, Model]:
    import transformers
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

    b0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
    models: dict[str, dict[str, Any]] = {
        "AlignVisionModel": b0, "EfficientNetModel": b0, "RegNetModel": {"layer_type": "y"}, "PPLCNetBackbone": {},
        "PPLCNetV3Backbone": {}, "PPLCNetV4Backbone": {}, "PPOCRV5MobileDetModel": {}, "PPOCRV6SmallDetModel": {},
        "SLANetBackbone": {}, "PPOCRV5MobileRecModel": {}, "PPOCRV6SmallRecModel": {}, "PPOCRV6TinyRecModel": {},
    }  # fmt: skip

    def build(name: str, options: dict[str, Any]) -> nn.Module:
        config = getattr(transformers, f"{name.removesuffix('Model').removesuffix('Backbone')}Config")
        built: nn.Module = getattr(transformers, name)(config(**options))
        return built

    found = {name: Model(partial(build, name, options)) for name, options in models.items()}
    speaker = partial(omni.ECAPA_TimeDelayNet, omni.Qwen2_5OmniDiTConfig())
    return found | {"Qwen2_5Omni ECAPA_TimeDelayNet": Model(speaker, (2, 48, 80))}


def _efficientnet_pytorch() -> dict[str, Model]:
    from efficientnet_pytorch import VALID_MODELS, EfficientNet

    return {name: Model(partial(EfficientNet.from_name, name)) for name in VALID_MODELS}


def _geffnet() -> dict[str, Model]:
    import geffnet

    listed = (*import_module("geffnet.gen_efficientnet").__all__, *import_module("geffnet.mobilenetv3").__all__)
    return {name: Model(partial(geffnet.create_model, name)) for name in listed if name.islower()}


def _pretrainedmodels() -> dict[str, Model]:
    import pretrainedmodels

    builders = {name: getattr(pretrainedmodels, name) for name in pretrainedmodels.model_names}
    return {name: Model(partial(f, pretrained=None)) for name, f in builders.items() if _may_have_gates(f)}


def _pytorchcv() -> dict[str, Model]:
    from pytorchcv import model_provider

    listed = (name for name, builder in model_provider._models.items() if _may_have_gates(builder))
    return {name: Model(partial(model_provider.get_model, name)) for name in listed}


def _segmentation_models_pytorch() -> dict[str, Model]:
    import segmentation_models_pytorch as smp

    encoders = {
        f"encoder {name}": Model(partial(smp.encoders.get_encoder, name, weights=None))
        for name in smp.encoders.get_encoder_names()
    }
    build = partial(smp.create_model, encoder_name="resnet18", encoder_weights=None)
    decoders = {f"{name} resnet18": Model(partial(build, name)) for name in ("unet", "manet", "pan", "fpn", "linknet")}
    with_scse = {
        f"{name} resnet18 scse": Model(partial(build, name, decoder_attention_type="scse"))
        for name in ("unet", "unetplusplus")
    }
    return encoders | decoders | with_scse


def _monai() -> dict[str, Model]:
    from monai.networks import blocks, nets

    def image(dims: int, channels: int, side: int = 64) -> tuple[int, ...]:
        return (2, channels, *[side] * dims)

    found = {"Quicknat CSE": Model(partial(nets.Quicknat, num_filters=16, se_block="CSE"), image(2, 1))}
    for size in (*(f"b{i}" for i in range(9)), "l2"):
        name = f"efficientnet-{size}"
        for dims in (2, 3):
            build = partial(nets.EfficientNetBN, name, pretrained=False, spatial_dims=dims)
            found[f"EfficientNetBN {name} {dims}-D"] = Model(build, image(dims, 3))
            unet = partial(nets.FlexibleUNet, 3, 2, name, spatial_dims=dims)
            found[f"FlexibleUNet {name} {dims}-D"] = Model(unet, image(dims, 3))
    for name in ("SENet154", "SEResNet50", "SEResNet101", "SEResNet152", "SEResNext50", "SEResNext101"):
        for dims in (2, 3):
            net = partial(getattr(nets, name), spatial_dims=dims, in_channels=3, num_classes=2)
            found[f"{name} {dims}-D"] = Model(net, image(dims, 3))
    for dims in (1, 2, 3):
        for name in ("ChannelSELayer", "ResidualSELayer"):
            found[f"{name} {dims}-D"] = Model(partial(getattr(blocks, name), dims, 16), image(dims, 16, 8))
        found[f"SEBlock {dims}-D"] = Model(partial(blocks.SEBlock, dims, 16, 8, 8, 16), image(dims, 16, 8))
    return found


def _speechbrain() -> dict[str, Model]:
    # It imports torchaudio to read files of sound, which no model does.
    sys.modules["torchaudio"] = stand_in = ModuleType("torchaudio")
    stand_in.__dict__["__version__"] = "2.0"
    try:
        from speechbrain.lobes.models import ECAPA_TDNN, ContextNet, ResNet
    finally:
        del sys.modules["torchaudio"]
    sound = (2, 48, 80)
    return {
        "ECAPA_TDNN": Model(partial(ECAPA_TDNN.ECAPA_TDNN, 80), sound),
        "ResNet": Model(ResNet.ResNet, sound),
        "ContextNet": Model(partial(ContextNet.ContextNet, sound), sound),
        "ContextNet SEmodule": Model(partial(ContextNet.SEmodule, sound, 12), sound),
        "ECAPA_TDNN SEBlock": Model(partial(ECAPA_TDNN.SEBlock, 80, 16, 80), (2, 80, 48)),
        "ResNet SEBlock": Model(partial(ResNet.SEBlock, 80), (2, 80, 8, 8)),
    }


def _pytorchvideo() -> dict[str, Model]:
    from pytorchvideo.layers.squeeze_excitation import SqueezeAndExcitationLayer2D
    from pytorchvideo.models.accelerator.mobile_cpu.efficient_x3d import create_x3d as create_efficient_x3d
    from pytorchvideo.models.x3d import create_x3d

    clips = {"XS": (4, 160), "S": (13, 160), "M": (16, 224)}
    found = {"SqueezeAndExcitationLayer2D": Model(partial(SqueezeAndExcitationLayer2D, 16), (2, 16, 8, 8))}
    for name, (length, side) in clips.items():
        plain = partial(create_x3d, input_clip_length=length, input_crop_size=side)
        found[f"X3D {name}"] = Model(plain, (2, 3, length, side, side))
        if name != "M":
            found[f"EfficientX3D {name}"] = Model(
                partial(create_efficient_x3d, expansion=name), (2, 3, length, side, side)
            )
    return found


def _fvcore() -> dict[str, Model]:
    from fvcore.nn import squeeze_excitation as se

    return {
        f"{layer.__name__} {dims}-D": Model(partial(layer, 16, is_3d=dims == 3), (2, 16, *[8] * dims))
        for layer in (se.SqueezeExcitation, se.ChannelSpatialSqueezeExcitation)
        for dims in (2, 3)
    }


LIBRARIES: dict[str, Callable[[], dict[str, Model]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "efficientnet_pytorch": _efficientnet_pytorch,
    "geffnet": _geffnet,
    "pretrainedmodels": _pretrainedmodels,
    "pytorchcv": _pytorchcv,
    "segmentation_models_pytorch": _segmentation_models_pytorch,
    "monai": _monai,
    "speechbrain": _speechbrain,
    "pytorchvideo": _pytorchvideo,
    "fvcore": _fvcore,
}


@cache
def models(library: str) -> dict[str, Model]:
    """Raises ImportError if the library is not installed."""
    zoo.import_torchvision()  # several libraries import it, and fail where its operators do not load
    return LIBRARIES[library]()


def build(library: str, model: str) -> nn.Module:
    return models(library)[model].build()


def build_bare(library: str, model: str) -> nn.Module:
    """The model, without memory for its weights where the library can build it so."""
    try:
        with torch.device("meta"):
            return build(library, model)
    except (NotImplementedError, RuntimeError):  # some read numbers while they are built, as torchvision's RegNet does
        return build(library, model)


def wake(model: nn.Module) -> nn.Module:
    """`model` with ones for the gains that are zero or next to it at first: its branches would not reach the result."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_vector = p.numel() == max(p.shape, default=1)
            if is_vector and "bias" not in name and float(p.abs().max()) < _ASLEEP:
                p.fill_(1)
    return model
