"""The one builder of the native code: by setup.py ahead of time, or when the package is first imported.

A build is a folder named by `recipe.key`, so a stale one is never loaded. The name of a CUDA build goes on with the
architectures that it has code for, so that a build made on one machine serves another with such a GPU. setup.py leaves
it in the package; the first import, in the user's cache folder (cache.py). A build appears whole or not at all: it is
made in another folder, flushed to the disk and renamed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from . import gpus, manifest, recipe, toolchain
from .toolchain import BuildError

PREBUILT = Path(__file__).resolve().parents[1] / "_native"
_TIMEOUT = 1800  # seconds
# Measured on two cores of an EPYC: seconds that one core compiles, for the CPU group and for each CUDA architecture.
_CPU_SECONDS, _CUDA_SECONDS = 50, 60
# Becomes ninja, with a SIGTERM to come from Linux when the process that builds ends; ninja then ends the compilers.
_NOT_AN_ORPHAN = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM);"
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)


class Watcher(Protocol):
    """Who is told how a build goes on."""

    def waits(self) -> None:
        """Another process builds in the same folder."""

    def begins(self) -> None:
        """Compilation begins."""

    def step(self, done: int, steps: int) -> None:
        """So many of all its steps are done."""


class _Nobody:
    def waits(self) -> None:
        pass

    def begins(self) -> None:
        pass

    def step(self, done: int, steps: int) -> None:
        pass


def usual_seconds(group: str) -> int:
    """About how long a build takes here."""
    work = _CUDA_SECONDS * len(gpus.architectures()) if group == "cuda" else _CPU_SECONDS
    return round(work / min(toolchain.jobs(), os.cpu_count() or 1))


def build(parent: Path, group: str = "cpu", watcher: Watcher | None = None) -> Path:
    """Build a group into a folder of `parent` and return that folder; a build that is there and whole stays as it is.

    Safe against other processes that build the same, and against being killed: what such a process left is removed.

    Raises:
        BuildError: without a compiler, if compilation fails (then the message ends with the compiler's), or if
            `parent` cannot be written to.
    """
    parent = parent.resolve()
    target = parent / "-".join([recipe.key(group), *(gpus.architectures() if group == "cuda" else [])])
    if manifest.damage(target) is None:
        return target
    for tool in (toolchain.compiler, *[toolchain.nvcc] * (group == "cuda"), toolchain.ninja, toolchain.jobs):
        tool()  # before anything is written
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise BuildError("filelock is not installed: pip install filelock") from error
    watcher = watcher or _Nobody()
    lock = FileLock(parent / ".lock")  # one for the folder: who has it knows that nobody else builds here
    try:
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            watcher.waits()
            held = lock.acquire(timeout=_TIMEOUT)
        with held:
            return _build(parent, target, group, watcher)
    except Timeout as error:
        raise BuildError(f"another process has been building in {parent} for {_TIMEOUT} s") from error
    except OSError as error:
        raise BuildError(f"cannot build in {parent}: {error.strerror or error}") from error


def _build(parent: Path, target: Path, group: str, watcher: Watcher) -> Path:
    """`build`, where nobody else builds in `parent`."""
    for left in parent.glob("building-*"):
        shutil.rmtree(left, ignore_errors=True)
    if manifest.damage(target) is None:
        return target
    remove(target)
    folder = parent / f"building-{target.name}"
    folder.mkdir()
    try:
        recipe.write_ninja(folder, group)
        watcher.begins()
        began = time.monotonic()
        _run_ninja(folder, watcher)
        finished = folder / "finished"
        finished.mkdir()
        for library in recipe.GROUPS[group]:
            (folder / recipe.file_name(library)).rename(finished / recipe.file_name(library))
        files = [recipe.file_name(library) for library in recipe.GROUPS[group]]
        manifest.write(finished, _facts(group) | {"seconds": round(time.monotonic() - began, 1)}, files)
        finished.rename(target)
        return target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _facts(group: str) -> dict[str, object]:
    flags = toolchain.more_flags()
    facts: dict[str, object] = {"group": group, "compiler": toolchain.version(toolchain.compiler()[0]), "flags": flags}
    if group == "cuda":
        return facts | {"nvcc": toolchain.version(toolchain.nvcc()), "architectures": gpus.architectures()}
    return facts | {"instruction_sets": list(recipe.instruction_sets().values())}


def remove(target: Path) -> None:
    """Remove a build, which may be a link or a file. Raises OSError."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)


def _run_ninja(folder: Path, watcher: Watcher) -> None:
    command = [toolchain.ninja(), "-C", str(folder), "-j", str(toolchain.jobs())]
    if sys.platform == "linux":
        command = [sys.executable or "python3", "-ISc", _NOT_AN_ORPHAN, str(os.getpid()), *command]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
        # TMPDIR: what a killed compiler leaves goes with the folder.
        env={**os.environ, "NINJA_STATUS": "%f/%t ", "TMPDIR": str(folder)},
    )  # fmt: skip
    too_long = threading.Event()

    def stop() -> None:
        too_long.set()
        process.terminate()

    timer = threading.Timer(_TIMEOUT, stop)
    timer.daemon = True
    timer.start()
    assert process.stdout is not None
    words = ""
    try:
        for line in process.stdout:
            step = re.match(r"(\d+)/(\d+) ", line)
            if step:
                watcher.step(int(step[1]), int(step[2]))
            else:
                words += line
        code = process.wait()
    except BaseException:  # an interrupt, too, must not leave compilers behind
        process.terminate()
        process.wait()
        raise
    finally:
        timer.cancel()
    if too_long.is_set():
        raise BuildError(f"compilation took more than {_TIMEOUT} s")
    if code != 0:
        raise BuildError(f"compilation failed: {_reason(words)}\n{words[-4000:]}")


def _reason(words: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    found = re.search(r"^.*(?:error:|fatal|No space left).*$", words, re.MULTILINE)
    return found[0].strip() if found else f"{toolchain.compiler()[0]} gives no reason"
