"""Which folds into the weights of a 1x1 convolution pay: they write weights in place of maps.

The weights are computed anew in each call, so that a change of them is never missed.
"""

from __future__ import annotations

from torch import Tensor

# Cin * Cout / L up to which a matrix product per sample, with the gates in its weights, takes less time than to scale
# the map in place and convolve it. On two cores with AVX-512, with 2 to 64 samples, the ratio of the two times is 0.3
# to 1.0 up to 4, 0.4 to 1.15 from 7 to 12, and beyond 20 mostly 1.2 to 2 (an experiment that was not recorded).
_WEIGHTS_PER_POSITION = 6


def folds_gate(u: Tensor, weight: Tensor) -> bool:
    """Whether the gates of the map u [N, Cin, *spatial] go into the weight [Cout, Cin, ...] of the 1x1 convolution that
    reads it."""
    n, cin = u.shape[:2]
    # torch's batched products of half-precision numbers are slower than its convolutions.
    return n > 1 and u.dtype.itemsize > 2 and n * cin * weight.numel() <= _WEIGHTS_PER_POSITION * u.numel()


def folds_norm(u: Tensor, weight: Tensor) -> bool:
    """Whether the batch norm that reads the result of this convolution of u goes into its weight: whether that has
    fewer elements than the result."""
    # Half-precision weights times a scale could underflow.
    return u.dtype.itemsize > 2 and weight.shape[1] ** 2 <= u.numel()
