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
import threading
import time
from pathlib import Path
from typing import Any

from . import gpus, manifest, recipe, toolchain
from .toolchain import BuildError

PREBUILT = Path(__file__).resolve().parents[1] / "_native"
_TIMEOUT = 1800  # seconds
# Measured on two cores of an EPYC: seconds that one core compiles, for the CPU group and for each CUDA architecture.
_CPU_SECONDS, _CUDA_SECONDS = 50, 40
_LONGEST = 10  # of one file
# Becomes ninja. Its stdin ends without a line when the process that builds is no more: then ninja is asked to stop, and
# ends the compilers.
_NOT_AN_ORPHAN = 'exec 3<&0; (read _ <&3 || kill $$) >/dev/null 2>&1 & exec "$@" 3<&- </dev/null'

WAITING = "se_fused: waiting for another process, which compiles in the same folder"


class Watcher:
    """Is told how a build proceeds; this base class ignores it."""

    def waits(self) -> None:
        """Another process builds in the same folder."""

    def begins(self) -> None:
        """Compilation begins."""

    def step(self, done: int, steps: int) -> None:
        """So many of all its steps are done."""


def usual_seconds(group: str) -> int:
    """About how long a build takes here."""
    work = _CUDA_SECONDS * len(gpus.architectures()) if group == "cuda" else _CPU_SECONDS
    return max(_LONGEST, round(work / toolchain.jobs()))


def build(
    parent: Path, group: str = "cpu", watcher: Watcher | None = None, refused: dict[str, Any] | None = None
) -> Path:
    """Build a group into a folder of `parent` and return that folder; a build that is there and whole stays as it is.

    Safe against other processes that build the same, and against being killed: what such a process left is removed.

    refused: what build.json says of a build that is whole and does not load; one like it is replaced.

    Raises:
        BuildError: without a compiler, if compilation fails (then the message ends with the compiler's), or if
            `parent` cannot be written to.
    """
    parent = parent.resolve()
    target = parent / "-".join([recipe.key(group), *(gpus.architectures() if group == "cuda" else [])])
    if _serves(target, refused):
        return target
    for tool in (toolchain.compiler, *[toolchain.nvcc] * (group == "cuda"), toolchain.ninja, toolchain.jobs):
        tool()  # before anything is written
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise BuildError("filelock is not installed: pip install filelock") from error
    watcher = watcher or Watcher()
    lock = FileLock(parent / ".lock")  # one for the folder: who has it knows that nobody else builds here
    try:
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            watcher.waits()
            held = lock.acquire(timeout=_TIMEOUT)
        with held:
            return _build(parent, target, group, watcher, refused)
    except Timeout as error:
        raise BuildError(f"another process has been building in {parent} for {_TIMEOUT} s") from error
    except OSError as error:
        raise BuildError(f"cannot build in {parent}: {error}") from error


def _serves(target: Path, refused: dict[str, Any] | None) -> bool:
    try:
        return manifest.damage(target) is None and manifest.read(target) != refused
    except (OSError, ValueError):  # another process has just replaced it
        return False


def _build(parent: Path, target: Path, group: str, watcher: Watcher, refused: dict[str, Any] | None) -> Path:
    """`build`, where nobody else builds in `parent`."""
    for left in parent.glob("building-*"):  # by who was killed
        shutil.rmtree(left, ignore_errors=True)
    if _serves(target, refused):
        return target
    folder = parent / f"building-{target.name}"
    folder.mkdir()
    try:
        recipe.write_ninja(folder, group)
        watcher.begins()
        began = time.monotonic()
        _run_ninja(folder, watcher)
        finished = folder / "finished"
        finished.mkdir()
        files = [recipe.file_name(library) for library in recipe.GROUPS[group]]
        for file in files:
            if not (folder / file).is_file():
                raise BuildError(f"compilation failed: {toolchain.compiler()[0]} ended well and wrote no {file}")
            (folder / file).rename(finished / file)
        manifest.write(finished, _facts(group) | {"seconds": round(time.monotonic() - began, 1)}, files)
        _remove(target)  # what is replaced
        finished.rename(target)
        return target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _facts(group: str) -> dict[str, object]:
    flags = toolchain.more_flags()
    facts: dict[str, object] = {"group": group, "compiler": toolchain.version(toolchain.compiler()), "flags": flags}
    if group == "cuda":
        return facts | {"nvcc": toolchain.version([toolchain.nvcc()]), "architectures": gpus.architectures()}
    return facts | {"instruction_sets": list(recipe.instruction_sets().values())}


def _remove(target: Path) -> None:
    """Remove what is in the place of a build: a folder, a link or a file. Raises OSError."""
    doomed = target.with_name("building-old")
    try:
        target.rename(doomed)  # at once, so that nobody sees half of it
    except FileNotFoundError:
        return
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def _run_ninja(folder: Path, watcher: Watcher) -> None:
    ninja = [toolchain.ninja(), "-C", str(folder), "-j", str(toolchain.jobs())]
    # TMPDIR: what a killed compiler leaves goes with the folder. LC_ALL: words that `_reason` knows.
    more = {"NINJA_STATUS": "%f/%t ", "TMPDIR": str(folder), "LC_ALL": "C"}
    pipe, words, too_long = subprocess.PIPE, "", threading.Event()
    with subprocess.Popen(
        ["/bin/sh", "-c", _NOT_AN_ORPHAN, "sh", *ninja], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True,
        errors="replace", env={**os.environ, **more},
    ) as process:  # fmt: skip

        def stop() -> None:
            too_long.set()
            process.terminate()

        timer = threading.Timer(_TIMEOUT, stop)
        timer.daemon = True
        timer.start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                step = re.match(r"(\d+)/(\d+) ", line)
                if step:
                    watcher.step(int(step[1]), int(step[2]))
                else:
                    words += line
            process.stdin.write("done\n")
        except BaseException:  # an interrupt, too, must not leave compilers behind
            process.terminate()
            raise
        finally:
            timer.cancel()
    if too_long.is_set():
        raise BuildError(f"compilation took more than {_TIMEOUT} s")
    if process.returncode != 0:
        raise BuildError(f"compilation failed: {_reason(words)}\n{words[-4000:]}")


def _reason(words: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    for pattern in (r"error: (?!ld returned)", r"undefined reference|cannot find|No space left|fatal|signal", r"error"):
        found = re.search(rf"^.*(?:{pattern}).*$", words, re.MULTILINE)
        if found:
            hint = " (apt install python3-dev, dnf install python3-devel)" if "Python.h" in found[0] else ""
            return found[0].strip() + hint
    return f"{toolchain.compiler()[0]} gives no reason"
