"""Which backend runs a call, and why each other one does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import forcing
from .backend import Backend, Compiled

_log = logging.getLogger("se_fused")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run the call; the message says why."""


@dataclass(frozen=True)
class Explanation:
    """What `se_fused.explain` returns.

    backend: the backend that runs the call. why_not: for each other backend, the reason why it does not.
    plan: the kernels that the "cuda" backend launches for the forward pass; None for every other backend.
    """

    backend: str
    why_not: dict[str, str]
    plan: str | None = None

    def __str__(self) -> str:
        head = self.backend if self.plan is None else f"{self.backend}: {self.plan}"
        return "\n".join([head, *(f"  not {name}: {reason}" for name, reason in self.why_not.items())])


class Choice:
    """Chooses the first of `backends` that can run a call, or the one that is forced."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.backends = {backend.name: backend for backend in backends}
        # By device type. Asked first: the order of `backends` gives the same answer, after asking more of them.
        self._compiled = {backend.name: backend for backend in backends if isinstance(backend, Compiled)}
        self._warned: set[str] = set()  # device types

    def select(self, device: torch.device) -> Backend:
        """The backend for a call on `device`. Raises BackendUnavailable if a forced one cannot run it."""
        forced = forcing.current()
        if forced.name != "auto":
            reason = self._why_not_forced(forced, device)
            if reason is not None:
                raise BackendUnavailable(f"backend {forced.name!r} was asked for and cannot run this call: {reason}")
            assert forced.backend is not None
            return forced.backend
        compiled = self._compiled.get(device.type)
        if compiled is not None and compiled.why_not(device) is None:
            return compiled
        for backend in self.backends.values():
            if backend.why_not(device) is None:
                break
        self.warn_of_fallback(device, backend.name)
        return backend

    def _why_not_forced(self, forced: forcing.Forced, device: torch.device) -> str | None:
        if forced.backend is None:  # only by SE_FUSED_BACKEND: use_backend has checked its name
            return f"SE_FUSED_BACKEND is {forced.name!r}; it must be one of auto, {', '.join(self.backends)}"
        return forced.backend.why_not(device)

    def warn_of_fallback(self, device: torch.device, name: str) -> None:
        """Log one line, once per device type, if `name` is not the best backend for `device`."""
        best = "cuda" if device.type == "cuda" else "cpu"
        if name == best or device.type in self._warned or torch.compiler.is_compiling():
            return
        self._warned.add(device.type)
        fallback = "reference PyTorch" if name == "reference" else "Triton"
        reason = (self.backends[best].why_not(device) or "").partition("\n")[0]
        _log.warning("se_fused: %s tensors run on %s: %s (python -m se_fused info)", device.type, fallback, reason)

    def explain(self, device: torch.device, plan: Callable[[Backend], str | None] | None = None) -> Explanation:
        """The `Explanation` of a call on `device`. plan: gives the plan of the chosen backend."""
        chosen = self.select(device)
        instead = f"{chosen.name} comes first" if forcing.current().name == "auto" else f"{chosen.name} was asked for"
        reasons = {
            name: backend.why_not(device) or instead for name, backend in self.backends.items() if backend is not chosen
        }
        return Explanation(chosen.name, reasons, None if plan is None else plan(chosen))
