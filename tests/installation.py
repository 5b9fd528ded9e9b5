"""An installation for a test: a copy of the package, a cache folder, and a compiler that only copies what is built."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import forked

from se_fused import native
from se_fused.native import manifest, recipe

ROOT = Path(__file__).resolve().parents[1]
LIBRARY, MODULE = (recipe.file_name(library) for library in recipe.GROUPS["cpu"])
BUILT = native.library("cpu").parent
# Prints the backend that runs the call, and fails if the numbers are not the formula's.
USE = """
import torch, se_fused
w1, w2, x = torch.randn(4, 8), torch.randn(8, 4), torch.randn(2, 8, 5, 5)
y = se_fused.squeeze_excite(x, w1, None, w2, None)
torch.testing.assert_close(y, se_fused.reference.squeeze_excite(x, w1, None, w2, None))
print(se_fused.explain(x, w1, None, w2, None).backend)
"""
_CLEARED = ("SE_FUSED", "TORCH_CUDA", "CUDA", "MAX_JOBS")
# A compiler that gives out what was compiled before. It runs `before` first and adds a line to a log at each call.
_COMPILER = """#!/bin/sh
case "$1" in --version) echo "gives what is there 1.0"; exit;; esac
{before}
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2; shift;; -MF) : > "$2"; shift;; esac
  shift
done
echo "$out" >> "{log}"
if [ -f "{built}/$out" ]; then cp "{built}/$out" "$out"; else : > "$out"; fi
"""


@dataclass
class Installation:
    folder: Path

    def __post_init__(self) -> None:
        self.site, self.cache = self.folder / "site", self.folder / "cache"
        self.log = self.folder / "compiled.log"
        self.log.touch()
        self.log.chmod(0o666)
        shutil.copytree(ROOT / "se_fused", self.site / "se_fused", ignore=shutil.ignore_patterns("_native", "*.pyc"))
        shutil.copytree(ROOT / "csrc", self.site / "se_fused" / "csrc")
        self.package = self.site / "se_fused"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_CLEARED)},
            "PYTHONPATH": str(self.site),
            "PYTHONDONTWRITEBYTECODE": "1",
            "SE_FUSED_CACHE": str(self.cache),
            "CXX": str(self.compiler()),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def compiler(self, before: str = "") -> Path:
        """The compiler, which runs a line of shell first."""
        path = self.folder / "compiler"
        path.write_text(_COMPILER.format(before=before, log=self.log, built=BUILT))
        path.chmod(0o755)
        return path

    def linked(self) -> int:
        """How often the library was linked."""
        return self.log.read_text().split().count(recipe.file_name("cpu"))

    def build_in(self, parent: Path) -> Path:
        """Make a complete build, as the builder leaves it."""
        parent.mkdir(mode=0o700, exist_ok=True)
        return Path(shutil.copytree(BUILT, parent / BUILT.name))

    def without(self, *packages: str) -> None:
        """Make packages impossible to import."""
        for name in packages:
            (self.site / f"{name}.py").write_text(f"raise ImportError(name={name!r})\n")

    def start(self, code: str = USE, as_user: Sequence[str] = ()) -> subprocess.Popen[str]:
        command = [*as_user, sys.executable, "-c", code]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True, stdout=pipe, stderr=pipe,
            preexec_fn=_heed_interrupts,
        )  # fmt: skip

    def use(self, code: str = USE, as_user: Sequence[str] = (), fork: bool = True) -> tuple[str, list[str]]:
        """Run a call: the backend, and the lines that were printed. Fails if the program fails.

        fork: of a process that has imported torch, in which Python does not start anew.
        """
        if as_user or not fork:
            process = self.start(code, as_user)
            output, said = process.communicate(timeout=300)
            status = process.returncode
        else:
            status, output, said = forked.run(code, self.folder, self.environment, timeout=300)
        assert status == 0, said
        return output.strip(), said.splitlines()


def _heed_interrupts() -> None:
    """A shell lets what it runs in the background ignore SIGINT, and a new process inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def processes(folder: Path) -> list[str]:
    """The command lines of running processes that name `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # the process has just ended
            continue
        if str(folder) in words:
            found.append(words)
    return found


def left(parent: Path) -> set[str]:
    """The names in a folder of builds, without the lock."""
    return {path.name for path in parent.iterdir()} - {".lock"}


def one(lines: Iterable[str], *words: str) -> bool:
    """Whether there is exactly one line, which contains these words."""
    lines = list(lines)
    return len(lines) == 1 and all(word in lines[0] for word in words)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def of_another_torch(build_folder: Path) -> None:
    """Make the library need a function that this torch lacks; build.json stays in order."""
    source = build_folder / "other.cpp"
    source.write_text('extern "C" void torch_of_tomorrow(); struct S { S() { torch_of_tomorrow(); } } s;')
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", build_folder / LIBRARY], check=True)
    source.unlink()
    manifest.write(build_folder, {"group": "cpu"}, [LIBRARY, MODULE])
