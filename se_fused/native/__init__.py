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

__all__ = ["BuildError", "library", "load", "load_facts", "status"]
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
        with contextlib.suppress(BuildError):  # no cache folder
            folder = _found(place(), group)
            damage = None if folder is None else manifest.damage(folder)
            if damage is not None:
                _log.warning("se_fused: %s is damaged and not used: %s", folder, damage)
            elif folder is not None:
                yield folder


def _new(group: str) -> Path:
    """A build made in the cache; where none can be made, a packaged one that serves some of this machine's GPUs."""
    try:
        with Progress(group) as progress:
            return build.build(cache.folder(), group, progress)
    except BuildError:
        packaged = _found(build.PREBUILT, group, any) if group == "cuda" else None
        if packaged is None or manifest.damage(packaged) is not None:
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
    """What `loader` makes of `library(name)`. One that does not load is built anew, in the cache.

    Raises:
        BuildError: if it has to be built and cannot be, or does not load even then.
    """
    group, file = _group(name), recipe.file_name(name)
    for folder in _existing(group):
        given_up = folder / _GIVEN_UP
        if given_up.exists():
            raise BuildError(f"{given_up.read_text()}; to build it again, remove {folder}")
        try:
            return loader(folder / file)
        except (OSError, ImportError) as error:
            _log.warning("se_fused: %s does not load and is built anew: %s", folder, error.__cause__ or error)
        if folder.parent != build.PREBUILT:
            build.remove(folder)
    folder = _new(group)
    try:
        return loader(folder / file)
    except (OSError, ImportError) as error:
        reason = f"{folder / file} was built and does not load: {error.__cause__ or error}"
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


def status() -> dict[str, Any]:
    """What was built, when, by what and for what, where it lies, and what is wrong with it. Builds nothing."""
    facts: dict[str, Any] = {"builds": [], "older": []}
    places = {"package": build.PREBUILT}
    try:
        facts["cache"] = str(cache.folder())
        places["cache"] = cache.folder()
    except BuildError as error:
        facts["cache"] = str(error)
    for place, parent in places.items():
        for folder in sorted(path for path in parent.glob("*") if re.fullmatch(r"[0-9a-f]{24}(-.*)?", path.name)):
            if _is_of_these_sources(folder):
                facts["builds"].append({"place": place, "folder": str(folder)} | _described(folder))
            else:
                facts["older"].append(str(folder))
    for tool in (toolchain.compiler, toolchain.nvcc, toolchain.ninja):
        try:
            found = tool()
            facts[tool.__name__] = found if isinstance(found, str) else " ".join(found)
        except BuildError as error:
            facts[tool.__name__] = str(error)
    return facts


def _is_of_these_sources(folder: Path) -> bool:
    with contextlib.suppress(BuildError):
        return folder.name.split("-")[0] in {recipe.key(group) for group in recipe.GROUPS}
    return False


def _described(folder: Path) -> dict[str, Any]:
    problem = manifest.damage(folder)
    if problem is not None:
        return {"problem": f"it is damaged: {problem}"}
    given_up = folder / _GIVEN_UP
    return {**manifest.read(folder), "problem": given_up.read_text() if given_up.exists() else None}
