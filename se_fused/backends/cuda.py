"""The CUDA kernels (csrc/cuda/). A plan says which of them a call launches, and how (csrc/plan.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..memory import is_channels_last
from ..options import Options
from . import forcing
from .backend import Compiled


class Cuda(Compiled):
    """library: the compiled library, for its functions that are not operators; None until it is loaded."""

    name = "cuda"
    has_batch_norm = True

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self._unusable = "there is no NVIDIA GPU"
        self._gpus: dict[int, list[int] | str] = {}  # by device index: the GPU's limits, or why it cannot be used
        if library is not None:
            self._use(library)

    def load(self) -> None:
        # device_count uses NVML where it is there, which leaves CUDA uninitialised. The first call on a GPU asks for
        # its limits.
        if torch.version.cuda is None or torch.cuda.device_count() == 0:
            return
        try:
            self._use(native.load("cuda", _open))
        except Exception as error:  # an installation may break in any way: the import goes on, and `info` explains
            self._unusable = str(error) or type(error).__name__

    def _use(self, library: Any) -> None:
        self._library = library
        self._unusable = None

    def why_not(self, device: torch.device) -> str | None:
        reason = super().why_not(device)
        if reason is not None:
            return reason
        answer = self._ask_gpu(torch.cuda.current_device() if device.index is None else device.index)
        return answer if isinstance(answer, str) else None

    def limits(self, index: int) -> list[int]:
        """The limits of GPU `index`, on which plans depend.

        These are: compute capability, SMs, bytes of shared memory per block and per SM, how many clusters of 1, 2, 4, 8
        and 16 blocks run at once, bytes per microsecond of a copy, bytes of the L2.

        Raises:
            RuntimeError: if the library is not loaded, or does not run on the device.
        """
        limits: list[int] | str = self._unusable or self._ask_gpu(index)
        if isinstance(limits, str):
            raise RuntimeError(f"se_fused: no limits of cuda:{index}: {limits}")
        return limits

    def _ask_gpu(self, index: int) -> list[int] | str:
        """The limits of a GPU, or why the library does not run on it: a driver older than the toolkit, no code for it.

        The library is asked once per GPU, and again only after a failure that may be temporary, such as too little
        memory.
        """
        if index not in self._gpus:
            limits = (ctypes.c_int64 * 11)()
            reason = self._library.se_fused_device_limits(index, limits)
            answer = list(limits) if reason is None else f"it does not run on cuda:{index}: {reason.decode()}"
            if reason is not None and not limits[0]:
                return answer
            self._gpus[index] = answer
        return self._gpus[index]

    # Makes torch.compile take the result as a constant instead of tracing the function. The decorator for this,
    # torch.compiler.assume_constant_result, would import the compiler: 1.3 of 2.9 s of `import se_fused`.
    _ask_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def forward_out(self, *args: Any) -> None:
        self._with_plan(super().forward_out, args)

    def backward_out(self, *args: Any) -> None:
        self._with_plan(super().backward_out, args)

    def _with_plan(self, operator: Callable[..., None], args: tuple[Any, ...]) -> None:
        plan = forcing.current().plan
        if not plan:
            return operator(*args)
        self._library.se_fused_force_plan(plan.encode())  # for this thread
        try:
            operator(*args)
        finally:
            self._library.se_fused_force_plan(b"")

    def plan(self, x: Tensor, r: int, options: Options, own_residual: bool, has_scale: bool) -> str:
        extension = native.load_extension()
        limits = self.limits(x.device.index)
        device = extension.Device(torch.cuda.get_device_name(x.device), *limits[:4], limits[4:9], *limits[9:])
        n, c = x.shape[:2]
        return str(
            extension.plan(
                device, n=n, c=c, r=r, l=x.numel() // (n * c), dtype=str(x.dtype).removeprefix("torch."),
                channels_last=is_channels_last(x), squeeze=options.squeeze, 
                pre_act=options.pre_act > 0 or has_scale,
                residual=own_residual, post_act=options.post_act > 0, forced=forcing.current().plan,
            )
        )  # fmt: skip


def _open(path: Path) -> ctypes.CDLL:
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.se_fused_device_limits.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int64)]
    library.se_fused_device_limits.restype = ctypes.c_char_p
    library.se_fused_force_plan.argtypes = [ctypes.c_char_p]
    library.se_fused_force_plan.restype = None
    return library
