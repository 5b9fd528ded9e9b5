"""How to compute a 1x1 convolution, with the gates of an SE layer before it and a batch norm after it.

Weights are computed anew in each call, so that a change of them is never missed. The thresholds lie between sizes that
were timed on two cores with AVX-512: alone in benchmarks/results/convolutions.csv, in networks without a record.
"""

from __future__ import annotations

from torch import Tensor

# "convolution": of the map, which the gates have scaled in place. "product": W u, one matrix product per sample, of
# the same map. "folded": (W diag(s)) u, with the gates in the weights of each sample.
WAYS = ("convolution", "product", "folded")

# Multiplications up to which a product of one sample takes less time than the convolution, which copies the map to a
# layout of its own. With this threshold five networks take 0.96 to 1.01 of the time that they take with 12 million;
# with 31 million 0.95 to 1.04, with 52 million 0.96 to 1.09.
_MULTIPLICATIONS = 20_000_000
# Cin * Cout / L up to which products of several samples do so.
_WEIGHTS_PER_POSITION = 20


def way_of(u: Tensor, weight: Tensor, on_gpu: bool = False) -> str:
    """The fastest way to convolve u [N, Cin, *spatial] with weight [Cout, Cin, ...]."""
    return _decide(u, weight, on_gpu)[0]


def explain(u: Tensor, weight: Tensor, on_gpu: bool = False) -> str:
    """`way_of`, and why."""
    way, reason, number = _decide(u, weight, on_gpu)
    shape = "x".join(map(str, u.shape))
    return f"{way} of {shape} to {len(weight)} channels: {reason.format(number)}"


def _decide(u: Tensor, weight: Tensor, on_gpu: bool) -> tuple[str, str, float]:
    """The way, and the reason as a format for a number."""
    n, cin = u.shape[:2]
    # On a GPU one kernel applies the batch norm, the activation and the gates and writes u * s once, as it would have
    # to write u. Products with gates in the weights of each sample would only add launches.
    if on_gpu:
        return "convolution", "on a GPU", 0
    # torch's products of half-precision numbers are slower than its convolutions.
    if u.dtype.itemsize == 2:
        return "convolution", "half precision", 0
    # A convolution of channels_last maps, or with such a weight, copies none: the product takes 0.8 to 2.2 times as
    # long.
    if not u.is_contiguous() or weight.stride(-1) != 1:
        return "convolution", "channels_last", 0
    if n == 1:
        count = u.numel() * weight.shape[0]
        way = "product" if count <= _MULTIPLICATIONS else "convolution"
        return way, f"{{:.1f}} million multiplications; products up to {_MULTIPLICATIONS // 10**6}", count / 1e6
    per_position = n * cin * weight.numel() / u.numel()
    way = "folded" if per_position <= _WEIGHTS_PER_POSITION else "convolution"
    return way, f"Cin Cout / L is {{:.1f}}; folded up to {_WEIGHTS_PER_POSITION}", per_position


def folds_norm(u: Tensor, weight: Tensor) -> bool:
    """Whether the batch norm that reads the result of this convolution of u goes into its weight: whether that has
    fewer elements than the result."""
    # Half-precision weights times a scale could underflow.
    return u.dtype.itemsize > 2 and weight.shape[1] ** 2 <= u.numel()
