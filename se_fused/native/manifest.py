"""build.json, which every build has: its group and targets, date, compiler, and the SHA-256 of each file.

A truncated library kills the process that maps it (SIGBUS). So each library is checked before it is loaded.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import recipe

NAME = "build.json"


def write(folder: Path, facts: dict[str, Any], files: Iterable[str]) -> None:
    """Write build.json for the finished `files` of `folder`, and wait until the whole folder is on the disk."""
    facts = facts | {
        "built": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in files},
    }
    (folder / NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        _flush(path)
    with contextlib.suppress(OSError):  # some network file systems cannot flush folders
        _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """The contents of build.json. Raises OSError or ValueError if it is missing or names no files."""
    facts = json.loads((folder / NAME).read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict) or not facts["files"]:
        raise ValueError(f"{NAME} names no files")
    return facts


def damage(folder: Path) -> str | None:
    """A description of what is wrong with the build in `folder`; None if every file of its group is as it was built."""
    group = "cuda" if "-" in folder.name else "cpu"
    try:
        if folder.is_symlink():
            return "it is a link"
        if not folder.joinpath(NAME).is_file():
            return f"it has no {NAME}"
        files = read(folder)["files"]
        for name in (recipe.file_name(library) for library in recipe.GROUPS[group]):
            if name not in files:
                return f"{NAME} does not name {name}"
            path, wanted = folder / name, files[name]
            if not stat.S_ISREG(path.lstat().st_mode):
                return f"{name} is not a regular file"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes of {wanted['bytes']}"
            if _sha256(path) != wanted["sha256"]:
                return f"{name} is not as it was built"
    except Exception as error:  # build.json may hold anything
        return f"{type(error).__name__}: {error}"
    return None
