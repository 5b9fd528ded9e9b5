"""The operation in Triton, for GPUs without the compiled CUDA part: NVIDIA's and AMD's.

    plan.py         how a call is cut into programs
    forward.py      squeeze, hidden, scale; or all three in one launch
    backward.py     reduce, hidden, apply; or all three in one launch
    weights.py      the gradients of the weights
    launch.py       forward_out and backward_out, with the arguments of the operators in se_fused/ops.py

Importing this imports triton, which is slow and may fail; `se_fused.backends` does it when a call needs it.
"""

from .launch import backward_out, forward_out

__all__ = ["backward_out", "forward_out"]
