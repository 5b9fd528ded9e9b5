"""Models of public libraries by name, with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def import_torchvision() -> Any:
    """torchvision, even if its compiled operators do not load because it was built for another torch.

    Its models need none of them, but its import looks up the names of two, which are then defined without a kernel.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # A library object removes its operators when it is deleted.
        global _names
        _names = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _names.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def build(name: str, **options: Any) -> nn.Module:
    """The model called `name`: "torchvision:efficientnet_b0", "timm:seresnet50", "monai:efficientnet-b0" or
    "efficientnet_pytorch:efficientnet-b0"; `options` go to its constructor.

    Raises:
        ValueError: for another library than these, or a model that the library does not know.
    """
    library, _, model = name.partition(":")
    if library == "efficientnet_pytorch":
        from efficientnet_pytorch import EfficientNet

        return EfficientNet.from_name(model, **options)
    if library == "monai":
        from monai.networks.nets import EfficientNetBN

        return EfficientNetBN(model, **{"spatial_dims": 2, "in_channels": 3, "pretrained": False} | options)
    torchvision = import_torchvision()
    if library == "torchvision":
        built: nn.Module = torchvision.models.get_model(model, weights=None, **options)
        return built
    if library != "timm":
        raise ValueError(f"build: name is {name!r}; wanted torchvision:<model> or timm:<model>")
    import timm

    if not timm.is_model(model):
        raise ValueError(f"build: timm knows no model {model!r}")
    return timm.create_model(model, pretrained=False, **options)


def settled(model: nn.Module, batch: torch.Tensor) -> nn.Module:
    """`model` in eval mode, with weights as much like trained ones as random weights can be.

    No batch norm has weight zero, with which some blocks start, and all have the statistics of `batch`, so that the
    maps have the scale of a trained network's.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        if not norm.weight.any():
            nn.init.ones_(norm.weight)
        norm.train().momentum = 1.0
    with torch.inference_mode():
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return model
