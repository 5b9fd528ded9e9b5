"""The shapes that are measured; the tests import them, so every measured shape is also a tested one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from se_fused.cases import Case


@dataclass(frozen=True)
class Shape:
    """A map [N, C, H, W] and the R of its layer."""

    n: int
    c: int
    h: int
    w: int
    r: int

    def case(self, dtype: torch.dtype, layout: str) -> Case:
        return Case(self.n, self.c, self.r, (self.h, self.w), dtype, layout=layout)

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.h}x{self.w}"


# Each R is that of a network which has a layer with this C.
BATCH_1 = (
    Shape(1, 72, 28, 28, r=24),  # MobileNetV3-Large
    Shape(1, 96, 112, 112, r=4),  # EfficientNet-B0 at 448 pixels; 56x56 at 224
    Shape(1, 256, 56, 56, r=16),  # SE-ResNet-50, stage 1
    Shape(1, 672, 14, 14, r=168),  # MobileNetV3-Large
    Shape(1, 960, 7, 7, r=240),  # MobileNetV3-Large
    Shape(1, 2048, 7, 7, r=128),  # SE-ResNet-50, stage 4
)
BATCH_16 = (
    Shape(16, 96, 112, 112, r=4),
    Shape(16, 256, 56, 56, r=16),
    Shape(16, 512, 28, 28, r=32),  # SE-ResNet-50, stage 2
    Shape(16, 1024, 14, 14, r=64),  # SE-ResNet-50, stage 3
    Shape(16, 2048, 7, 7, r=128),
)
LAYER = BATCH_1 + BATCH_16
# The smallest map, a middling one, and a batch.
QUICK = (BATCH_1[0], BATCH_1[2], BATCH_16[3])
# There is nothing to compute, so the time is the cost of a call. R = 1 is C / 16.
CALL = Shape(1, 16, 1, 1, r=1)

# On a GPU: one sample for latency, and batches that the caches hold and that they do not hold.
_GPU_LAYERS = (
    (72, 28, 24), (672, 14, 168), (960, 7, 240),  # MobileNetV3-Large
    (32, 112, 8), (96, 56, 4), (1152, 7, 48),  # EfficientNet-B0
    (256, 56, 16), (512, 28, 32), (1024, 14, 64), (2048, 7, 128),  # SE-ResNet-50
    (3024, 7, 308),  # RegNetY-16GF, whose weights are larger than the map
    (64, 300, 16),  # a large image
)  # fmt: skip
GPU = tuple(
    Shape(n, c, side, side, r)
    for n in (1, 32, 256)
    for c, side, r in _GPU_LAYERS
    if n * c * side * side <= 2**29  # 1 GB in half precision; several sets of buffers have to fit
)
# (C, side, R) for a first look at a GPU: early to late stages of SE-ResNet-50, EfficientNet and MobileNetV3.
HEADLINE = ((256, 56, 16), (96, 112, 4), (512, 28, 32), (1024, 14, 64), (2048, 7, 128), (672, 14, 168))
