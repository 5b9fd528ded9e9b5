"""How a call is divided into programs. The choice is made here only, and from the shapes alone.

There is no autotuning. So nothing is timed while a CUDA graph is captured, and the shape alone determines the order of
each sum. All limits here are predictions, for the reasons given with them; no GPU has yet compared them with others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

# Bytes of a map per thread of a program: four 16-byte loads in flight, with the 64 registers per thread that allow 1024
# threads per SM. Backward reads two or three maps.
_FORWARD_BYTES_PER_THREAD, _BACKWARD_BYTES_PER_THREAD = 64, 32
# Products with the weights per thread, in single precision.
_PRODUCTS_PER_THREAD = 16
_WARP = 32

# Most elements of a sample, and of the weights, with one program per sample. It bounds how many loads of tiles follow
# each other: 65536 elements are eight of the largest tiles of half-precision elements.
_ONE_PROGRAM_ELEMENTS = 65536
_MAX_WARPS = 8

# Programs of a launch that suffice: about four for each of the 132 SMs of an H200.
_PROGRAMS = 512
_MAX_SPLITS = 64

# Most samples per program, if the weights are larger than the maps. A program reads its part of the weights once.
_MAX_BLOCK_N = 8

# A tile of a weight gradient: samples, rows and columns, for a program of 4 warps.
WEIGHT_TILE = (8, 16, 16)


@dataclass(frozen=True)
class Plan:
    """The tiles and grids of a call.

    A tile of a map is [block_n, block_c, block_l], of the products of the first layer [block_n, block_r, block_k1], and
    of the second layer [block_n, block_c, block_k2]. With `one_launch`, one program does all steps for a sample.
    Otherwise `splits` programs of `steps` tiles each divide the positions of a tile's channels.
    """

    one_launch: bool
    warps: int
    block_n: int
    block_c: int
    block_l: int
    block_r: int
    block_k1: int
    block_k2: int
    splits: int
    steps: int
    alignment: int  # a divisor of the extent that is contiguous in memory


def _next_power_of_2(v: int) -> int:
    """Returns the smallest power of 2 that is at least v."""
    return 1 << max(v - 1, 0).bit_length()


def _block_l(length: int) -> int:
    """Returns the positions of a row in one tile. Long rows take the size with the least padding in the last tile."""
    if length <= 256:
        return _next_power_of_2(length)
    return min((1024, 512, 256), key=lambda size: -(-length // size) * size)


@lru_cache(maxsize=4096)
def plan(
    n: int, c: int, r: int, l: int,
    channels_last: bool, element_bytes: int, *, backward: bool, ordered: bool,
) -> Plan:  # fmt: skip
    """Plans a call with maps [n, c, l] ([n, l, c] if `channels_last`) and r hidden units (0 in the one-FC form).

    `ordered`: a barrier in a program orders its accesses to global memory. Only then can one program do all the steps.
    """
    depth = r or c
    weights = (1 if r == 0 else 2) * c * depth
    bytes_per_thread = _BACKWARD_BYTES_PER_THREAD if backward else _FORWARD_BYTES_PER_THREAD
    one_launch = ordered and c * l <= _ONE_PROGRAM_ELEMENTS and weights <= _ONE_PROGRAM_ELEMENTS
    warps = 4
    if one_launch:
        warps = min(max(_next_power_of_2(c * l * element_bytes) // (bytes_per_thread * _WARP), 1), _MAX_WARPS)
    elements = warps * _WARP * bytes_per_thread // element_bytes
    products = warps * _WARP * _PRODUCTS_PER_THREAD * 4 // max(element_bytes, 4)

    # channels_last: a 128-byte line of channels per position. Contiguous: positions of as many rows as fit the tile.
    block_c = min(_next_power_of_2(c), 128 // element_bytes) if channels_last else 0
    block_l = min(_next_power_of_2(l), elements // block_c) if channels_last else _block_l(l)
    rows = block_c or min(_next_power_of_2(c), max(elements // block_l, 1))
    block_n = 1
    if not one_launch and depth > 2 * l:
        while block_n < _MAX_BLOCK_N and 2 * block_n <= n and n // (2 * block_n) * -(-c // rows) >= _PROGRAMS:
            block_n *= 2
    if channels_last:
        block_l = max(min(block_l, elements // (block_c * block_n)), 1)
    else:
        block_c = max(rows // block_n, 1)

    tiles = -(-l // block_l)
    programs = -(-n // block_n) * -(-c // block_c)
    steps = -(-tiles // min(max(_PROGRAMS // programs, 1), _MAX_SPLITS, tiles))
    block_r = min(_next_power_of_2(max(r, 1)), 16)
    return Plan(
        one_launch=one_launch,
        warps=warps,
        block_n=block_n,
        block_c=block_c,
        block_l=block_l,
        block_r=block_r,
        block_k1=min(_next_power_of_2(c), max(products // (block_n * block_r), 1)),
        block_k2=min(_next_power_of_2(depth), max(products // (block_n * block_c), 1), 256),
        splits=1 if one_launch else -(-tiles // steps),
        steps=steps,
        alignment=_alignment(c if channels_last else l),
    )


def _alignment(extent: int) -> int:
    return min(extent & -extent, 16)
