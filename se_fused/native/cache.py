"""The cache folder, where the first import builds the libraries that the package does not contain.

Environment: SE_FUSED_CACHE is the folder; if it is not set, the folder is the user's cache folder by platformdirs.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .toolchain import BuildError


def folder() -> Path:
    """The cache folder, made if necessary. Only this user may write to it, because its files are loaded as code.

    Raises:
        BuildError: if there is no usable folder. The message is one line.
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
        raise BuildError(f"other users may write to {path} (chmod 700); SE_FUSED_CACHE names another folder")
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
    except RuntimeError as error:  # the user has no home
        raise BuildError(f"no cache folder: {error}; SE_FUSED_CACHE names one") from error
    if not path.is_absolute():  # for a user unknown to the system, "~" is not expanded
        raise BuildError("no cache folder: this user has no home; SE_FUSED_CACHE names one")
    return path
