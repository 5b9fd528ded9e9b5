"""The CPU kernels (csrc/cpu/), and the fast path to them, around PyTorch's dispatcher."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import profiler
from torch.utils._device import DeviceContext

from .. import native
from ..arguments import is_locked_inference_tensor, needs_grad
from ..memory import PLAIN_TYPES
from ..observers import observed, under_transform
from . import forcing
from .backend import Compiled

_log = logging.getLogger("se_fused")


class Cpu(Compiled):
    name = "cpu"

    def __init__(self) -> None:
        # The functions of csrc/fast_path.h once they are connected to the kernels, before that None. For callers that
        # know that the call is an inference that nothing watches.
        self.unchecked: Any = None

    def load(self) -> None:
        self.unchecked = None
        try:
            path = native.load("cpu", _load_operators)
        except Exception as error:  # an installation may break in any way: the import goes on, and `info` explains
            self._unusable = str(error) or type(error).__name__
            return
        self._unusable = None
        try:
            self._connect(path)
        except Exception as error:  # as above
            _log.warning("se_fused: each call on the CPU takes some microseconds more: %s", error)

    def _connect(self, path: Path) -> None:
        """Connect the fast path to the kernels in the library `path`."""
        library = ctypes.CDLL(str(path))
        kernels = library.se_fused_cpu_forward, library.se_fused_cpu_batch_norm
        addresses = [ctypes.cast(kernel, ctypes.c_void_p).value for kernel in kernels]
        extension = native.load_extension()
        if extension.connect(*addresses, PLAIN_TYPES, torch.empty_like):
            self.unchecked = extension

    def has_fast_path(self) -> bool:
        return self.unchecked is not None

    def fast_path(
        self, x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
        scale: Tensor | None, shift: Tensor | None, inplace: bool, out: Tensor | None, *options: Any,
    ) -> Tensor | None:  # fmt: skip
        """Run inference on dense CPU tensors without Python checks and dispatcher, and return y.

        Returns None if the call must take the dispatcher, which reports errors and converts inputs; also while a call
        is traced, transformed or observed, or another backend is forced.

        A call that computes nothing takes a quarter of the time that it takes with checks and dispatcher, and that is
        longer than the work on many small maps (benchmarks/results/call_overhead.csv, "bare" and "strided").

        options: as numbers.
        """
        if self.unchecked is None or type(x) is not Tensor or type(inplace) is not bool:
            return None
        try:
            if torch.is_grad_enabled() and needs_grad(x, w1, b1, w2, b2, residual, scale, shift, out):
                return None
        except AttributeError:
            return None  # not a tensor
        if not x.is_cpu or observed() or profiler._is_profiler_enabled or under_transform():
            return None
        if not forcing.idle and not forcing.current().allows(self):
            return None
        if inplace:
            if out is not None:
                return None
            out = x
        if out is not None and (not isinstance(out, Tensor) or is_locked_inference_tensor(out)):
            return None
        y: Tensor | None = self.unchecked.forward(x, w1, b1, w2, b2, residual, out, *options, scale, shift, None, None)
        if out is not None and y is not None:
            torch.autograd.graph.increment_version(out)
        return y

    def fast_path_under_mode(self, *args: Any) -> Tensor | None:
        """`fast_path` under a mode that sees every PyTorch function: only the mode of `torch.set_default_device`.

        It affects only the creation of tensors, but PyTorch would call it for each attribute of a tensor.
        """
        if _C._len_torch_function_stack() > 1 or type(_C._get_function_stack_at(0)) is not DeviceContext:
            return None
        with _C.DisableTorchFunction():
            return self.fast_path(*args)


def _load_operators(path: Path) -> Path:
    torch.ops.load_library(path)
    return path
