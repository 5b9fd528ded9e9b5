"""The CUDA kernels' own sources, compiled by the host's compiler and run thread by thread on the CPU.

`library(...)` builds them; its operators stand in for those of a backend. It checks
indexing, tails, barriers, shuffles, what the blocks of a cluster exchange, determinism, the bytes that move, and bank
conflicts of vectors. It cannot check speed, nor the memory model between blocks.
"""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import torch
from filelock import FileLock
from ninja import BIN_DIR, ninja_syntax

from se_fused.backends import Backend, forcing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEVICE, MICROBENCHMARKS = "dev/emulator", "dev/microbenchmarks"
FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -fno-omit-frame-pointer -Wall -Wextra -Werror "
    "-Wno-unknown-pragmas -Wno-parentheses"
)

# The binding takes torch's own headers beside csrc/torch_c.h: where the two differ it does not compile.
_TORCH = Path(torch.__file__).parent
_TORCH_HEADERS = f"-DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA -isystem {_TORCH / 'include'}"
_TORCH_LIBRARIES = f"-L{_TORCH / 'lib'} -Wl,--no-as-needed -ltorch -ltorch_cpu"


def sources(root: Path) -> list[Path]:
    """Of the kernels, the planner, the device and the microbenchmarks."""
    patterns = ("csrc/cuda/*_*.cu", "csrc/plan/*.cpp", f"{DEVICE}/*.c*", f"{MICROBENCHMARKS}/*.cu")
    return [path for pattern in patterns for path in sorted(root.glob(pattern))]


