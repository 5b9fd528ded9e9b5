"""Runs programs in forks of one process that has imported torch: the import takes 2 s, and 80 programs need it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch"])


def _begin(code: str, folder: Path, environment: Mapping[str, str], files: tuple[Path, Path]) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    paths = environment["PYTHONPATH"].split(os.pathsep)
    sys.path[:0] = ["", *paths]
    sys.dont_write_bytecode = True
    # torch may have imported what a test puts something else in the place of.
    for name in [name for path in paths for name in os.listdir(path)]:
        sys.modules.pop(name.removesuffix(".py"), None)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def run(code: str, folder: Path, environment: Mapping[str, str], timeout: float) -> tuple[int, str, str]:
    """As `python -c code` in this folder and environment, whose PYTHONPATH comes first: exit status, stdout, stderr."""
    files = folder / "forked.out", folder / "forked.err"
    process = _FORKS.Process(target=_begin, args=(code, folder, dict(environment), files))
    process.start()
    process.join(timeout)
    process.kill()
    assert process.exitcode is not None, f"not done after {timeout} s"
    return process.exitcode, files[0].read_text(), files[1].read_text()
