"""Builds the native code: called by setup.py ahead of time, or by the first import of the package.

A build is a folder named by `recipe.key`, so a stale one is never loaded. To the name of a CUDA build are added the
architectures that it has code for, so that another machine with such a GPU can use it. setup.py builds into the
package, the first import into the user's cache folder (cache.py). A build appears complete or not at all: it is made in
another folder, flushed to the disk and renamed.
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
TIMEOUT = 1800  # seconds
# Seconds of compilation on one core, for the CPU group and for each CUDA architecture; measured on two EPYC cores.
_CPU_SECONDS, _CUDA_SECONDS = 50, 40
_SLOWEST_FILE_SECONDS = 10
# A shell script that becomes ninja. If this process dies, ninja's stdin ends without a line; then the script terminates
# ninja, which ends the compilers.
_END_WITH_PARENT = 'exec 3<&0; (read _ <&3 || kill $$) >/dev/null 2>&1 & exec "$@" 3<&- </dev/null'

WAITING = "se_fused: waiting for another process, which compiles in the same folder"


class Watcher:
    """Receives the progress of a build; this base class ignores it."""

    def waits(self) -> None:
        """The build waits, because another process builds in the same folder."""

    def begins(self) -> None:
        """Compilation begins."""

    def step(self, done: int, steps: int) -> None:
        """Of all `steps`, `done` are done."""


def usual_seconds(group: str) -> int:
    """Estimate how long a build takes on this machine, in seconds."""
    work = _CUDA_SECONDS * len(gpus.architectures()) if group == "cuda" else _CPU_SECONDS
    return max(_SLOWEST_FILE_SECONDS, round(work / toolchain.jobs()))


def build(
    parent: Path, group: str = "cpu", watcher: Watcher | None = None, refused: dict[str, Any] | None = None
) -> Path:
    """Build a group into a folder of `parent` and return that folder. An undamaged build that is there already is kept.

    Several processes may build at the same time, and any of them may be killed: the next build removes what it left.

    refused: the build.json of an undamaged build that does not load; a build with the same one is replaced.

    Raises:
        BuildError: if there is no compiler, compilation fails (then the message ends with the compiler's output), or
            `parent` cannot be written to.
    """
    parent = parent.resolve()
    target = parent / "-".join([recipe.key(group), *(gpus.architectures() if group == "cuda" else [])])
    if _is_usable(target, refused):
        return target
    for tool in (toolchain.compiler, *[toolchain.nvcc] * (group == "cuda"), toolchain.ninja, toolchain.jobs):
        tool()  # before anything is written
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise BuildError("filelock is not installed: pip install filelock") from error
    watcher = watcher or Watcher()
    lock = FileLock(parent / ".lock")  # whoever holds it is the only one that builds in this folder
    try:
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            watcher.waits()
            held = lock.acquire(timeout=TIMEOUT)
        with held:
            return _build(parent, target, group, watcher, refused)
    except Timeout as error:
        raise BuildError(f"another process has been building in {parent} for {TIMEOUT} s") from error
    except OSError as error:
        raise BuildError(f"cannot build in {parent}: {error}") from error


def _is_usable(target: Path, refused: dict[str, Any] | None) -> bool:
    try:
        return manifest.damage(target) is None and manifest.read(target) != refused
    except (OSError, ValueError):  # another process has just replaced it
        return False


def _build(parent: Path, target: Path, group: str, watcher: Watcher, refused: dict[str, Any] | None) -> Path:
    """`build` while holding the lock on `parent`."""
    for left in parent.glob("building-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    if _is_usable(target, refused):
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
        _remove(target)  # the build that this one replaces
        finished.rename(target)
        return target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _facts(group: str) -> dict[str, object]:
    flags = toolchain.extra_flags()
    facts: dict[str, object] = {"group": group, "compiler": toolchain.version(toolchain.compiler()), "flags": flags}
    if group == "cuda":
        return facts | {"nvcc": toolchain.version([toolchain.nvcc()]), "architectures": gpus.architectures()}
    return facts | {"instruction_sets": list(recipe.instruction_sets().values())}


def _remove(target: Path) -> None:
    """Remove the folder, link or file at the path of a build. Raises OSError."""
    doomed = target.with_name("building-old")
    try:
        target.rename(doomed)  # atomic, so that nobody sees half of it
    except FileNotFoundError:
        return
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def _run_ninja(folder: Path, watcher: Watcher) -> None:
    ninja = [toolchain.ninja(), "-C", str(folder), "-j", str(toolchain.jobs())]
    # TMPDIR: what a killed compiler leaves is removed with the folder. LC_ALL: `_error_line` knows only English.
    more = {"NINJA_STATUS": "%f/%t ", "TMPDIR": str(folder), "LC_ALL": "C"}
    pipe, output, too_long = subprocess.PIPE, "", threading.Event()
    with subprocess.Popen(
        ["/bin/sh", "-c", _END_WITH_PARENT, "sh", *ninja], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True,
        errors="replace", env={**os.environ, **more},
    ) as process:  # fmt: skip

        def stop() -> None:
            too_long.set()
            process.terminate()

        timer = threading.Timer(TIMEOUT, stop)
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
                    output += line
            process.stdin.write("done\n")
        except BaseException:  # an interrupt must not leave compilers behind either
            process.terminate()
            raise
        finally:
            timer.cancel()
    if too_long.is_set():
        raise BuildError(f"compilation took more than {TIMEOUT} s")
    if process.returncode != 0:
        raise BuildError(f"compilation failed: {_error_line(output)}\n{output[-4000:]}")


def _error_line(output: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    for pattern in (r"error: (?!ld returned)", r"undefined reference|cannot find|No space left|fatal|signal", r"error"):
        found = re.search(rf"^.*(?:{pattern}).*$", output, re.MULTILINE)
        if found:
            hint = " (apt install python3-dev, dnf install python3-devel)" if "Python.h" in found[0] else ""
            return found[0].strip() + hint
    return f"{toolchain.compiler()[0]} gives no reason"
