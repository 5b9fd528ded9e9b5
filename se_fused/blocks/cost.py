"""How to compute a 1x1 convolution, with the gates of an SE layer before it and a batch norm after it.

Weights are computed anew in each call, so that a change of them is never missed. The thresholds come from the times in
benchmarks/results/convolutions.csv, on two cores with AVX-512.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# "convolution": of the map, which the gates have scaled in place. "product": W u, one matrix product per sample, of
# the same map. "folded": (W diag(s)) u, with the gates in the weights of each sample.
WAYS = ("convolution", "product", "folded")

# Multiplications up to which a product of one sample takes less time than the convolution, which copies the map to a
# layout of its own: 0.4 to 1.1 of its time up to here, 0.8 for the median; 0.8 to 1.3 above.
_MULTIPLICATIONS = 20_000_000
# Cin * Cout / L up to which products of several samples do so: 0.4 to 1.0 of its time up to here, 0.7 for the median;
# 1.0 or more for the median from 50 on.
_WEIGHTS_PER_POSITION = 20
_BY_MULTIPLICATIONS = f"{{:.1f}} million multiplications; products up to {_MULTIPLICATIONS // 10**6}"
_BY_WEIGHTS = f"Cin Cout / L is {{:.1f}}; folded up to {_WEIGHTS_PER_POSITION}"


class Decision(NamedTuple):
    """way: one of WAYS. reason: a format for `measure`, the number that is compared with a threshold."""

    way: str
    reason: str
    measure: float = 0

    def text(self, u: Tensor, weight: Tensor) -> str:
        shape = "x".join(map(str, u.shape))
        return f"{self.way} of {shape} to {len(weight)} channels: {self.reason.format(self.measure)}"


def decide(u: Tensor, weight: Tensor, on_gpu: bool = False) -> Decision:
    """The fastest way to convolve u [N, Cin, *spatial] with weight [Cout, Cin, ...], and why."""
    n, cin = u.shape[:2]
    # On a GPU one kernel applies the batch norm, the activation and the gates and writes u * s once, as it would have
    # to write u. Products with gates in the weights of each sample would only add launches.
    if on_gpu:
        return Decision("convolution", "on a GPU")
    # torch's products of half-precision numbers are slower than its convolutions.
    if u.dtype.itemsize == 2:
        return Decision("convolution", "half precision")
    # A convolution of channels_last maps, or with such a weight, copies no map, so a product has nothing to save.
    if not u.is_contiguous() or weight.stride(-1) != 1:
        return Decision("convolution", "channels_last")
    if n == 1:
        count = u.numel() * weight.shape[0]
        way = "product" if count <= _MULTIPLICATIONS else "convolution"
        return Decision(way, _BY_MULTIPLICATIONS, count / 1e6)
    per_position = n * cin * weight.numel() / u.numel()
    way = "folded" if per_position <= _WEIGHTS_PER_POSITION else "convolution"
    return Decision(way, _BY_WEIGHTS, per_position)


def folds_norm(u: Tensor, weight: Tensor) -> bool:
    """Whether the batch norm that reads the result of this convolution of u goes into its weight: whether that has
    fewer elements than the result."""
    # Half-precision weights times a scale could underflow.
    return u.dtype.itemsize > 2 and weight.shape[1] ** 2 <= u.numel()
