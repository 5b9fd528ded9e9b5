"""How to compute a 1x1 convolution, with the gates of an SE layer before it and a batch norm after it.

Weights are computed anew in each call, so that a change of them is never missed. The thresholds were measured on two
cores with AVX-512 at the shapes of MobileNet, EfficientNet and SE-ResNet, in experiments that were not recorded.
"""

from __future__ import annotations

from torch import Tensor

# "convolution": of the map, which the gates have scaled in place. "product": W u, one matrix product per sample, of
# the same map. "folded": (W diag(s)) u, with the gates in the weights of each sample.
WAYS = ("convolution", "product", "folded")

# Multiplications up to which a product of one sample takes less time than the convolution, which copies the map to a
# layout of its own: the ratio of the two times is 0.4 to 0.98 up to 12 million, and 0.94 to 1.2 from 15 million on.
_MULTIPLICATIONS = 12_000_000
# Cin * Cout / L up to which products of several samples do so: the ratio, with the gates folded, is 0.57 to 0.87 up to
# 6.1, 0.96 to 1.0 at 12, and 1.3 or more from 200 on.
_WEIGHTS_PER_POSITION = 7


def way_of(u: Tensor, weight: Tensor) -> str:
    """The fastest way to convolve u [N, Cin, *spatial] with weight [Cout, Cin, ...]."""
    n, cin = u.shape[:2]
    # A convolution of channels_last maps, or with such a weight, copies none: the product takes 0.8 to 2.2 times as
    # long. torch's products of half-precision numbers are slower than its convolutions.
    if u.dtype.itemsize == 2 or not u.is_contiguous() or weight.stride(-1) != 1:
        return "convolution"
    if n == 1:
        return "product" if u.numel() * weight.shape[0] <= _MULTIPLICATIONS else "convolution"
    return "folded" if n * cin * weight.numel() <= _WEIGHTS_PER_POSITION * u.numel() else "convolution"


def folds_norm(u: Tensor, weight: Tensor) -> bool:
    """Whether the batch norm that reads the result of this convolution of u goes into its weight: whether that has
    fewer elements than the result."""
    # Half-precision weights times a scale could underflow.
    return u.dtype.itemsize > 2 and weight.shape[1] ** 2 <= u.numel()
