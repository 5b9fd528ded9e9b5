"""The memory of tensors: its order, and which tensors overlap, so that a call in place overwrites no other argument."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Every other subclass may redefine operators, or have no memory of its own.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def has_addresses() -> bool:
    """Whether tensors have real addresses. They have none under a compiler or a transform of torch.func."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def is_freed(t: Tensor) -> bool:
    """Whether the storage of `t` was freed while `t` still refers to it, as by `untyped_storage().resize_(0)`."""
    # The address of a view is then null plus its offset, not null.
    if t.data_ptr() != 0 and (t.storage_offset() == 0 or t.untyped_storage().nbytes() != 0):
        return False
    return t.numel() > 0 and _has_memory(t)


def _has_memory(t: Tensor) -> bool:
    return type(t) in PLAIN_TYPES and not t.is_meta and not t._is_zerotensor()


def _span_bytes(t: Tensor) -> int:
    """The bytes from the start of the first element to the end of the last."""
    return t.element_size() * (1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)))


def _occupied_bytes(t: Tensor, begin: int, size: int) -> Tensor:
    """A mask of `size` bytes from the address `begin`: whether an element of `t` occupies each."""
    occupied = torch.zeros(size, dtype=torch.bool, device="cpu")
    width = t.element_size()
    steps = [step * width for step in t.stride()]
    occupied.as_strided((*t.shape, width), (*steps, 1), t.data_ptr() - begin).fill_(True)
    return occupied


def is_channels_last(t: Tensor) -> bool:
    """Whether `t` is dense in the order [N, *spatial, C], and not in the order [N, C, *spatial] as well."""
    return not t.is_contiguous() and t.movedim(1, -1).is_contiguous()


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements of `t` share a byte."""
    if not _has_memory(t):
        return False
    # Where each stride exceeds the span of all smaller ones, no two elements meet; else their bytes are counted.
    reach = 0
    for step, size in sorted((step, size) for step, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if step <= reach:
            return int(_occupied_bytes(t, t.data_ptr(), _span_bytes(t)).sum()) < t.numel() * t.element_size()
        reach += (size - 1) * step
    return False


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether an element of `a` and an element of `b` share a byte."""
    if a.numel() == 0 or b.numel() == 0 or not (_has_memory(a) and _has_memory(b)):
        return False
    begin, end = min(a.data_ptr(), b.data_ptr()), max(t.data_ptr() + _span_bytes(t) for t in (a, b))
    if end - begin >= _span_bytes(a) + _span_bytes(b):
        return False
    if all(t.is_contiguous() for t in (a, b)):
        return True
    try:
        return _meet(_Places.of(a), _Places.of(b), b.data_ptr() - a.data_ptr(), [_MOST_STEPS])
    except _TooManySteps:
        return bool((_occupied_bytes(a, begin, end - begin) & _occupied_bytes(b, begin, end - begin)).any())


# Strides that are usual need less than ten; after so many the bytes are counted.
_MOST_STEPS = 1000


class _TooManySteps(Exception):
    pass


class _Places(NamedTuple):
    """Where elements of `width` bytes lie: steps in bytes, the largest first, and to how many places each leads."""

    width: int
    steps: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, t: Tensor) -> _Places:
        width = t.element_size()
        steps = [(step * width, size) for step, size in zip(t.stride(), t.shape, strict=True) if size > 1 and step > 0]
        return cls(width, tuple(sorted(steps, reverse=True)))

    @property
    def largest(self) -> int:
        return self.steps[0][0] if self.steps else 0

    @property
    def span(self) -> int:
        return self.width + sum((size - 1) * step for step, size in self.steps)

    def split(self, step: int) -> tuple[int, _Places]:
        """How many places `step` leads to, and those within one of them."""
        return (self.steps[0][1], _Places(self.width, self.steps[1:])) if self.largest == step else (1, self)


def _meet(a: _Places, b: _Places, offset: int, left: list[int]) -> bool:
    """Whether a place of `a` and one of `b`, which begins `offset` bytes after `a`, share a byte.

    The parts to which the largest step leads are compared, of these only the ones whose spans meet.
    """
    left[0] -= 1
    if left[0] < 0:
        raise _TooManySteps
    if offset >= a.span or -offset >= b.span:
        return False
    step = max(a.largest, b.largest)
    if step == 0:
        return True
    (parts_a, a), (parts_b, b) = a.split(step), b.split(step)
    # Part j of b begins offset + (j - i) * step after part i of a.
    first = max(1 - parts_a, -((b.span - 1 + offset) // step))
    last = min(parts_b - 1, (a.span - 1 - offset) // step)
    return any(_meet(a, b, offset + k * step, left) for k in range(first, last + 1))


def same_elements(a: Tensor, b: Tensor) -> bool:
    """Whether `a` and `b`, of the same shape and dtype, have each element at the same address."""
    if not (_has_memory(a) and _has_memory(b)):
        return False
    return a.data_ptr() == b.data_ptr() and all(
        size == 1 or of_a == of_b for size, of_a, of_b in zip(a.shape, a.stride(), b.stride(), strict=True)
    )
