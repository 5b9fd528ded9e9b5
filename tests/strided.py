"""Tensors that lie in one memory of 64 numbers: where, and which numbers are theirs."""

import torch
from hypothesis import assume
from hypothesis import strategies as st

MEMORY = 64


@st.composite
def views(draw, shapes):
    """Shape, strides and offset of a map [2, 3, 2, 2]; the name of one of `shapes`; and the same of a tensor of it."""

    def view(shape):
        steps = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 24]), min_size=len(shape), max_size=len(shape)))
        room = MEMORY - 1 - sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        assume(room >= 0)
        return shape, steps, draw(st.integers(0, room))

    name = draw(st.sampled_from(list(shapes)))
    return view((2, 3, 2, 2)), name, view(shapes[name])


def places(shape, steps, offset):
    """The indices of the elements, in their order."""
    grid = torch.full(shape, offset)
    for axis, (size, step) in enumerate(zip(shape, steps, strict=True)):
        grid += (torch.arange(size) * step).view(-1, *(1,) * (len(shape) - axis - 1))
    return grid.flatten().tolist()
