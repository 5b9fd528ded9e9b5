"""The cache folder, where the first import builds what the package does not have.

Environment: SE_FUSED_CACHE, the folder; else the user's own, as platformdirs has it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .toolchain import BuildError


def folder() -> Path:
    """The cache folder, made if need be. Only this user may write to it: what lies there is loaded as code.

    Raises:
        BuildError: in one line, if there is none.
    """
    path = _named()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        link, status = path.lstat(), path.stat()
        path = path.resolve(strict=True)
    except OSError as error:
        raise BuildError(f"no cache folder at {path}: {error.strerror}; SE_FUSED_CACHE names another") from error
    if not {link.st_uid, status.st_uid} <= {0, os.getuid()}:
        raise BuildError(f"{path} belongs to another user; SE_FUSED_CACHE names another cache folder")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"others than this user may write to {path} (chmod 700); SE_FUSED_CACHE names another folder")
    return path


def _named() -> Path:
    named = os.environ.get("SE_FUSED_CACHE")
    try:
        if named:
            return Path(named).expanduser()
        import platformdirs

        path = Path(platformdirs.user_cache_dir("se_fused"))
    except (ImportError, AttributeError) as error:
        raise BuildError("platformdirs is not installed; SE_FUSED_CACHE names a cache folder") from error
    except RuntimeError as error:  # a user without a home
        raise BuildError(f"no cache folder: {error}; SE_FUSED_CACHE names one") from error
    if not path.is_absolute():  # of a user whom the system does not know, "~" stays as it is
        raise BuildError("no cache folder: this user has no home; SE_FUSED_CACHE names one")
    return path
