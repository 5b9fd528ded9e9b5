"""Where tensors lie: their order, and what a call in place may overwrite."""

from __future__ import annotations

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)  # no subclass that computes otherwise, or has no memory of its own


def has_addresses() -> bool:
    """Whether tensors lie where they say: not while a compiler or a transform of torch.func looks at them."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def is_freed(t: Tensor) -> bool:
    """Whether the storage of `t` was freed under it, as by `untyped_storage().resize_(0)`."""
    # A view keeps an address: that of nothing, plus its offset.
    if t.data_ptr() != 0 and (t.storage_offset() == 0 or t.untyped_storage().nbytes() != 0):
        return False
    return t.numel() > 0 and _in_memory(t)


def _in_memory(t: Tensor) -> bool:
    return type(t) in PLAIN and not t.is_meta and not t._is_zerotensor()


def _bytes(t: Tensor) -> int:
    """From the first element to the end of the last."""
    return t.element_size() * (1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)))


def _touched(t: Tensor, begin: int, size: int) -> Tensor:
    """Of each byte from the address `begin`, whether an element of `t` lies there."""
    touched = torch.zeros(size, dtype=torch.bool, device="cpu")
    width = t.element_size()
    steps = [step * width for step in t.stride()]
    touched.as_strided((*t.shape, width), (*steps, 1), t.data_ptr() - begin).fill_(True)
    return touched


def is_channels_last(t: Tensor) -> bool:
    """Whether `t` lies in the order [N, *spatial, C] and in no other."""
    return not t.is_contiguous() and t.movedim(1, -1).is_contiguous()


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements of `t` lie at one place."""
    if not _in_memory(t):
        return False
    reach = 0
    for step, size in sorted((step, size) for step, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if step <= reach:
            return int(_touched(t, t.data_ptr(), _bytes(t)).sum()) < t.numel() * t.element_size()
        reach += (size - 1) * step
    return False


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether an element of `a` and one of `b` share memory."""
    if a.numel() == 0 or b.numel() == 0 or not (_in_memory(a) and _in_memory(b)):
        return False
    begin, end = min(a.data_ptr(), b.data_ptr()), max(t.data_ptr() + _bytes(t) for t in (a, b))
    if end - begin >= _bytes(a) + _bytes(b):
        return False
    if all(t.is_contiguous() for t in (a, b)):
        return True
    return bool((_touched(a, begin, end - begin) & _touched(b, begin, end - begin)).any())


def same(a: Tensor, b: Tensor) -> bool:
    """Whether each element of `a` is the one of `b` at its place; they have one shape and dtype."""
    return a.data_ptr() == b.data_ptr() and all(
        size == 1 or of_a == of_b for size, of_a, of_b in zip(a.shape, a.stride(), b.stride(), strict=True)
    )
