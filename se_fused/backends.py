"""Which backend serves a call, and why each other one does not.

`auto` takes the first of cuda, triton, cpu, reference that can serve the call. The dispatcher of PyTorch selects among
the compiled ones by the device of `x`; this file decides between them, Triton and the reference.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import native
from .memory import PLAIN

BACKENDS = ("cuda", "triton", "cpu", "reference")
_log = logging.getLogger("se_fused")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot serve the call; the message says why."""


@dataclass(frozen=True)
class Explanation:
    """Answer of `se_fused.explain`: `backend` serves the call; `why_not` has a reason for each other one.

    plan: the kernels that a "cuda" backend launches for the forward pass; None elsewhere.
    """

    backend: str
    why_not: dict[str, str]
    plan: str | None = None

    def __str__(self) -> str:
        head = self.backend if self.plan is None else f"{self.backend}: {self.plan}"
        return "\n".join([head, *(f"  not {name}: {reason}" for name, reason in self.why_not.items())])


_NAMES = ("auto", *BACKENDS)
# Name and plan that each `with use_backend` that is open asked for, the latest last; the environment's come first.
_asked: list[list[str]] = [[os.environ.get("SE_FUSED_BACKEND") or "auto", ""]]
_forced, _forced_plan = _asked[-1]  # what holds now
# For each backend why no call can use it, or None.
_unusable: dict[str, str | None] = {
    "cuda": "there is no NVIDIA GPU",
    "triton": None,
    "cpu": None,
    "reference": None,
}
_said: set[str] = set()
_cuda: ctypes.CDLL | None = None  # the compiled CUDA part, for what is no operator
# Of each GPU that was asked: its limits, or why the CUDA part does not run on it.
_gpus: dict[int, list[int] | str] = {}


def _refuse(*_: Any) -> None:
    return None


# csrc/direct.cpp's forward, once the CPU kernels are there: y, or None where the call takes the dispatcher.
forward_direct: Callable[..., torch.Tensor | None] = _refuse


def load() -> None:
    """Load the compiled parts, building them if need be. A failure leaves its reason for `explain` and the log.

    Where NVML is there, CUDA stays uninitialised: a GPU is asked for more when a call first meets it.
    """
    if _forced not in _NAMES:
        _log.warning("se_fused: SE_FUSED_BACKEND is %r; it must be one of %s", _forced, ", ".join(_NAMES))
    names = ["cpu"]
    if torch.version.cuda is not None and torch.cuda.device_count() > 0:
        names.append("cuda")
    for name in names:
        if _forced == "reference":
            _unusable[name] = "not loaded, because SE_FUSED_BACKEND=reference"
            continue
        try:
            path = native.load(name, _load_operators)
            _connect(path) if name == "cpu" else _open_cuda(path)
            _unusable[name] = None
        except Exception as error:  # an installation may break in any way: the import goes on, and `info` explains
            _unusable[name] = str(error) or type(error).__name__
            if name == "cpu":
                _say_who_serves(torch.device("cpu"), "reference")


def _open_cuda(path: Path) -> None:
    global _cuda
    library = ctypes.CDLL(str(path))
    library.se_fused_device_limits.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int64)]
    library.se_fused_device_limits.restype = ctypes.c_char_p
    library.se_fused_force_plan.argtypes = [ctypes.c_char_p]
    library.se_fused_force_plan.restype = None
    _cuda = library


def _load_operators(path: Path) -> Path:
    torch.ops.load_library(path)
    return path


def _connect(path: Path) -> None:
    """Open the direct way to the CPU kernels in `path`. Where that fails every call takes the dispatcher."""
    global forward_direct
    try:
        address = ctypes.cast(ctypes.CDLL(str(path)).se_fused_cpu_forward, ctypes.c_void_p).value
        module = native.load_facts()
        if module.connect(address, PLAIN, torch.empty_like):
            forward_direct = module.forward
    except Exception as error:  # as above
        _log.warning("se_fused: each call on the CPU takes some microseconds more: %s", error)


def cuda_limits(index: int) -> list[int]:
    """Of a GPU: capability, multiprocessors, shared memory per block and per multiprocessor, clusters of 1, 2, 4, 8 and
    16 blocks, bytes per microsecond of a copy, bytes of the L2.

    Raises:
        RuntimeError: if the CUDA part is not loaded, or does not run on the device.
    """
    limits: list[int] | str = _unusable["cuda"] or _ask_gpu(index)
    if isinstance(limits, str):
        raise RuntimeError(f"se_fused: no limits of cuda:{index}: {limits}")
    return limits


def _ask_gpu(index: int) -> list[int] | str:
    """The limits of a GPU, or why the CUDA part does not run on it: a driver older than the toolkit, no code for it.

    The library is asked once a GPU, and again only where it failed for what may pass, such as too little memory. A
    compiler takes the answer and does not look inside.
    """
    if index not in _gpus:
        assert _cuda is not None
        limits = (ctypes.c_int64 * 11)()
        reason = _cuda.se_fused_device_limits(index, limits)
        answer = list(limits) if reason is None else f"it does not run on cuda:{index}: {reason.decode()}"
        if reason is not None and not limits[0]:
            return answer
        _gpus[index] = answer
    return _gpus[index]


