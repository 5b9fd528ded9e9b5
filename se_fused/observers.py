"""Whether a compiler, tracer, transform or mode observes a call, and so must see its operators."""

from __future__ import annotations

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .memory import PLAIN_TYPES


def recorded() -> bool:
    """Whether a compiler or a tracer records the call into a program."""
    return is_compiling() or _C._get_tracing_state() is not None


def observed() -> bool:
    """Whether a compiler, a tracer or a dispatch mode must see the operators."""
    return is_compiling() or _C._len_torch_dispatch_stack() > 0 or _C._get_tracing_state() is not None


def unobserved(*tensors: Tensor | None) -> bool:
    """Whether only autograd must see the operators: there is no observer and no tensor subclass."""
    for t in tensors:
        if t is not None and type(t) not in PLAIN_TYPES:
            return False
    return not observed()


def under_transform() -> bool:
    """Whether forward-mode AD or a torch.func transform is active: custom operators give zero tangents there."""
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def decomposes(device: torch.device, is_forced: bool) -> bool:
    """Whether a recorded call becomes plain PyTorch in the program, instead of one operator.

    TorchScript and ONNX do not know the operators. Inductor fuses the formula with the operators around it, which was
    faster wherever it was measured: on CPUs (benchmarks/results/compiled.csv) and on an H200
    (benchmarks/results/h200/, in a graph). On other devices, and if a backend `is_forced`, the operator stays.
    """
    if _C._get_tracing_state() is not None:
        return True
    measured = device.type == "cpu" or (device.type == "cuda" and torch.version.hip is None)
    return (measured and not is_forced) or torch.onnx.is_in_onnx_export()
