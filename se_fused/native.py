"""Which build of the native code serves this process: found in the package or the cache, else built; then loaded.

Environment: SE_FUSED_CACHE, the cache folder. What is there already and serves is not compiled anew.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from . import build
from .build import BuildError

_GIVEN_UP = "does_not_load"  # a file in a build that was made here and cannot be loaded
_log = logging.getLogger("se_fused")
T = TypeVar("T")


def _cache() -> Path:
    """The cache folder, which only this user may write to: what lies there is loaded as code."""
    named = os.environ.get("SE_FUSED_CACHE")
    if not named:
        try:
            import platformdirs
        except ImportError as error:
            raise BuildError("platformdirs is not installed; SE_FUSED_CACHE names a cache folder") from error
        try:
            named = platformdirs.user_cache_dir("se_fused")
        except RuntimeError as error:  # a user without a home
            raise BuildError(f"no cache folder: {error}; SE_FUSED_CACHE names one") from error
    path = Path(named)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise BuildError(f"no cache folder at {path}: {error.strerror}; SE_FUSED_CACHE names another") from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"others than this user may write to {path}; SE_FUSED_CACHE names another cache folder")
    return path


def _found(parent: Path, group: str, enough: Callable[[Iterable[bool]], bool] = all) -> Path | None:
    """A build of these sources in `parent`; for "cuda", one with code for all, or any, of this machine's GPUs."""
    name = build.key(group)
    if group == "cpu":
        return parent / name if (parent / name).is_dir() else None
    here = [gpu for gpu in build.gpus() if gpu >= build.OLDEST]
    for folder in sorted(parent.glob(f"{name}-*")):
        if folder.is_dir() and enough(runs_on(folder.name.split("-")[1:], gpu) for gpu in here):
            return folder
    return None


def runs_on(architectures: list[str], gpu: int) -> bool:
    """Whether code for these architectures runs on a GPU: machine code in one major version, PTX on all later ones."""
    for name in architectures:
        number = build.number(name)
        if "a" in name:  # of this very architecture
            if number == gpu:
                return True
        elif number <= gpu and (number // 10 == gpu // 10 or name.endswith("+PTX")):
            return True
    return False


def _existing(group: str) -> Iterator[Path]:
    """The builds that serve this machine: in the package, in the cache."""
    packaged = _found(build.PREBUILT, group)
    if packaged is not None:
        yield packaged
    with contextlib.suppress(BuildError):  # no cache folder
        cached = _found(_cache(), group)
        if cached is not None:
            yield cached


def _new(group: str) -> Path:
    """A build made in the cache; where none can be made, a packaged one that serves some of this machine's GPUs."""
    try:
        cache = _cache()
        build.nvcc() if group == "cuda" else build.compiler()  # before a word of compiling
        kernels = group.upper()
        _log.warning("se_fused: compiling the %s kernels into %s, once; this takes about a minute", kernels, cache)
        return build.build(cache, group)
    except (BuildError, OSError):
        packaged = _found(build.PREBUILT, group, any) if group == "cuda" else None
        if packaged is None:
            raise
        return packaged


def _group(library: str) -> str:
    (group,) = (group for group, libraries in build.GROUPS.items() if library in libraries)
    return group


def library(name: str) -> Path:
    """The shared library "cpu" or "cuda" or "_C" (the Python module), built if need be.

    Raises:
        BuildError: if it has to be built and cannot be.
    """
    group = _group(name)
    return (next(_existing(group), None) or _new(group)) / build.file_name(name)


def load(name: str, loader: Callable[[Path], T]) -> T:
    """What `loader` makes of `library(name)`. One that does not load is built anew, in the cache.

    Raises:
        BuildError: if it has to be built and cannot be, or does not load even then.
    """
    group, file = _group(name), build.file_name(name)
    for folder in _existing(group):
        given_up = folder / _GIVEN_UP
        if given_up.exists():
            raise BuildError(f"{given_up.read_text()}; to build it again, remove {folder}")
        try:
            return loader(folder / file)
        except (OSError, ImportError) as error:
            _log.warning("se_fused: %s does not load and is built anew: %s", folder, error)
        if folder.parent != build.PREBUILT:
            shutil.rmtree(folder)
    folder = _new(group)
    try:
        return loader(folder / file)
    except (OSError, ImportError) as error:
        reason = f"{folder / file} was built and does not load: {error}"
        with contextlib.suppress(OSError):  # or every process to come would compile it
            (folder / _GIVEN_UP).write_text(reason)
        raise BuildError(reason) from error


def load_facts() -> ModuleType:
    """The module `se_fused._C`.

    Raises:
        BuildError: if it has to be built and cannot be.
    """
    name = "se_fused._C"
    if name not in sys.modules:
        sys.modules[name] = load("_C", lambda file: _imported(name, file))
    return sys.modules[name]


def _imported(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
