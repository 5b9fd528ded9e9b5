"""Known networks on scikit-learn's two photographs, before and after `se_fused.replace`.

Nothing is downloaded, so the weights are random, from a fixed seed. A fresh network would show little, because some
blocks start with a batch norm of weight zero, whose SE layer sees only zeros. So such weights become one, and every
batch norm takes its statistics from the photographs. The maps then have the scale of a trained network's. That is
enough to compare outputs and times; what the gates let through has no meaning.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import se_fused
from examples import zoo
from se_fused.measure import interleaved, largest_difference

SEED = 0
MODELS = {
    "SE-ResNet-50": "timm:seresnet50",
    "MobileNetV3-Large": "torchvision:mobilenet_v3_large",
    "EfficientNet-B0": "torchvision:efficientnet_b0",
}


def photographs() -> Tensor:
    """Images [2, 3, 427, 640] in 0..1."""
    return torch.stack([torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]).float() / 255


def normalised(images: Tensor) -> Tensor:
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # of ImageNet, as these networks expect
    return (images - mean[:, None, None]) / std[:, None, None]


def batch_of_eight(images: Tensor, size: int = 224) -> Tensor:
    """The left and the right square of both photographs, and their mirror images: [8, 3, size, size]."""
    side = images.shape[2]
    squares = torch.cat([images[..., :side], images[..., -side:]])
    squares = F.interpolate(squares, (size, size), mode="bilinear", antialias=True)
    return normalised(torch.cat([squares, squares.flip(-1)]))


def build(spec: str, batch: Tensor) -> nn.Module:
    """The network with random weights and the batch norm statistics of `batch`, in eval mode."""
    torch.manual_seed(SEED)
    return zoo.settled(zoo.build(spec), batch)


@dataclass
class Swap:
    """What was measured of one network "before", "fused" and "fused in place"; `seconds` by batch size."""

    name: str
    replaced: int
    skipped: int
    magnitude: float
    differences: dict[str, float]
    seconds: dict[int, dict[str, float]]


def swap(name: str, spec: str, batch: Tensor, repeats: int) -> Swap:
    before = build(spec, batch)
    # inplace is allowed, because none of these networks reads the input of an SE layer again.
    report = se_fused.replace(copy.deepcopy(before))
    in_place = se_fused.replace(copy.deepcopy(before), inplace=True)
    models = {"before": before, "fused": report.model, "fused in place": in_place.model}
    with torch.inference_mode():
        wanted = before(batch)
        differences = {side: largest_difference(model(batch), wanted) for side, model in models.items()}
        seconds = {
            n: interleaved({side: partial(model, batch[:n]) for side, model in models.items()}, repeats)
            for n in (1, len(batch))
        }
    magnitude = float(wanted.abs().max())
    return Swap(name, len(report.replaced), len(report.skipped), magnitude, differences, seconds)


def swaps(repeats: int, console: Console, size: int = 224) -> list[Swap]:
    batch = batch_of_eight(photographs(), size)
    # Automatic refresh would run in a thread of its own, on the cores that are measured.
    progress = track(MODELS.items(), "swapping SE layers", console=console, auto_refresh=False)
    return [swap(name, spec, batch, repeats) for name, spec in progress]


def table(found: list[Swap]) -> Table:
    result = Table(
        title=f"Two photographs through networks with random weights, seed {SEED}",
        caption=f"median ms on {torch.get_num_threads()} threads; largest difference at batch 8",
    )
    for column in ("network", "SE layers"):
        result.add_column(column)
    for column in ("difference", *(f"batch {n}" for n in found[0].seconds)):
        result.add_column(column, justify="right")
    for s in found:
        left = (s.name, f"outputs up to {s.magnitude:.2f}", "")
        for text, side in zip(left, s.differences, strict=True):
            layers = s.replaced + s.skipped if side == "before" else s.replaced
            times = [f"{1e3 * times[side]:.1f}" for times in s.seconds.values()]
            result.add_row(text, f"{layers} {side}", "" if side == "before" else f"{s.differences[side]:.1e}", *times)
        result.add_section()
    return result
