"""Which backend serves a call, and why each other one does not.

`auto` takes the first of cuda, triton, cpu, reference that can serve the call. The dispatcher of PyTorch selects among
the compiled ones by the device of `x`; this file decides between them and the reference.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import build

BACKENDS = ("cuda", "triton", "cpu", "reference")
_log = logging.getLogger("se_fused")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot serve the call; the message says why."""


@dataclass(frozen=True)
class Explanation:
    """Answer of `se_fused.explain`: `backend` serves the call; `why_not` has a reason for each other one."""

    backend: str
    why_not: dict[str, str]

    def __str__(self) -> str:
        return "\n".join([self.backend, *(f"  not {name}: {reason}" for name, reason in self.why_not.items())])


def _check_name(name: str, origin: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{origin} must be one of {', '.join(('auto', *BACKENDS))}; got {name!r}")
    return name


_forced = _check_name(os.environ.get("SE_FUSED_BACKEND", "auto"), "SE_FUSED_BACKEND")
# None: usable. A text: why not, the same for every call.
_unusable: dict[str, str | None] = {
    "cuda": "this version has no CUDA kernels",
    "triton": "this version has no Triton kernels",
    "cpu": None,
    "reference": None,
}
_said: set[str] = set()


def load() -> None:
    """Load the compiled part, building it if need be. A failure leaves the reason for `explain` and the log."""
    if _forced == "reference":
        _unusable["cpu"] = "not loaded, because SE_FUSED_BACKEND=reference"
        return
    try:
        torch.ops.load_library(build.library("cpu"))
    except (build.BuildError, OSError) as error:
        _unusable["cpu"] = str(error)


def why_not(name: str, device: torch.device) -> str | None:
    """Why `name` cannot serve a call on `device`; None if it can."""
    if _unusable[name] is None and name == "cpu" and device.type != "cpu":
        return f"it serves CPU tensors; x is on {device}"
    return _unusable[name]


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
    if name == "reference" and device.type not in _said:
        _said.add(device.type)
        best = "cuda" if device.type == "cuda" else "cpu"
        _log.warning("se_fused: reference PyTorch serves %s tensors: %s", device.type, why_not(best, device))
    return name


def explain(device: torch.device) -> Explanation:
    """`Explanation` for a call on `device`, under the backend that is forced now."""
    chosen = select(device)
    reasons = {
        name: why_not(name, device) or (f"{chosen} was asked for" if _forced != "auto" else f"{chosen} comes first")
        for name in BACKENDS
        if name != chosen
    }
    return Explanation(chosen, reasons)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside a `with` block, for every thread of the process.

    Args:
        name: "auto", "cuda", "triton", "cpu" or "reference" (`se_fused.reference` under PyTorch's autograd).

    Raises:
        ValueError: for any other name.
        BackendUnavailable: from a call inside the block that this backend cannot serve.
    """
    global _forced
    before, _forced = _forced, _check_name(name, "use_backend: name")
    try:
        yield
    finally:
        _forced = before
