"""Checks the documents: the README's Python runs, and every path and name in them exists."""

import contextlib
import csv
import io
import re
from pathlib import Path

import pytest

import se_fused
from examples import zoo

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_readmes_python_prints_what_it_says():
    zoo.import_torchvision()  # timm's import needs it
    text = (ROOT / "README.md").read_text()
    programs, expected = code_blocks(text, "python"), code_blocks(text, "text")
    assert len(programs) == 3
    output, names = io.StringIO(), {}
    with contextlib.redirect_stdout(output):
        for program in programs:  # in order, as a reader types them
            exec(compile(program, "README.md", "exec"), names)
    assert output.getvalue() == "".join(expected)


@pytest.mark.long
def test_the_examples_of_coverage_print_what_they_say():
    zoo.import_torchvision()
    text = (ROOT / "docs" / "coverage.md").read_text()
    output, names = io.StringIO(), {}
    with contextlib.redirect_stdout(output):
        for program in code_blocks(text, "python"):
            exec(compile(program, "coverage.md", "exec"), names)
    assert output.getvalue() == "".join(code_blocks(text, "text"))


def minor(version: str) -> str:
    """The minor version: 3.11 for 3.11.7, 2.13 for 2.13.0+cpu."""
    return ".".join(version.split(".")[:2])


def test_the_versions_that_were_tried_are_those_of_the_record():
    text = (ROOT / "docs" / "installing.md").read_text()
    table = re.search(r"^\| Python \| torch .*?\n\n", text, re.DOTALL | re.MULTILINE)[0]
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines())
    torches = [cell.removeprefix("torch ") for cell in header[1:]]
    claimed = {(row[0], torch): cell for row in rows for torch, cell in zip(torches, row[1:], strict=True)}
    with (ROOT / "docs" / "versions.csv").open(newline="") as file:
        last = {(minor(line["python"]), minor(line["torch"])): line for line in csv.DictReader(file)}
    assert {pair for pair, cell in claimed.items() if cell == "yes"} == set(last)
    assert set(claimed.values()) == {"yes", "not tried"}
    assert all(line["failed"] == "0" and int(line["passed"]) > 800 for line in last.values())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_exists(name):
    text = (ROOT / name).read_text()
    paths = set(re.findall(r"\]\((?!http)([^)#]+)\)", text))
    suffixes = (".py", ".h", ".cpp", ".cu", ".cuh", ".csv", ".txt")
    paths |= {p for p in re.findall(r"`([\w./-]+)`", text) if "/" in p or p.endswith(suffixes)}
    folders = (Path(name).parent, "", "se_fused", "csrc", "csrc/cpu", "csrc/cuda")
    assert not [p for p in paths if not any((ROOT / folder / p).exists() for folder in folders)]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_name_exists(name):
    text = (ROOT / name).read_text()
    for dotted in re.findall(r"`se_fused\.([A-Za-z_.]+)", text):
        value = se_fused
        for part in dotted.rstrip(".").split("."):
            value = getattr(value, part)
    for target in re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}\b.*:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
