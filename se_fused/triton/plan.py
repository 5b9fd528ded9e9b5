"""How a call is cut into programs: the one place that chooses, from the shapes alone.

Nothing is tuned by trial runs, so nothing is timed during a CUDA graph's capture, and the order of every sum follows
from the shape. All the limits here are predicted, from the notes beside them; no GPU has measured others beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

# Bytes of a map for each thread of a program: four loads of 16 bytes on their way, in the 64 registers that let 1024
# threads share a multiprocessor. Backward reads two or three maps.
_FORWARD_BYTES, _BACKWARD_BYTES = 64, 32
# Products with the weights for each thread, in single precision.
_PRODUCTS = 16
_WARP = 32

# One program serves a sample while it needs at most so many trips to memory one after the other: 65536 elements are
# eight of its largest tiles of half-precision elements.
_ONE_PROGRAM_ELEMENTS = 65536
_MOST_WARPS = 8

# Programs enough for some four on each of an H200's 132 multiprocessors.
_PROGRAMS = 512
_MOST_SPLITS = 64

# Samples for which a program reads its part of the weights once, where these outweigh the maps.
_MOST_SAMPLES = 8

# Samples, rows and columns of a weight's gradient for a program of 4 warps.
WEIGHT_TILE = (8, 16, 16)


@dataclass(frozen=True)
class Plan:
    """Tiles of the maps are [block_n, block_c, block_l]; those of the first layer [block_n, block_r, block_k], of the
    second [block_n, block_c, block_h]. `one_launch`: a program does all the steps for one sample. Otherwise the
    positions of each tile's channels are divided among `splits` programs of `steps` tiles each."""

    one_launch: bool
    warps: int
    block_n: int
    block_c: int
    block_l: int
    block_r: int
    block_k: int
    block_h: int
    splits: int
    steps: int
    align: int  # divides the extent that is contiguous in memory


def _power(v: int) -> int:
    """The least power of 2 that is not below v."""
    return 1 << max(v - 1, 0).bit_length()


def _positions(length: int) -> int:
    """Positions of a row in one tile: of the three, what leaves the fewest places of the last tile empty."""
    if length <= 256:
        return _power(length)
    return min((1024, 512, 256), key=lambda size: -(-length // size) * size)


@lru_cache(maxsize=4096)
def plan(
    n: int, c: int, r: int, l: int,
    channels_last: bool, element_bytes: int, *, backward: bool, ordered: bool,
) -> Plan:  # fmt: skip
    """For maps [n, c, l] ([n, l, c] if `channels_last`) and r hidden units, 0 in the one-FC form.

    `ordered`: a barrier in a program orders its accesses to global memory, without which it cannot do all the steps.
    """
    depth = r or c
    weights = (1 if r == 0 else 2) * c * depth
    bytes_per_thread = _BACKWARD_BYTES if backward else _FORWARD_BYTES
    one_launch = ordered and c * l <= _ONE_PROGRAM_ELEMENTS and weights <= _ONE_PROGRAM_ELEMENTS
    warps = 4
    if one_launch:
        warps = min(max(_power(c * l * element_bytes) // (bytes_per_thread * _WARP), 1), _MOST_WARPS)
    elements = warps * _WARP * bytes_per_thread // element_bytes
    products = warps * _WARP * _PRODUCTS * 4 // max(element_bytes, 4)

    # A whole 128-byte line of channels for each position, or positions of as many rows as fit.
    block_c = min(_power(c), 128 // element_bytes) if channels_last else 0
    block_l = min(_power(l), elements // block_c) if channels_last else _positions(l)
    rows = block_c or min(_power(c), max(elements // block_l, 1))
    block_n = 1
    if not one_launch and depth > 2 * l:
        while block_n < _MOST_SAMPLES and 2 * block_n <= n and n // (2 * block_n) * -(-c // rows) >= _PROGRAMS:
            block_n *= 2
    if channels_last:
        block_l = max(min(block_l, elements // (block_c * block_n)), 1)
    else:
        block_c = max(rows // block_n, 1)

    tiles = -(-l // block_l)
    programs = -(-n // block_n) * -(-c // block_c)
    steps = -(-tiles // min(max(_PROGRAMS // programs, 1), _MOST_SPLITS, tiles))
    block_r = min(_power(max(r, 1)), 16)
    return Plan(
        one_launch=one_launch,
        warps=warps,
        block_n=block_n,
        block_c=block_c,
        block_l=block_l,
        block_r=block_r,
        block_k=min(_power(c), max(products // (block_n * block_r), 1)),
        block_h=min(_power(depth), max(products // (block_n * block_c), 1), 256),
        splits=1 if one_launch else -(-tiles // steps),
        steps=steps,
        align=_alignment(c if channels_last else l),
    )


def _alignment(extent: int) -> int:
    return min(extent & -extent, 16)
