"""Damaged builds, each damaged in its own way, are not loaded but built anew."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from installation import BUILT, LIBRARY, MODULE, cut, of_another_torch

from se_fused.native import manifest


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
        f"{LIBRARY} is not a regular file",
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


def test_a_build_json_that_does_not_name_the_library_is_damage(place):
    folder = place.build_in(place.cache)
    facts = manifest.read(folder)
    del facts["files"][LIBRARY]
    (folder / manifest.NAME).write_text(json.dumps(facts))
    cut(folder / LIBRARY)
    served, said = place.use()
    assert served == "cpu"
    assert f"build.json does not name {LIBRARY}" in said[0]


def test_a_pipe_in_the_place_of_build_json_is_damage(place):
    folder = place.build_in(place.cache)
    (folder / manifest.NAME).unlink()
    os.mkfifo(folder / manifest.NAME)
    assert place.use()[0] == "cpu"


def test_a_file_where_the_build_would_be_is_replaced(place):
    place.cache.mkdir(mode=0o700)
    (place.cache / BUILT.name).write_text("a file")
    assert place.use()[0] == "cpu"
    assert manifest.damage(place.cache / BUILT.name) is None
