"""The Triton kernels (se_fused/triton/). The first call that needs them imports them."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from . import forcing
from .backend import Backend


class Triton(Backend):
    name = "triton"
    has_batch_norm = True

    def __init__(self) -> None:
        self._kernels: Any = None  # the module se_fused.triton
        self._broken: str | None = None

    def why_not(self, device: torch.device) -> str | None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type == "cpu":
            if not interpreted:
                return "it runs on CUDA and ROCm tensors, and on CPU tensors only under TRITON_INTERPRET=1"
            if forcing.current().backend is not self:
                return "it interprets its kernels on CPU tensors, slowly, and only where it is asked for"
        elif device.type != "cuda":
            return f"it runs on CUDA and ROCm tensors; x is on {device}"
        elif interpreted:
            return "TRITON_INTERPRET=1 is set, which is for CPU tensors"
        elif not torch.cuda.is_available():
            return "there is no GPU"
        elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 5):
            return f"it needs compute capability 7.5; {device} has {torch.cuda.get_device_capability(device)}"
        return self._import()

    def _import(self) -> str | None:
        if self._kernels is None and self._broken is None:
            try:
                self._kernels = importlib.import_module("se_fused.triton")
            except Exception as error:  # an installation may break in any way; the reference can still run the call
                self._broken = f"triton cannot be imported: {error}"
        return self._broken

    # torch.compile calls this function and takes the result as a constant (cuda.py says more).
    _import._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def forward_out(self, *args: Any) -> None:
        self._kernels.forward_out(*map(_resolved, args))

    def backward_out(self, *args: Any) -> None:
        self._kernels.backward_out(*map(_resolved, args))

    def batch_norm_out(self, *args: Any) -> None:
        self._kernels.batch_norm_out(*map(_resolved, args))

    def scale_shift_out(self, *args: Any) -> None:
        self._kernels.scale_shift_out(*map(_resolved, args))


def _resolved(argument: Any) -> Any:
    """`argument`, materialised if it is a lazily negated tensor. For the compiled backends the dispatcher does this."""
    return argument.resolve_neg() if isinstance(argument, Tensor) else argument
