"""Finds a build of the native code for this process in the package or the cache, or else makes one, and loads it.

A build that is there, undamaged and usable is not compiled again. A damaged one is never loaded.
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
_LOAD_FAILED = "does_not_load"  # a file that marks a build that was made here and does not load
_log = logging.getLogger("se_fused")
T = TypeVar("T")


def _found(parent: Path, group: str, enough: Callable[[Iterable[bool]], bool] = all) -> Path | None:
    """A build of these sources in `parent`, or None. For "cuda", it has code for all of this machine's GPUs, or with
    `enough=any` for one of them."""
    name = recipe.key(group)
    if group == "cpu":
        return parent / name if (parent / name).is_dir() else None
    here = [gpu for gpu in gpus.here() if gpu >= gpus.OLDEST]
    for folder in sorted(parent.glob(f"{name}-*")):
        if folder.is_dir() and enough(gpus.runs_on(folder.name.split("-")[1:], gpu) for gpu in here):
            return folder
    return None


def _usable_builds(group: str) -> Iterator[Path]:
    """The undamaged builds for this machine: first one in the package, then one in the cache."""
    places: list[Callable[[], Path]] = [lambda: build.PREBUILT, cache.folder]
    for place in places:
        try:
            parent = place()
        except BuildError:  # there is no cache folder
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
        damage = manifest.damage(folder)  # checked again, because another process may just have replaced the build
        if damage is not None and folder.is_dir():
            _log.warning("se_fused: %s is damaged and not used: %s", folder, damage)


def _build_in_cache(group: str, refused: dict[str, Any] | None = None) -> Path:
    """Build in the cache and return the folder. If that fails, return a packaged build for some of this machine's GPUs.

    refused: as for `build.build`.

    Raises:
        BuildError: if neither is possible.
    """
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
    """The path of the shared library "cpu", "cuda" or "_C" (the Python module), which is built if necessary.

    Raises:
        BuildError: if it must be built and cannot be.
    """
    group = _group(name)
    return (next(_usable_builds(group), None) or _build_in_cache(group)) / recipe.file_name(name)


def load(name: str, loader: Callable[[Path], T]) -> T:
    """Load `library(name)` with `loader` and return the result. If that fails, build it again in the cache, once.

    Raises:
        BuildError: if the library must be built and cannot be, or if the new build does not load either.
    """
    group, file, refused = _group(name), recipe.file_name(name), None
    for folder in _usable_builds(group):
        try:
            return loader(folder / file)
        except (OSError, ImportError) as error:
            if _load_failure(folder):
                raise BuildError(_does_not_load(folder, error)) from error
            _log.warning("se_fused: %s does not load and is built again: %s", folder, error.__cause__ or error)
            with contextlib.suppress(OSError, ValueError):  # if another process has removed it
                refused = manifest.read(folder)
    folder = _build_in_cache(group, refused)
    try:
        return loader(folder / file)
    except (OSError, ImportError) as error:
        with contextlib.suppress(OSError):  # without this mark, every later process would compile it
            (folder / _LOAD_FAILED).write_text(str(error.__cause__ or error), encoding="utf-8")
        raise BuildError(_does_not_load(folder, error)) from error


def _does_not_load(folder: Path, error: Exception) -> str:
    reason = str(error.__cause__ or error)
    hint = ", as where its disk is mounted noexec; SE_FUSED_CACHE names another" if "failed to map" in reason else ""
    return f"{folder} was built and does not load: {reason}{hint}; to build it again, remove it"


def _load_failure(folder: Path) -> str | None:
    """The reason why a build that was made here did not load; None if it loaded or was never loaded."""
    try:
        return (folder / _LOAD_FAILED).read_text(encoding="utf-8", errors="replace") or "it does not load"
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(error)


def load_extension() -> ModuleType:
    """The extension module `se_fused._C`, which is built if necessary.

    Raises:
        BuildError: if it must be built and cannot be.
    """
    name = "se_fused._C"
    if name not in sys.modules:
        sys.modules[name] = load("_C", lambda file: _import_file(name, file))
    return sys.modules[name]


def _import_file(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def status() -> dict[str, Any]:
    """Describe the tools, and each build: date, compiler, targets, folder, what is wrong with it. Builds nothing."""
    facts: dict[str, Any] = {"builds": [], "others": []}
    places = {"package": build.PREBUILT}
    tools: dict[str, Callable[[], object]] = {
        "cache": cache.folder, "compiler": lambda: " ".join(toolchain.compiler()), "nvcc": toolchain.nvcc,
        "ninja": toolchain.ninja,
    }  # fmt: skip
    for name, tool in tools.items():
        try:
            facts[name] = str(tool())
        except Exception as error:  # an installation may break in any way, and this is the place to report it
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
            if _is_current(folder):
                facts["builds"].append({"place": place, "folder": str(folder)} | _describe(folder))
            else:
                facts["others"].append(str(folder))
    return facts


def _is_current(folder: Path) -> bool:
    """Whether a build was made from these sources and flags, for this Python."""
    with contextlib.suppress(BuildError):
        return folder.name.split("-")[0] in {recipe.key(group) for group in recipe.GROUPS}
    return False


def _describe(folder: Path) -> dict[str, Any]:
    facts = {
        "group": "cuda" if "-" in folder.name else "cpu",
        "problem": manifest.damage(folder) or _load_failure(folder),
    }
    with contextlib.suppress(OSError, ValueError, RecursionError):  # `damage` has reported this
        facts = {**manifest.read(folder), **facts}
    return facts
