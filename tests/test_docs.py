"""Prose is executed: the README's Python runs, and every path and name it and the documents mention exists."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import se_fused

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_readmes_python_prints_what_it_says():
    text = (ROOT / "README.md").read_text()
    (program,), (expected,) = code_blocks(text, "python"), code_blocks(text, "text")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(program, "README.md", "exec"), {})
    assert output.getvalue().split() == expected.split()


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
