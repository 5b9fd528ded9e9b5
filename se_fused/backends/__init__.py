"""The implementations of the operation, and the choice among them.

backend.py      what a backend is
cuda.py, triton.py, cpu.py, reference.py
                the four, in the order in which "auto" tries them
choice.py       which of them runs a call, and why each other one does not
forcing.py      which one is forced, by `use_backend` or SE_FUSED_BACKEND
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import forcing
from .backend import Backend
from .choice import BackendUnavailable, Choice, Explanation
from .cpu import Cpu
from .cuda import Cuda
from .reference import Reference
from .triton import Triton

__all__ = [
    "ALL", "CPU", "CUDA", "REFERENCE", "Backend", "BackendUnavailable", "Explanation", "explain", "load", "select",
    "use_backend",
]  # fmt: skip

CUDA, TRITON, CPU, REFERENCE = Cuda(), Triton(), Cpu(), Reference()
_choice = Choice((CUDA, TRITON, CPU, REFERENCE))
ALL = _choice.backends
select, explain = _choice.select, _choice.explain
_NAMES = ("auto", *ALL)


def load() -> None:
    """Read SE_FUSED_BACKEND and load the compiled backends, building them if necessary."""
    name = os.environ.get("SE_FUSED_BACKEND") or "auto"
    if name not in _NAMES:
        logging.getLogger("se_fused").warning(
            "se_fused: SE_FUSED_BACKEND is %r; it must be one of %s", name, ", ".join(_NAMES)
        )
    forcing.set_environment(forcing.Forced(name, ALL.get(name)))
    for backend in (CPU, CUDA):
        if name == "reference":
            backend.leave_out("not loaded, because SE_FUSED_BACKEND=reference")
        else:
            backend.load()
    if CPU.why_not(torch.device("cpu")) is not None and name == "auto":
        _choice.warn_of_fallback(torch.device("cpu"), "reference")


@contextmanager
def use_backend(name: str, plan: str = "") -> Iterator[None]:
    """Force a backend inside a `with` block, for the calls of this thread or asyncio task, and for their backward.

    A new thread does not take part (the replicas of `nn.DataParallel`, for example); an asyncio task or a call of
    `asyncio.to_thread` that starts inside does, until the block ends. The backward of a compiled or checkpointed region
    belongs inside the block too. torch.compile with fullgraph=True cannot trace the block itself: put it around the
    compiled function.

    Args:
        name: "auto", "cuda", "triton", "cpu" or "reference" (`se_fused.reference` under PyTorch's autograd).
        plan: for "cuda", requirements on the plan of each call, such as "two_pass" or "cluster size=4" (csrc/plan.h). A
            call for which no such plan exists raises ValueError, naming the limit.

    Raises:
        ValueError: for any other name, or a plan for another backend.
        BackendUnavailable: from a call inside the block that this backend cannot run.
    """
    if name not in _NAMES:
        raise ValueError(f"use_backend: name must be one of {', '.join(_NAMES)}; got {name!r}")
    if plan and name != "cuda":
        raise ValueError(f"use_backend: plan must be empty for {name!r}; got {plan!r}")
    with forcing.force(forcing.Forced(name, ALL.get(name), plan)):
        yield
