"""Which backend and which plan the code around a call asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

from .backend import Backend


@dataclass(frozen=True, eq=False)
class Forced:
    """backend: None under "auto", and where `name` is no backend. plan: for the cuda backend (csrc/plan.h), or ""."""

    name: str
    backend: Backend | None = None
    plan: str = ""

    def allows(self, backend: Backend) -> bool:
        return self.backend is backend or self.name == "auto"


AUTO = Forced("auto")

_environment = AUTO
# The open blocks of this thread or task, and those of the process, the latest last.
_here: ContextVar[tuple[Forced, ...]] = ContextVar("se_fused.forced", default=())
_anywhere: list[Forced] = []
_latest = AUTO  # of _anywhere


def set_environment(forced: Forced) -> None:
    """What holds outside every block."""
    global _environment, _latest
    _environment = forced
    _latest = _anywhere[-1] if _anywhere else _environment


def current() -> Forced:
    """What holds in this thread or task."""
    if torch.compiler.is_compiling():
        return _latest  # torch.compile cannot read a context variable; it guards on this one and compiles again
    open_here = _here.get()
    return open_here[-1] if open_here else _environment


@contextmanager
def force(forced: Forced) -> Iterator[None]:
    """`forced` holds inside the block. Blocks may end in any order, as in generators and tasks."""
    global _latest
    forced = replace(forced)  # to be told from that of another block
    _here.set((*_here.get(), forced))
    _anywhere.append(forced)
    _latest = forced
    try:
        yield
    finally:
        _here.set(tuple(other for other in _here.get() if other is not forced))
        _anywhere.remove(forced)
        _latest = _anywhere[-1] if _anywhere else _environment


def resume(forced: Forced) -> AbstractContextManager[None]:
    """As `force`, where `forced` does not hold already: what a call found holds for its backward in any thread."""
    return nullcontext() if forced is current() else force(forced)
