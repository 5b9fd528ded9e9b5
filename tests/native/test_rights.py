"""Caches of others, no home, read-only folders, a full disk: none of them makes the import fail."""

import os
import subprocess

import pytest
from installation import left, one

NOBODY = 54321  # a user whom the system does not know


def test_a_cache_that_others_may_write_to_is_refused(place):
    place.build_in(place.cache)
    place.cache.chmod(0o777)
    served, said = place.use()
    assert served == "reference"
    assert one(said, "other users may write to", "chmod 700")


def test_a_cache_may_be_a_link_to_ones_own_folder(place):
    place.build_in(place.folder / "elsewhere")
    place.cache.symlink_to(place.folder / "elsewhere")
    assert place.use() == ("cpu", [])


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can take another user's place")


@needs_root
@pytest.mark.parametrize("what", ["folder", "link"])
def test_a_cache_of_another_user_is_refused(place, what):
    if what == "folder":
        place.build_in(place.cache)
        os.chown(place.cache, NOBODY, NOBODY)
    else:
        place.build_in(place.folder / "elsewhere")
        place.cache.symlink_to(place.folder / "elsewhere")
        os.chown(place.cache, NOBODY, NOBODY, follow_symlinks=False)
    served, said = place.use()
    assert served == "reference"
    assert one(said, "belongs to another user; SE_FUSED_CACHE names another")


@pytest.fixture
def as_nobody(place):
    """A command that runs another as a user unknown to the system, who may read everything and write little."""
    rights = "-all,+dac_read_search"  # this Python may lie in a folder that only root can read
    command = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no other user's place can be taken: {error}")
    for path in (place.folder, *place.folder.parents):
        if "pytest" in str(path) and path.stat().st_mode & 0o005 != 0o005:
            path.chmod(path.stat().st_mode | 0o055)
    return command


def test_a_user_without_a_home(place, as_nobody):
    del place.environment["SE_FUSED_CACHE"]
    for name in ("HOME", "XDG_CACHE_HOME"):
        place.environment.pop(name, None)
    served, said = place.use(as_user=as_nobody)
    assert served == "reference"
    assert one(said, "no cache folder: could not determine the home directory", "SE_FUSED_CACHE names one")


def test_a_home_that_is_read_only(place, as_nobody):
    del place.environment["SE_FUSED_CACHE"]
    place.environment.pop("XDG_CACHE_HOME", None)
    (place.folder / "home").mkdir(mode=0o755)
    place.environment["HOME"] = str(place.folder / "home")
    served, said = place.use(as_user=as_nobody)
    assert served == "reference"
    assert one(said, "no cache folder at", "Permission denied; SE_FUSED_CACHE names another")


def test_a_cache_of_root_that_is_whole_serves_everyone(place, as_nobody):
    place.build_in(place.cache)
    assert place.use(as_user=as_nobody) == ("cpu", [])


def test_site_packages_that_are_read_only_serve(place, as_nobody):
    place.build_in(place.package / "_native")
    place.environment["SE_FUSED_CACHE"] = "/nowhere"
    assert place.use(as_user=as_nobody) == ("cpu", [])


def test_read_only_site_packages_without_libraries_compile_into_the_cache(place, as_nobody):
    place.cache.mkdir(mode=0o700)
    os.chown(place.cache, NOBODY, NOBODY)
    served, said = place.use(as_user=as_nobody)
    assert served == "cpu"
    assert one(said, "compiling the CPU kernels")


def test_a_disk_that_is_full(place):
    place.cache.mkdir(mode=0o700)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", place.cache], check=False
    ).returncode:
        pytest.skip("a disk of its own needs a mount")
    try:
        served, said = place.use()
        assert served == "reference"
        assert one([line for line in said if "compiling" not in line], "No space left on device")
        assert left(place.cache) == set()
    finally:
        subprocess.run(["umount", place.cache], check=True)