def compile_library(
    root: Path, output: Path, finished: dict[str, Path] | None = None, optimization: str = "-O1"
) -> Path:
    """The library of the sources under `root`, which is this checkout or a `patched` copy of it.

    finished: objects that are there already, by the name of their source.

    Raises:
        subprocess.CalledProcessError: with the compiler's words in its output.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / "build.ninja").open("w") as file:
        ninja = ninja_syntax.Writer(file, width=10_000)
        flags, finished = os.environ.get("SE_FUSED_CXXFLAGS", ""), finished or {}
        common = f"{FLAGS} $level {flags} -I {root / DEVICE} {_TORCH_HEADERS}"
        ninja.rule("cpp", f"c++ -x c++ {common} -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"c++ -shared {flags} $in -o $out {_TORCH_LIBRARIES}")
        for source in sources(root):
            if source.name not in finished:
                level = "-O2" if source.parent == root / DEVICE else optimization  # the device takes most of the time
                ninja.build(f"{source.stem}.o", "cpp", str(source), variables={"level": level})
        objects = [str(finished.get(source.name, f"{source.stem}.o")) for source in sources(root)]
        ninja.build("libemulator.so", "link", objects)
    command = [str(Path(BIN_DIR) / "ninja"), "-C", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return output / "libemulator.so"


class Library(Backend):
    """The loaded library, as a backend for CPU tensors. There can be only one in a process: it defines operators."""

    name = "emulator"
    has_batch_norm = True

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(path)
        self._native = ctypes.CDLL(str(path))
        self._native.emulator_setup.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64]
        self._native.emulator_choose_fault.argtypes = [ctypes.c_int]
        self._native.emulator_watch.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
        self._native.emulator_plan.restype = ctypes.c_char_p
        self._native.emulator_wide_fraction.restype = ctypes.c_double
        self._native.emulator_wavefronts.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int64)]

    def setup(self, device: str = "T4", plan: str = "", seed: int = 0) -> None:
        """For the calls that follow: the GPU whose limits hold, the forced plan, the seed of the schedule."""
        self._native.emulator_setup(device.encode(), plan.encode(), seed)

    def choose_fault(self, number: int | None) -> None:
        """For the calls that follow, in a library `with_faults`; None: no fault."""
        self._native.emulator_choose_fault(-1 if number is None else number)

    def last_plan(self) -> str:
        """Of the last call."""
        text: bytes = self._native.emulator_plan()
        return text.decode()

    def wide_fraction(self) -> float:
        """The fraction of 16-byte accesses among the last call's accesses to maps."""
        fraction: float = self._native.emulator_wide_fraction()
        return fraction

    def wavefronts(self, element: int) -> tuple[int, int]:
        """Those that a GPU would need for the last call's reads of shared memory by vectors whose elements have so many
        bytes, and the fewest that as many reads can need."""
        counts = (ctypes.c_int64 * 2)()
        self._native.emulator_wavefronts(element, counts)
        return counts[0], counts[1]

    def slept(self) -> dict[int, set[int]]:
        """By block, the nanoseconds that threads of the last call's launches have slept."""
        blocks, ns = (ctypes.c_uint * 4096)(), (ctypes.c_uint * 4096)()
        count = self._native.emulator_slept(blocks, ns, len(ns))
        assert count <= len(ns)
        found: dict[int, set[int]] = {}
        for block, time in zip(blocks[:count], ns[:count], strict=True):
            found.setdefault(block, set()).add(time)
        return found

    def tickets(self, blocks: int) -> torch.Tensor:
        """The order in which blocks took a ticket, by integer atomics (tickets.cu)."""
        tickets, counter = torch.full((blocks,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        self.watch(tickets=tickets, counter=counter)
        self._native.emulator_tickets(ctypes.c_void_p(tickets.data_ptr()), ctypes.c_void_p(counter.data_ptr()), blocks)
        assert counter == blocks
        return tickets

    def watch(self, **buffers: torch.Tensor) -> None:
        """Kernels that no operator launches may touch these and nothing else."""
        self._native.emulator_forget()
        for name, buffer in buffers.items():
            self._native.emulator_watch(name.encode(), buffer.data_ptr(), buffer.nbytes)

    def why_not(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"x is on {device}"

    def forward_out(self, *args: Any) -> None:
        torch.ops.emulator.forward_out.default(*args)

    def backward_out(self, *args: Any) -> None:
        torch.ops.emulator.backward_out.default(*args)

    def batch_norm_out(self, *args: Any) -> None:
        torch.ops.emulator.batch_norm_out.default(*args)

    def scale_shift_out(self, *args: Any) -> None:
        torch.ops.emulator.scale_shift_out.default(*args)

    def forced(self) -> AbstractContextManager[None]:
        """Within: every call on CPU tensors goes to the CUDA kernels."""
        return forcing.force(forcing.Forced(self.name, self))


def _cache() -> Path:
    cache = Path(os.environ.get("SE_FUSED_CACHE") or platformdirs.user_cache_dir("se_fused")) / "emulator"
    cache /= hashlib.sha256(f"{ROOT}{os.environ.get('SE_FUSED_CXXFLAGS')}".encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def library() -> Path:
    """The library of this checkout; ninja compiles what has changed since it was last asked for."""
    cache = _cache()
    with FileLock(cache / "lock"):
        return compile_library(ROOT, cache / "build")


class Fault(NamedTuple):
    """A file has the text `old` once. The part of it between two @, or all of it, is to become `new`; both are an
    expression, or both whole statements."""

    file: str
    old: str
    new: str


def with_faults(faults: Sequence[Fault]) -> Path:
    """One library with all faults, of which `choose_fault` takes one by its number: to compile one library for each of
    50 faults took 6 minutes."""
    kept, root = objects(*{fault.file for fault in faults}), _cache() / "faults"
    with FileLock(_cache() / "lock"):
        texts = {path: _plant(path, faults) for folder in ("csrc", DEVICE, MICROBENCHMARKS) for path in _texts(folder)}
        for path in root.rglob("*.*"):
            if path.suffix in SUFFIXES and path.relative_to(root) not in texts:
                path.unlink()
        for path, text in texts.items():
            if not (to := root / path).exists() or to.read_text() != text:
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_text(text)
        return compile_library(root, root / "build", kept, "-O0")


SUFFIXES = (".h", ".cuh", ".cpp", ".cu")


def _texts(folder: str) -> list[Path]:
    return [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]


def _plant(file: Path, faults: Sequence[Fault]) -> str:
    """The text of a file with its faults; those of one place must have the same part of the text."""
    text, places = (ROOT / file).read_text(), defaultdict[tuple[int, int], list[int]](list)
    for number, fault in enumerate(faults):
        if fault.file == str(file):
            before, part, after = fault.old.split("@") if "@" in fault.old else ("", fault.old, "")
            start = _only(file, text, before + part + after) + len(before)
            places[start, start + len(part)].append(number)
    if not places:
        return text
    next_start = len(text)
    for (start, end), numbers in sorted(places.items(), reverse=True):
        assert end <= next_start, f"{file}: two faults overlap: {text[start:end]}"
        now, next_start = text[start:end], start
        is_statement = now.rstrip().endswith((";", "}"))
        for number in numbers:
            chosen, new = f"::emulator::fault == {number}", faults[number].new
            now = (
                f"if ({chosen}) {{\n{new}\n}} else {{\n{now}\n}}" if is_statement else f"({chosen} ? ({new}) : ({now}))"
            )
        text = text[:start] + now + text[end:]
    return '#include "machine.h"\n' + text


def _only(file: Path | str, text: str, old: str) -> int:
    """Where the text has `old`, which must be there once."""
    assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
    return text.index(old)


def objects(*but: str) -> dict[str, Path]:
    """Those of this checkout's library that depend on none of the files `but`, by the name of their source."""
    built = library().parent
    command = [str(Path(BIN_DIR) / "ninja"), "-C", str(built), "-t", "deps"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needs = {
        stem: set(paths.split()) for stem, paths in re.findall(r"^(\w+)\.o: .*\n((?:    .*\n)+)", listing, re.MULTILINE)
    }
    others = {str(ROOT / file) for file in but}
    return {path.name: built / f"{path.stem}.o" for path in sources(ROOT) if not others & needs[path.stem]}


def patched(root: Path, file: str, old: str, new: str) -> None:
    """A copy of the sources at `root` in which `old`, which must be there once, is `new`."""
    for folder in ("csrc", DEVICE, MICROBENCHMARKS):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = root / file
    text = path.read_text()
    _only(file, text, old)
    path.write_text(text.replace(old, new))


# A process that has loaded torch and is forked for each run: 3 s for each otherwise.
_runs = multiprocessing.get_context("forkserver")
_runs.set_forkserver_preload(["se_fused", "hypothesis", "pytest"])


def run_apart(calls: Callable[[Path], None], library: Path) -> tuple[bool, str]:
    """Whether `calls(library)` ended well in a process of its own, and what it wrote to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = _runs.Process(target=_logged, args=(calls, library, log))
        process.start()
        process.join(600)
        well = process.exitcode == 0  # None, if it has not ended
        process.kill()
        return well, log.read_text()


def _logged(calls: Callable[[Path], None], library: Path, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    calls(library)
