"""The one builder of the native code: by setup.py ahead of time, or when the package is first imported.

A build is a folder named by the hash of all that went into it (sources, flags, this file, Python's ABI, machine), so a
stale one is never loaded. setup.py leaves it in the package; the first import, in the user's cache folder. This file
needs no other file of the package, because setup.py runs it before there is one.

Environment: CXX, the compiler; MAX_JOBS, parallel compilations; SE_FUSED_CXXFLAGS, more flags; SE_FUSED_CACHE, the
cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
_BESIDE, _INSIDE = _PACKAGE.parent / "csrc", _PACKAGE / "csrc"
SOURCES = _INSIDE if _INSIDE.is_dir() else _BESIDE
PREBUILT = _PACKAGE / "_native"

# The oldest torch whose stable ABI has all that csrc uses; a library built for it serves every later one.
_TARGET_TORCH = "2.10"
_TARGET_TORCH_VERSION = "0x020a000000000000"
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# What the loops need to become vector code. Nothing here reorders or contracts arithmetic: NaN and Inf keep their
# meaning, and an element has the same bits in a vector as alone.
_KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
_X86 = {"v3": "x86-64-v3", "v4": "x86-64-v4"}
_TIMEOUT = 900  # seconds; a build takes about 40 on two cores
_log = logging.getLogger("se_fused")


class BuildError(RuntimeError):
    """The native code could not be built; the message says why."""


def _more_flags() -> list[str]:
    return shlex.split(os.environ.get("SE_FUSED_CXXFLAGS", ""))


def _instruction_sets() -> dict[str, list[str]]:
    """The name of each instruction set and the flags that select it."""
    sets: dict[str, list[str]] = {"baseline": []}
    if platform.machine() in ("x86_64", "AMD64"):
        sets.update({name: [f"-march={march}"] for name, march in _X86.items()})
    return sets


def key() -> str:
    """The name of the build that belongs to these sources on this machine."""
    digest = hashlib.sha256()
    files = sorted(p for p in SOURCES.rglob("*") if p.suffix in (".h", ".cpp"))
    for path in [*files, Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for text in (*_more_flags(), str(sysconfig.get_config_var("EXT_SUFFIX")), platform.machine(), sys.platform):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:24]


def _compiler() -> str:
    name = os.environ.get("CXX", "")
    found = shutil.which(name or "c++") or shutil.which(name or "g++")
    if found is None:
        raise BuildError(f"no C++ compiler: {name or 'c++'} is not on the PATH")
    return found


def _write_ninja(folder: Path) -> None:
    from ninja import ninja_syntax

    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed")
    torch = Path(spec.origin).parent
    import pybind11

    def quote(*words: str | Path) -> str:
        return str(ninja_syntax.escape(shlex.join(str(word) for word in words)))

    isas = _instruction_sets()
    binding = [f"-DTORCH_TARGET_VERSION={_TARGET_TORCH_VERSION}", "-isystem", torch / "include"]
    facts = [
        f'-DSE_FUSED_TARGET_TORCH="{_TARGET_TORCH}"',
        f'-DSE_FUSED_INSTRUCTION_SETS="{" ".join(["baseline", *(_X86[name] for name in isas if name in _X86)])}"',
        "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"],
    ]  # fmt: skip
    objects: dict[str, tuple[str, list[Any]]] = {
        "binding": ("cpu/binding.cpp", binding),
        "python": ("python.cpp", facts),
    }
    for isa, flags in isas.items():
        for kernel in ("forward", "backward"):
            objects[f"{kernel}_{isa}"] = (f"cpu/{kernel}.cpp", [*_KERNEL_FLAGS, f"-DSE_CPU_ISA={isa}", *flags])
    with (folder / "build.ninja").open("w") as file:
        ninja = ninja_syntax.Writer(file, width=10_000)
        compile_command = quote(_compiler(), *_FLAGS, *_more_flags())
        ninja.rule("compile", f"{compile_command} $flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"{compile_command} -shared $in -o $out $flags")
        for name, (source, flags) in objects.items():
            ninja.build(
                f"{name}.o",
                "compile",
                ninja_syntax.escape_path(str(SOURCES / source)),
                variables={"flags": quote(*flags)},
            )
        kernels = [f"{name}.o" for name in objects if name != "python"]
        # torch's libraries are in the process already: they are named here, so that the loader looks there.
        link = quote(f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")
        ninja.build(_file_name("cpu"), "link", kernels, variables={"flags": link})
        ninja.build(_file_name("_C"), "link", ["python.o"], variables={"flags": ""})


def _file_name(library: str) -> str:
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}" if library == "_C" else f"libse_fused_{library}.so"


def _jobs() -> list[str]:
    jobs = os.environ.get("MAX_JOBS", "")
    if not jobs:
        return []
    if not jobs.isdigit() or int(jobs) == 0:
        raise BuildError(f"MAX_JOBS is {jobs!r}; wanted a number of 1 or more")
    return ["-j", jobs]


def build(parent: Path) -> Path:
    """Build into `parent / key()` and return that folder; a build that is there already stays as it is.

    Safe against other processes that build the same, and against being killed: the folder appears whole or not at all.

    Raises:
        BuildError: without a compiler or torch, or if compilation fails; the message ends with the compiler's.
    """
    target = parent / key()
    if target.is_dir():
        return target
    try:
        import ninja
        from filelock import FileLock
    except ImportError as error:
        raise BuildError(f"{error.name} is not installed") from error
    with FileLock(parent / f"{target.name}.lock", timeout=_TIMEOUT):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=parent, prefix="building-") as name:
            folder = Path(name)
            _write_ninja(folder)
            command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *_jobs()]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
            except subprocess.TimeoutExpired as error:
                raise BuildError(f"compilation took more than {_TIMEOUT} s") from error
            if done.returncode != 0:
                raise BuildError(f"compilation failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
            finished = folder / "finished"
            finished.mkdir()
            for library in ("cpu", "_C"):
                (folder / _file_name(library)).rename(finished / _file_name(library))
            finished.rename(target)
    return target


def _cache() -> Path:
    """The cache folder, which only this user may write to: what lies there is loaded as code."""
    import platformdirs

    path = Path(os.environ.get("SE_FUSED_CACHE") or platformdirs.user_cache_dir("se_fused"))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise BuildError(f"no cache folder at {path}: {error.strerror}; SE_FUSED_CACHE names another") from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"others than this user may write to {path}; SE_FUSED_CACHE names another cache folder")
    return path


def _folder() -> Path:
    prebuilt = PREBUILT / key()
    if prebuilt.is_dir():
        return prebuilt
    cache = _cache()
    if not (cache / key()).is_dir():
        _log.warning("se_fused: compiling the CPU kernels into %s, once; this takes about a minute", cache)
    return build(cache)


def library(name: str) -> Path:
    """The shared library "cpu" (operators for `torch.ops.load_library`) or "_C" (the Python module), built if need be.

    Raises:
        BuildError: if it has to be built and cannot be.
    """
    return _folder() / _file_name(name)


def load_facts() -> ModuleType:
    """The module `se_fused._C`.

    Raises:
        BuildError: if it has to be built and cannot be.
    """
    name = "se_fused._C"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, library("_C"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]
