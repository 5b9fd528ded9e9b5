"""The tools of this machine for a build: compilers and ninja, and the number of parallel jobs.

Environment: CXX, the C++ compiler; CUDA_HOME, the folder of the CUDA toolkit, if nvcc is not on the PATH; MAX_JOBS, the
number of parallel compilations; SE_FUSED_CXXFLAGS, extra flags for the C++ compiler.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path


class BuildError(RuntimeError):
    """The native code could not be built; the first line of the message says why."""


def compiler() -> list[str]:
    """The command of the C++ compiler, such as [/usr/bin/c++] or [ccache, g++]. Raises BuildError if there is none."""
    command = _words("CXX") or ["c++" if shutil.which("c++") else "g++"]
    found = shutil.which(command[0])
    if found is None:
        raise BuildError(
            f"no C++ compiler: {command[0]} is not on the PATH; install one (apt install g++, dnf install gcc-c++) or "
            "name it by CXX"
        )
    return [os.path.abspath(found), *command[1:]]


def nvcc() -> str:
    """The path of nvcc. Raises BuildError if there is none."""
    home = os.environ.get("CUDA_HOME", "")
    found = shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")
    if found is None:
        place = Path(home, "bin", "nvcc") if home else "nvcc on the PATH"
        raise BuildError(f"no CUDA compiler: {place} is not there; install the CUDA toolkit, or name it by CUDA_HOME")
    return os.path.abspath(found)


def ninja() -> str:
    """The path of ninja. Raises BuildError if it is not installed."""
    try:
        import ninja
    except ImportError as error:
        raise BuildError("ninja is not installed: pip install ninja") from error
    # In pip's isolated builds, ninja's package does not find the program, but the program is on the PATH.
    folder = getattr(ninja, "BIN_DIR", "")
    found = shutil.which("ninja", path=folder or None)
    if found is None:
        raise BuildError(f"the program ninja is not in {folder or 'any folder of the PATH'}: pip install ninja")
    return os.path.abspath(found)


def jobs() -> int:
    """The number of parallel compilations. Raises BuildError if MAX_JOBS is not one."""
    asked = os.environ.get("MAX_JOBS", "")
    if not asked:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not re.fullmatch(r"\s*[1-9][0-9]{0,5}\s*", asked):
        raise BuildError(f"MAX_JOBS is {asked!r}; wanted a number of 1 or more")
    return int(asked)


def extra_flags() -> list[str]:
    """The words of SE_FUSED_CXXFLAGS. Raises BuildError if it cannot be split into words."""
    return _words("SE_FUSED_CXXFLAGS")


def version(command: list[str]) -> str:
    """The version line that a compiler prints; if it does not run, the error."""
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", check=False, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    lines = done.stdout.splitlines() or command
    return next((line for line in lines if "release" in line), lines[0])  # nvcc's first line has no number


def _words(variable: str) -> list[str]:
    given = os.environ.get(variable, "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise BuildError(f"{variable} is {given!r}: {error}") from error
