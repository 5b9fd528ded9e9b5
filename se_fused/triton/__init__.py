"""The operation in Triton, for AMD GPUs and for NVIDIA GPUs without the compiled CUDA library.

    plan.py          how a call is divided into programs
    tiles.py         offsets of tiles, products with the weights, maxima
    activations.py   the activations and their derivatives
    forward.py       squeeze, hidden and scale, or all three in one launch
    backward.py      reduce, hidden and apply, or all three in one launch
    weights.py       the gradients of the weights
    batch_norm.py    batch norms, for `replace(model, level="block")`
    launch.py        the operators of se_fused/ops.py that fill memory

Importing this package imports triton, which is slow and may fail. `se_fused.backends` imports it when a call needs it.
"""

from .launch import backward_out, batch_norm_out, forward_out, scale_shift_out

__all__ = ["backward_out", "batch_norm_out", "forward_out", "scale_shift_out"]
