"""SE-Inception: SE after the whole Inception block (Hu et al., figure 2).

`se` makes the SE layers, as in `examples/se_resnet.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from se_fused import SqueezeExcite


def _conv_norm(c_in: int, c_out: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=False), nn.BatchNorm2d(c_out))


class SEInceptionBlock(nn.Module):
    """Maps [N, c_in, H, W] to [N, 4 * width, H, W]: a 1x1, a 3x3, a 5x5 and a pooling branch, side by side, then SE."""

    def __init__(self, c_in: int, width: int, se: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                _conv_norm(c_in, width, 1),
                nn.Sequential(_conv_norm(c_in, width, 1), nn.ReLU(inplace=True), _conv_norm(width, width, 3)),
                nn.Sequential(_conv_norm(c_in, width, 1), nn.ReLU(inplace=True), _conv_norm(width, width, 5)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv_norm(c_in, width, 1)),
            ]
        )
        # Each branch ends in a ReLU. One ReLU after the concatenation does the same, as part of the fused call.
        self.se = se(4 * width, pre_act="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.se(torch.cat([branch(x) for branch in self.branches], dim=1))


class SEInception(nn.Module):
    """Images [N, in_channels, H, W] to scores [N, classes]; maps are halved between blocks."""

    def __init__(
        self,
        se: Callable[..., nn.Module] = SqueezeExcite,
        in_channels: int = 1,
        classes: int = 10,
        widths: tuple[int, ...] = (8, 16),
    ) -> None:
        super().__init__()
        c = 4 * widths[0]
        blocks: list[nn.Module] = [_conv_norm(in_channels, c, 3), nn.ReLU(inplace=True)]
        for stage, width in enumerate(widths):
            if stage > 0:
                blocks.append(nn.MaxPool2d(2))
            blocks.append(SEInceptionBlock(c, width, se))
            c = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.classify = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.blocks(x).mean((2, 3)))
