"""Which build of the native code serves this process: found in the package or the cache, else built; then loaded.

What is there already, whole, and serves is not compiled anew. What is damaged is never loaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from . import build, cache, gpus, manifest, recipe, toolchain
from .progress import Progress
from .toolchain import BuildError

__all__ = ["BuildError", "library", "load", "load_extension", "status"]
_GIVEN_UP = "does_not_load"  # a file in a build that was made here and cannot be loaded
_log = logging.getLogger("se_fused")
T = TypeVar("T")


def _found(parent: Path, group: str, enough: Callable[[Iterable[bool]], bool] = all) -> Path | None:
    """A build of these sources in `parent`; for "cuda", one with code for all, or any, of this machine's GPUs."""
    name = recipe.key(group)
    if group == "cpu":
        return parent / name if (parent / name).is_dir() else None
    here = [gpu for gpu in gpus.here() if gpu >= gpus.OLDEST]
    for folder in sorted(parent.glob(f"{name}-*")):
        if folder.is_dir() and enough(gpus.runs_on(folder.name.split("-")[1:], gpu) for gpu in here):
            return folder
    return None


def _existing(group: str) -> Iterator[Path]:
    """The builds that serve this machine and are whole: in the package, in the cache."""
    places: list[Callable[[], Path]] = [lambda: build.PREBUILT, cache.folder]
    for place in places:
        try:
            parent = place()
        except BuildError:  # no cache folder
            continue
        try:
            folder = _found(parent, group)
        except OSError as error:
            _log.warning("se_fused: %s is not used: %s", parent, error)
            continue
        if folder is None:
            continue
        if manifest.damage(folder) is None:
            yield folder
            continue
        damage = manifest.damage(folder)  # again: another process may just have replaced it
        if damage is not None and folder.is_dir():
            _log.warning("se_fused: %s is damaged and not used: %s", folder, damage)


def _new(group: str, refused: dict[str, Any] | None = None) -> Path:
    """A build made in the cache; where none can be made, a packaged one that serves some of this machine's GPUs."""
    try:
        with Progress(group) as progress:
            return build.build(cache.folder(), group, progress, refused)
    except BuildError:
        packaged = _found(build.PREBUILT, group, any) if group == "cuda" else None
        if packaged is None or refused is not None or manifest.damage(packaged) is not None:
            raise
        return packaged


def _group(library: str) -> str:
    (group,) = (group for group, libraries in recipe.GROUPS.items() if library in libraries)
    return group


def library(name: str) -> Path:
    """The shared library "cpu" or "cuda" or "_C" (the Python module), built if need be.

    Raises:
        BuildError: if it has to be built and cannot be.
    """
    group = _group(name)
    return (next(_existing(group), None) or _new(group)) / recipe.file_name(name)


def load(name: str, loader: Callable[[Path], T]) -> T:
    """What `loader` makes of `library(name)`. One that does not load is built anew, in the cache, once.

    Raises:
        BuildError: if it has to be built and cannot be, or does not load even then.
    """
    group, file, refused = _group(name), recipe.file_name(name), None
    for folder in _existing(group):
        try:
            return loader(folder / file)
        except (OSError, ImportError) as error:
            if _given_up(folder):
                raise BuildError(_does_not_load(folder, error)) from error
            _log.warning("se_fused: %s does not load and is built anew: %s", folder, error.__cause__ or error)
            with contextlib.suppress(OSError, ValueError):  # another process has removed it
                refused = manifest.read(folder)
    folder = _new(group, refused)
    try:
        return loader(folder / file)
    except (OSError, ImportError) as error:
        with contextlib.suppress(OSError):  # else every process to come compiles it
            (folder / _GIVEN_UP).write_text(str(error.__cause__ or error), encoding="utf-8")
        raise BuildError(_does_not_load(folder, error)) from error


def _does_not_load(folder: Path, error: Exception) -> str:
    reason = str(error.__cause__ or error)
    hint = ", as where its disk is mounted noexec; SE_FUSED_CACHE names another" if "failed to map" in reason else ""
    return f"{folder} was built and does not load: {reason}{hint}; to build it again, remove it"


def _given_up(folder: Path) -> str | None:
    """Why a build did not load that was made here; None if it did, or was not tried."""
    try:
        return (folder / _GIVEN_UP).read_text(encoding="utf-8", errors="replace") or "it does not load"
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(error)


def load_extension() -> ModuleType:
    """The extension module `se_fused._C`.

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


def status() -> dict[str, Any]:
    """What was built, when, by what and for what, where it lies, and what is wrong with it. Builds nothing."""
    facts: dict[str, Any] = {"builds": [], "others": []}
    places = {"package": build.PREBUILT}
    tools: dict[str, Callable[[], object]] = {
        "cache": cache.folder, "compiler": lambda: " ".join(toolchain.compiler()), "nvcc": toolchain.nvcc,
        "ninja": toolchain.ninja,
    }  # fmt: skip
    for name, tool in tools.items():
        try:
            facts[name] = str(tool())
        except Exception as error:  # whatever is wrong with an installation is to be said here
            facts[name] = str(error)
            continue
        if name == "cache":
            places[name] = Path(facts[name])
    for place, parent in places.items():
        try:
            folders = [path for path in sorted(parent.glob("*")) if re.fullmatch(r"[0-9a-f]{24}(-.*)?", path.name)]
        except OSError as error:
            facts["builds"].append({"place": place, "folder": str(parent), "problem": str(error)})
            continue
        for folder in folders:
            if _serves_here(folder):
                facts["builds"].append({"place": place, "folder": str(folder)} | _described(folder))
            else:
                facts["others"].append(str(folder))
    return facts


def _serves_here(folder: Path) -> bool:
    """Whether a build is of these sources and flags, for this Python."""
    with contextlib.suppress(BuildError):
        return folder.name.split("-")[0] in {recipe.key(group) for group in recipe.GROUPS}
    return False


def _described(folder: Path) -> dict[str, Any]:
    facts = {"group": "cuda" if "-" in folder.name else "cpu", "problem": manifest.damage(folder) or _given_up(folder)}
    with contextlib.suppress(OSError, ValueError, RecursionError):  # that is its damage
        facts = {**manifest.read(folder), **facts}
    return facts
