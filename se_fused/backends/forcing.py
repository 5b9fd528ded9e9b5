"""Which backend and which plan are forced: by a `use_backend` block, or for the process by SE_FUSED_BACKEND."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

from .backend import Backend


@dataclass(frozen=True, eq=False)
class Forced:
    """backend: None under "auto" and for a `name` without backend. plan: for the cuda backend (csrc/plan.h), or ""."""

    name: str
    backend: Backend | None = None
    plan: str = ""

    def allows(self, backend: Backend) -> bool:
        return self.backend is backend or self.name == "auto"


AUTO = Forced("auto")

_environment = AUTO
# The open blocks of this thread or task, and those of the whole process; the block opened last comes last.
_task_blocks: ContextVar[tuple[Forced, ...]] = ContextVar("se_fused.forced", default=())
_process_blocks: list[Forced] = []
_latest = AUTO  # the last of _process_blocks, or _environment


def set_environment(forced: Forced) -> None:
    """Set what is forced outside every block."""
    global _environment, _latest
    _environment = forced
    _latest = _process_blocks[-1] if _process_blocks else _environment


def current() -> Forced:
    """What is forced in this thread or task."""
    if torch.compiler.is_compiling():
        # torch.compile cannot read a context variable; it guards on this global and compiles again when it changes.
        return _latest
    blocks = _task_blocks.get()
    return blocks[-1] if blocks else _environment


@contextmanager
def force(forced: Forced) -> Iterator[None]:
    """Force `forced` inside the block. Blocks may end in any order, as those of generators and tasks do."""
    global _latest
    forced = replace(forced)  # a copy, because blocks are told apart by identity
    _task_blocks.set((*_task_blocks.get(), forced))
    _process_blocks.append(forced)
    _latest = forced
    try:
        yield
    finally:
        _task_blocks.set(tuple(other for other in _task_blocks.get() if other is not forced))
        _process_blocks.remove(forced)
        _latest = _process_blocks[-1] if _process_blocks else _environment


def resume(forced: Forced) -> AbstractContextManager[None]:
    """`force`, unless `forced` holds already. With it a backward, in any thread, finds what its forward found."""
    return nullcontext() if forced is current() else force(forced)