# What torch.compiler.assume_constant_result does, which would import the compiler: 1.3 of 2.9 s of `import se_fused`.
_ask_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_forced() -> bool:
    """Whether a backend was asked for."""
    return _forced != "auto"


def forced_plan() -> str:
    """What `use_backend` asks of the plans of the cuda backend."""
    return _forced_plan


def why_not(name: str, device: torch.device) -> str | None:
    """Why `name` cannot serve a call on `device`; None if it can."""
    if name not in BACKENDS:  # use_backend has checked its own
        return f"SE_FUSED_BACKEND is {name!r}; it must be one of {', '.join(_NAMES)}"
    if name == "triton":
        return _why_not_triton(device)
    if _unusable[name] is not None or name not in ("cpu", "cuda"):
        return _unusable[name]
    if device.type != name:
        return f"it serves {name.upper()} tensors; x is on {device}"
    if name == "cuda":
        answer = _ask_gpu(torch.cuda.current_device() if device.index is None else device.index)
        return answer if isinstance(answer, str) else None
    return None


def _why_not_triton(device: torch.device) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu":
        if not interpreted:
            return "it serves CUDA and ROCm tensors, and CPU tensors only under TRITON_INTERPRET=1"
        if _forced != "triton":
            return "it interprets its kernels, slowly, for CPU tensors only where it is asked for"
    elif device.type != "cuda":
        return f"it serves CUDA and ROCm tensors; x is on {device}"
    elif interpreted:
        return "TRITON_INTERPRET=1 is set, which is for CPU tensors"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 5):
        return f"it needs compute capability 7.5; {device} has {torch.cuda.get_device_capability(device)}"
    if _unusable["triton"] is None and "se_fused.triton" not in sys.modules:
        try:
            importlib.import_module("se_fused.triton")
        except Exception as error:  # an installation may break in any way; the reference still serves the call
            _unusable["triton"] = f"triton cannot be imported: {error}"
    return _unusable["triton"]


def takes_triton(device: torch.device) -> bool:
    """Whether an operator on `device` is to launch Triton; else PyTorch's dispatcher finds the compiled part."""
    if _forced != "triton" and (device.type == "cpu" or why_not("cuda", device) is None):
        return False
    return why_not("triton", device) is None


def kernels_serve_cpu() -> bool:
    """Whether `select` would say "cpu" for every CPU tensor."""
    return _unusable["cpu"] is None and _forced in ("auto", "cpu")


def select(device: torch.device) -> str:
    """The backend for a call on `device`. Raises BackendUnavailable if a forced one cannot serve it."""
    if device.type == "cpu" and kernels_serve_cpu():
        return "cpu"  # by far the most frequent answer
    if _forced != "auto":
        reason = why_not(_forced, device)
        if reason is not None:
            raise BackendUnavailable(f"backend {_forced!r} was asked for and cannot serve this call: {reason}")
        return _forced
    for name in BACKENDS:
        if why_not(name, device) is None:
            break
    _say_who_serves(device, name)
    return name


def _say_who_serves(device: torch.device, name: str) -> None:
    """In one line, once: that a device has not its best backend, and why."""
    best = "cuda" if device.type == "cuda" else "cpu"
    if name == best or device.type in _said or torch.compiler.is_compiling():
        return
    _said.add(device.type)
    server = "reference PyTorch" if name == "reference" else "Triton"
    reason = (why_not(best, device) or "").partition("\n")[0]
    _log.warning("se_fused: %s serves %s tensors: %s (python -m se_fused info)", server, device.type, reason)


def explain(device: torch.device, plan: Callable[[], str] | None = None) -> Explanation:
    """`Explanation` for a call on `device`, under the backend that is forced now; `plan` is asked if it is "cuda"."""
    chosen = select(device)
    reasons = {
        name: why_not(name, device) or (f"{chosen} was asked for" if _forced != "auto" else f"{chosen} comes first")
        for name in BACKENDS
        if name != chosen
    }
    return Explanation(chosen, reasons, plan() if plan is not None and chosen == "cuda" else None)


@contextmanager
def use_backend(name: str, plan: str = "") -> Iterator[None]:
    """Force a backend inside a `with` block, for every thread of the process. Of blocks that overlap the latest holds.

    Args:
        name: "auto", "cuda", "triton", "cpu" or "reference" (`se_fused.reference` under PyTorch's autograd).
        plan: for "cuda", what the plan of each call must have, such as "two_pass" or "cluster size=4" (csrc/plan.h). A
            call that no such plan serves raises ValueError, naming the limit.

    Raises:
        ValueError: for any other name, or a plan for another backend.
        BackendUnavailable: from a call inside the block that this backend cannot serve.
    """
    if plan and name != "cuda":
        raise ValueError(f"use_backend: plan must be empty for {name!r}; got {plan!r}")
    if name not in _NAMES:
        raise ValueError(f"use_backend: name must be one of {', '.join(_NAMES)}; got {name!r}")
    asked = [name, plan]
    _asked.append(asked)
    _force_the_latest()
    try:
        yield
    finally:
        # Blocks of several threads may end in any order.
        del _asked[next(i for i, other in enumerate(_asked) if other is asked)]
        _force_the_latest()


def _force_the_latest() -> None:
    global _forced, _forced_plan
    _forced, _forced_plan = _asked[-1]
    if _cuda is not None:
        _cuda.se_fused_force_plan(_forced_plan.encode())
