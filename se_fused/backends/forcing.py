"""Which backend and which plan are forced: by a `use_backend` block, or for the process by SE_FUSED_BACKEND."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

from torch import _C
from torch.compiler import is_compiling

from .backend import Backend


@dataclass(frozen=True)
class Forced:
    """backend: None under "auto" and for a `name` without backend. plan: for the cuda backend (csrc/plan.h), or ""."""

    name: str
    backend: Backend | None = None
    plan: str = ""

    def allows(self, backend: Backend) -> bool:
        return self.backend is backend or self.name == "auto"


AUTO = Forced("auto")


class _Block:
    """A block around calls. A context may be copied while it is open, and outlive it."""

    def __init__(self, forced: Forced) -> None:
        self.forced, self.is_open = forced, True


_environment = AUTO
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("se_fused.forced", default=())  # the last opened comes last
_open_blocks: list[_Block] = []  # of the process
_resumed_count = 0  # of backwards that run under `resume` now
_lock = threading.Lock()  # guards _open_blocks, _resumed_count, _latest and idle
# Whether nothing is forced in any thread: what the fast path asks first, because a context variable takes 0.2 us.
idle = True
# PyTorch hands this thread-local object on to the threads of a backward.
_IN_BACKWARD = "se_fused.forced"
# torch.compile cannot trace a context variable. While it traces, `current` takes the name of what is forced as a
# constant and looks it up in _by_name; the plan is read only when the compiled operator runs. The traced code also
# reads _latest, so that torch.compile guards on it and compiles a region again when a block opens or closes.
_latest = AUTO.name
_by_name = {AUTO.name: AUTO}


def set_environment(forced: Forced) -> None:
    """Set what is forced outside every block."""
    global _environment
    with _lock:
        _by_name[forced.name] = _environment = forced
        _update()


def _update() -> None:
    global _latest, idle
    _latest = (_open_blocks[-1].forced if _open_blocks else _environment).name
    idle = _environment.name == "auto" and not _open_blocks and not _resumed_count


def current() -> Forced:
    """What is forced in this thread or task."""
    if is_compiling():
        return _by_name[_name_while_compiling(_latest)]
    if idle:
        return _environment
    return _last_open(_blocks.get()) or _of_backward() or _environment


def _name_while_compiling(_: str) -> str:
    return (_last_open(_blocks.get()) or _environment).name


# torch.compile calls this function and takes the result as a constant (cuda.py says more).
_name_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _last_open(blocks: tuple[_Block, ...]) -> Forced | None:
    for block in reversed(blocks):
        if block.is_open:
            return block.forced
    return None


def _of_backward() -> Forced | None:
    """What is forced in the thread that started the backward which this thread works for."""
    if _C._current_graph_task_id() == -1 or not _C._is_key_in_tls(_IN_BACKWARD):
        return None
    return _last_open(_C._get_obj_in_tls(_IN_BACKWARD))


@contextmanager
def force(forced: Forced) -> Iterator[None]:
    """Force `forced` inside the block. Blocks may end in any order and in any thread, as those of generators do."""
    block = _Block(forced)
    blocks = (*(b for b in _blocks.get() if b.is_open), block)
    _blocks.set(blocks)
    _C._stash_obj_in_tls(_IN_BACKWARD, blocks)
    with _lock:
        _by_name[forced.name] = forced
        _open_blocks.append(block)
        _update()
    try:
        yield
    finally:
        block.is_open = False
        _blocks.set(tuple(b for b in _blocks.get() if b.is_open))
        with _lock:
            _open_blocks.remove(block)
            _update()


def resume(forced: Forced) -> AbstractContextManager[None]:
    """Force in a backward what was forced in its forward: the block may be closed, the thread another one."""
    return nullcontext() if forced is current() else _resumed(forced)


@contextmanager
def _resumed(forced: Forced) -> Iterator[None]:
    global _resumed_count
    token = _blocks.set((_Block(forced),))
    with _lock:
        _resumed_count += 1
        _update()
    try:
        yield
    finally:
        _blocks.reset(token)
        with _lock:
            _resumed_count -= 1
            _update()
