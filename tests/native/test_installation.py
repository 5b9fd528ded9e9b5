"""Breaks an installation in many ways, and checks the backend and the message. No way makes the import fail."""

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

import pytest
from installation import BUILT, USE, left, of_another_torch, one, processes

from se_fused.native import build


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


# Builds that fail: the environment, the missing packages, and words of the one line that is printed.
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
def test_a_failed_build_is_one_line_and_the_reference_runs(place, name):
    environment, missing, *words = HOPELESS[name]
    place.environment |= environment
    place.without(*missing)
    output, said = place.use(USE + "from se_fused.__main__ import app; app(['info', '--json'])")
    served, _, facts = output.partition("\n")
    assert served == "reference"
    said = [line for line in said if "compiling the CPU kernels" not in line]
    assert one(said, "se_fused: cpu tensors run on reference PyTorch: ", *words, "(python -m se_fused info)")
    assert all(word in json.loads(facts)["backends"]["cpu"]["cpu"] for word in words)
    if place.cache.exists():
        assert left(place.cache) == set()


def test_a_package_without_sources(place):
    place.build_in(place.package / "_native")
    shutil.rmtree(place.package / "csrc")
    served, said = place.use()
    assert served == "reference"
    assert one(said, "the sources of the native code cannot be read: there is no folder")


@pytest.mark.parametrize("name", ["my site", "a|b", "$HOME", "a:b", "quo'te\"", "a\nb", "ü"])
def test_the_package_may_lie_in_a_folder_of_any_name(place, name):
    site = place.site.rename(place.folder / name)
    code = USE
    if ":" in name:  # PYTHONPATH cannot express such a path
        place.environment["PYTHONPATH"], code = "", f"import sys; sys.path[:0] = [{str(site)!r}]\n{USE}"
    else:
        place.environment["PYTHONPATH"] = str(site)
    served, said = place.use(code, fork=False)
    assert served == "cpu"
    assert one(said, "compiling the CPU kernels")


STRANGE = {
    "stderr is closed": "import os, sys; os.close(2); sys.stderr = None",
    "stderr is stood in for": "import sys\nclass W:\n def write(*_): 0\n def flush(_): 0\nsys.stderr = W()",
    "Python is a part of a program": "import sys; sys.executable = '/bin/true'",
    "there is no executable": "import sys; sys.executable = ''",
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_processes_build_as_others_do(place, name):
    served, _ = place.use(f"{STRANGE[name]}\n{USE}")
    assert served == "cpu"


def test_a_relative_compiler_is_found(place):
    place.environment["CXX"] = "./compiler"
    assert place.use()[0] == "cpu"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_info_shows_paths_as_they_are(place, encoding):
    place.environment |= {
        "SE_FUSED_CACHE": f"{place.folder}/[/red]:smile:ü",
        "PYTHONIOENCODING": encoding,
        "COLUMNS": "500",
    }
    shown, _ = place.use("from se_fused.__main__ import app; app(['info'])", fork=False)
    assert "[/red]:smile:" + ("ü" if encoding == "utf-8" else r"\xfc") in shown


def test_what_killed_builds_left_is_swept(place):
    place.cache.mkdir(mode=0o700)
    for name in ("building-abc123", f"building-{BUILT.name}"):
        (place.cache / name / "deep").mkdir(parents=True)
    assert place.use()[0] == "cpu"
    assert left(place.cache) == {BUILT.name}


@pytest.mark.parametrize("found", ["nothing", "a build that does not load"])
def test_eight_first_imports_at_once_compile_once(place, found):
    if found != "nothing":
        of_another_torch(place.build_in(place.cache))
    place.compiler("sleep 0.2")
    started = [place.start() for _ in range(8)]
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * 8
    assert [output.strip() for output, _ in ended] == ["cpu"] * 8
    assert place.linked() == 1
    said = [line for _, errors in ended for line in errors.splitlines()]
    assert sum("compiling the CPU kernels" in line for line in said) == 1
    expected = ("compiling", "waiting for another process", *["torch_of_tomorrow"] * (found != "nothing"))
    assert all(any(words in line for words in expected) for line in said)


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
    time.sleep(3)  # by now it waits; otherwise it will find what is left
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
    go_on = place.folder / "go_on"
    place.compiler(f"echo started >> {place.log}; while [ ! -e {go_on} ]; do sleep 0.1; done")
    first = place.start()
    wait_for(lambda: "started" in place.log.read_text())
    second = place.start()
    said = second.stderr.readline()
    go_on.touch()
    for process in (first, second):
        process.communicate(timeout=300)
    assert "waiting for another process, which compiles in the same folder" in said


def test_a_compilation_that_takes_too_long_is_ended(place, monkeypatch):
    monkeypatch.setattr(build, "TIMEOUT", 1)
    monkeypatch.setenv("CXX", str(place.compiler("sleep 120")))
    place.cache.mkdir()
    with pytest.raises(build.BuildError, match="compilation took more than 1 s"):
        build.build(place.cache)
    assert left(place.cache) == set()
    wait_for(lambda: not processes(place.cache), 20)


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_on_a_terminal_there_is_a_bar(place, term):
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
    place.environment |= {"TERM": term, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", "import se_fused"], env=place.environment, cwd=place.folder, stderr=theirs, check=True
    )
    os.close(theirs)
    reader.join(20)
    text = b"".join(shown).decode()
    assert done.returncode == 0
    assert "compiling the CPU kernels, once; this usually takes" in text
    assert bool(re.search(r"(\d+) of \1\D", text)) is (term == "xterm")  # the last step of as many
    assert ("\x1b[" in text) is (term == "xterm")
