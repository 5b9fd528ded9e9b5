"""Ways to break an installation, each with what then serves and what is said. The import goes on in all of them."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from installation import BUILT, USE, Installation, left, one, processes

from se_fused.native import build, manifest, recipe

LIBRARY = recipe.file_name("cpu")
MODULE = recipe.file_name("_C")
NOBODY = 54321  # a user whom the system does not know


@pytest.fixture
def place(tmp_path):
    return Installation(tmp_path)


def test_nothing_is_said_where_the_package_has_its_libraries(place):
    place.build_in(place.package / "_native")
    assert place.use() == ("cpu", [])
    assert not place.cache.exists()


def test_a_first_import_compiles_into_the_cache_and_says_so(place):
    served, said = place.use()
    assert served == "cpu"
    assert one(said, "compiling the CPU kernels, once; this usually takes", " s")
    assert left(place.cache) == {BUILT.name}
    assert place.use() == ("cpu", [])
    assert place.linked() == 1


# What cannot be built: the environment, packages that are missing, and words of the one line that is said.
HOPELESS = {
    "no compiler": ({"CXX": "", "PATH": ""}, [], "no C++ compiler: g++ is not on the PATH; install one"),
    "a compiler that is not there": ({"CXX": "c+++"}, [], "no C++ compiler: c+++ is not on the PATH"),
    "a compiler that is no program": ({"CXX": "'c++"}, [], 'CXX is "\'c++": No closing quotation'),
    "a compiler that fails": ({"CXX": "false"}, [], "compilation failed: ", "false gives no reason"),
    "a flag that does not exist": ({"CXX": "c++", "SE_FUSED_CXXFLAGS": "-fno-such"}, [], "error", "-fno-such"),
    "flags that are no words": ({"SE_FUSED_CXXFLAGS": "'-g"}, [], 'SE_FUSED_CXXFLAGS is "\'-g": No closing'),
    "no jobs": ({"MAX_JOBS": "0"}, [], "MAX_JOBS is '0'; wanted a number of 1 or more"),
    "jobs that are no number": ({"MAX_JOBS": "two"}, [], "MAX_JOBS is 'two'"),
    "no ninja": ({}, ["ninja"], "ninja is not installed: pip install ninja"),
    "no pybind11": ({}, ["pybind11"], "pybind11 is not installed: pip install pybind11"),
    "no filelock": ({}, ["filelock"], "filelock is not installed: pip install filelock"),
    "no platformdirs": ({"SE_FUSED_CACHE": ""}, ["platformdirs"], "platformdirs is not installed; SE_FUSED_CACHE"),
    "a cache that is a file": ({"SE_FUSED_CACHE": __file__}, [], "no cache folder", "File exists"),
    "a cache where there can be none": ({"SE_FUSED_CACHE": "/proc/se_fused"}, [], "no cache folder at /proc/se_fused"),
    "no access to the system's files": ({"SE_FUSED_CACHE": "/sys/kernel"}, [], "/sys/kernel"),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_what_cannot_be_built_is_said_in_one_line_and_the_reference_serves(place, name):
    environment, missing, *words = HOPELESS[name]
    place.environment |= environment
    place.without(*missing)
    output, said = place.use(USE + "from se_fused.__main__ import app; app(['info', '--json'])")
    served, _, facts = output.partition("\n")
    assert served == "reference"
    said = [line for line in said if "compiling the CPU kernels" not in line]
    assert one(said, "se_fused: reference PyTorch serves cpu tensors: ", *words, "(python -m se_fused info)")
    assert all(word in json.loads(facts)["backends"]["cpu"]["cpu"] for word in words)
    if place.cache.exists():
        assert left(place.cache) == set()


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def of_another_torch(build_folder: Path) -> None:
    """The library needs a function that this torch has not; build.json is in order."""
    source = build_folder / "other.cpp"
    source.write_text('extern "C" void torch_of_tomorrow(); struct S { S() { torch_of_tomorrow(); } } s;')
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", build_folder / LIBRARY], check=True)
    source.unlink()
    manifest.write(build_folder, {"group": "cpu"}, [LIBRARY, MODULE])


def linked(build_folder: Path) -> None:
    moved = build_folder.rename(build_folder.with_name("elsewhere"))
    build_folder.symlink_to(moved)


DAMAGE = {
    "empty": (lambda folder: (folder / LIBRARY).write_bytes(b""), f"{LIBRARY} has 0 bytes of"),
    "cut in half": (lambda folder: cut(folder / LIBRARY), f"{LIBRARY} has"),
    "the module cut in half": (lambda folder: cut(folder / MODULE), f"{MODULE} has"),
    "random": (
        lambda folder: (folder / LIBRARY).write_bytes(os.urandom((folder / LIBRARY).stat().st_size)),
        f"{LIBRARY} is not as it was built",
    ),
    "missing": (lambda folder: (folder / LIBRARY).unlink(), f"No such file or directory: '.*{LIBRARY}"),
    "a folder": (
        lambda folder: ((folder / LIBRARY).unlink(), (folder / LIBRARY).mkdir()),
        f"{LIBRARY} is no regular file",
    ),
    "without build.json": (lambda folder: (folder / manifest.NAME).unlink(), "it has no build.json"),
    "with half a build.json": (lambda folder: cut(folder / manifest.NAME), "JSONDecodeError"),
    "with a build.json of nothing": (lambda folder: (folder / manifest.NAME).write_text("{}"), "names no files"),
    "empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "it has no build.json"),
    "of another torch": (of_another_torch, "undefined symbol: torch_of_tomorrow"),
    "a link": (linked, "it is a link"),
}


@pytest.mark.parametrize(
    ("name", "where"),
    [*((name, "cache") for name in DAMAGE), *((name, "package") for name in ("cut in half", "of another torch"))],
)
def test_a_damaged_build_is_never_loaded_and_built_anew(place, name, where):
    spoil, words = DAMAGE[name]
    parent = place.cache if where == "cache" else place.package / "_native"
    folder = place.build_in(parent)
    spoil(folder)
    served, said = place.use()
    assert served == "cpu"
    assert any(str(folder) in line for line in said)
    assert any(re.search(words, line) for line in said), said
    assert place.linked() == 1
    assert manifest.damage(place.cache / BUILT.name) is None


def test_a_damaged_package_without_a_compiler_is_served_by_the_reference(place):
    cut(place.build_in(place.package / "_native") / LIBRARY)
    place.environment |= {"CXX": "c+++"}
    served, said = place.use()
    assert served == "reference"
    assert len(said) == 2
    assert "is damaged and not used" in said[0]
    assert "c+++ is not on the PATH" in said[1]


def test_a_file_where_the_build_would_be_is_replaced(place):
    place.cache.mkdir(mode=0o700)
    (place.cache / BUILT.name).write_text("a file")
    assert place.use()[0] == "cpu"
    assert manifest.damage(place.cache / BUILT.name) is None


def test_what_killed_builds_left_is_swept(place):
    place.cache.mkdir(mode=0o700)
    for name in ("building-abc123", f"building-{BUILT.name}"):
        (place.cache / name / "deep").mkdir(parents=True)
    assert place.use()[0] == "cpu"
    assert left(place.cache) == {BUILT.name}


def test_eight_first_imports_at_once_compile_once(place):
    place.compiler("sleep 0.2")
    started = [place.start() for _ in range(8)]
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * 8
    assert [output.strip() for output, _ in ended] == ["cpu"] * 8
    assert place.linked() == 1
    said = [line for _, errors in ended for line in errors.splitlines()]
    assert sum("compiling the CPU kernels" in line for line in said) == 1
    assert all("compiling" in line or "waiting for another process" in line for line in said)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_import_that_is_killed_leaves_no_compiler_and_the_next_builds(place, kill):
    place.compiler(f"echo started >> {place.log}; sleep 120")
    process = place.start()
    wait_for(lambda: "started" in place.log.read_text())
    another = place.start()
    time.sleep(3)  # it waits by now, or will find what is left
    process.send_signal(kill)
    process.communicate(timeout=60)
    assert process.returncode != 0
    place.compiler()
    another.kill()
    another.communicate(timeout=60)
    wait_for(lambda: not processes(place.cache), 20)
    assert place.use()[0] == "cpu"
    assert left(place.cache) == {BUILT.name}


def test_who_waits_for_another_process_says_so(place):
    place.compiler("sleep 1")
    first = place.start()
    wait_for(lambda: place.log.read_text())
    second = place.start()
    _, said = second.communicate(timeout=300)
    first.communicate(timeout=300)
    assert one(said.splitlines(), "waiting for another process, which compiles in the same folder")


def test_a_compilation_that_takes_too_long_is_ended(place, monkeypatch):
    monkeypatch.setattr(build, "_TIMEOUT", 1)
    monkeypatch.setenv("CXX", str(place.compiler("sleep 120")))
    place.cache.mkdir()
    with pytest.raises(build.BuildError, match="compilation took more than 1 s"):
        build.build(place.cache)
    assert left(place.cache) == set()
    wait_for(lambda: not processes(place.cache), 20)


def test_on_a_terminal_there_is_a_bar(place):
    place.compiler("sleep 0.1")
    ours, theirs = pty.openpty()
    shown = []

    def read():
        try:
            while data := os.read(ours, 4096):
                shown.append(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    place.environment |= {"TERM": "xterm", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", "import se_fused"], env=place.environment, cwd=place.folder, stderr=theirs, check=True
    )
    os.close(theirs)
    reader.join(20)
    text = b"".join(shown).decode()
    assert done.returncode == 0
    assert "compiling the CPU kernels, once; this usually takes" in text
    assert " of 16" in text
    assert "\x1b[" in text


# Who may write where.


def test_a_cache_that_others_may_write_to_is_refused(place):
    place.build_in(place.cache)
    place.cache.chmod(0o777)
    served, said = place.use()
    assert served == "reference"
    assert one(said, "others than this user may write to", "chmod 700")


def test_a_cache_that_is_a_link_to_ones_own_folder_serves(place):
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
    """A command that runs another as a user whom the system does not know, who may read all and write little."""
    rights = "-all,+dac_read_search"  # this Python may lie where only root can read
    command = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no other user's place can be taken: {error}")
    for path in (place.folder, *place.folder.parents):
        if path.stat().st_mode & 0o005 != 0o005:
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
    place.cache.mkdir()
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
