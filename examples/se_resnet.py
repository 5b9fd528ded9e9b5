"""SE-ResNet: SE on the residual branch, before the identity is added (Hu et al., figure 3).

`se` makes the SE layers: `se_fused.SqueezeExcite`, or `ReferenceSqueezeExcite`, which has the same parameters
and draws the same initial weights, so one seed gives two equal networks. `norm` makes the norm of C channels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from se_fused import SqueezeExcite, reference


class ReferenceSqueezeExcite(SqueezeExcite):
    """The layer in plain PyTorch: the mean, two matrix products, the activations and the scaling, one after another."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return reference.compute(x, self.w1, self.b1, self.w2, self.b2, residual, options=self.options)


class SEResidualBlock(nn.Module):
    """Maps [N, c_in, H, W] to [N, c_out, H / stride, W / stride]: relu(SE(branch(x)) + shortcut(x))."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        se: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
            norm(c_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            norm(c_out),
        )
        self.shortcut = nn.Identity()
        if c_in != c_out or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm(c_out))
        # The addition of the identity and the ReLU after it belong to the same fused call.
        self.se = se(c_out, post_act="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.branch(x), residual=self.shortcut(x))


class SEResNet(nn.Module):
    """Images [N, in_channels, H, W] to scores [N, classes]; one stage of `depth` blocks for each of `widths`."""

    def __init__(
        self,
        se: Callable[..., nn.Module] = SqueezeExcite,
        in_channels: int = 1,
        classes: int = 10,
        widths: tuple[int, ...] = (16, 32, 64),
        depth: int = 1,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        c = widths[0]
        self.stem = nn.Sequential(nn.Conv2d(in_channels, c, 3, padding=1, bias=False), norm(c), nn.ReLU(inplace=True))
        blocks = []
        for stage, width in enumerate(widths):
            for i in range(depth):
                blocks.append(SEResidualBlock(c, width, 2 if stage > 0 and i == 0 else 1, se, norm))
                c = width
        self.blocks = nn.Sequential(*blocks)
        self.classify = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.blocks(self.stem(x)).mean((2, 3)))
