"""Triton's interpreter, which runs kernels on CPU tensors, made to convert as a GPU does.

It rounds float32 towards zero when converting to bfloat16; a GPU, like PyTorch, rounds to nearest.
"""

import os

import numpy as np
import torch


def enable() -> None:
    """To be called before anything imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_nearest(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(np.array(values)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = to_nearest
