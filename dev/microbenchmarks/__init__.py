"""Microbenchmarks of bulk copies and pushes for future cluster kernels. Each result is checked."""

from __future__ import annotations

import ctypes
import functools
import itertools
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from se_fused.native import gpus, recipe, toolchain

SOURCE = Path(__file__).with_name("microbenchmarks.cu")
LARGEST_COUNT, LARGEST_CHUNKS = 256, 8  # kThreads and kWarps of csrc
Row = tuple[str, str, float, str]  # a row of run.json: microbenchmark, of what, value, unit
Timer = Callable[[Callable[[], None]], float]  # returns the microseconds of one call on the GPU


class Failed(RuntimeError):
    """A microbenchmark cannot be compiled, does not run, or gives a wrong result."""


def compile_microbenchmarks(folder: Path) -> Path:
    """Compile the library for the GPU of this machine. Raises Failed, BuildError."""
    library = folder / "libmicrobenchmarks.so"
    command = [
        toolchain.nvcc(),
        *recipe.NVCC_FLAGS,
        *gpus.architecture_flags(),
        "-shared",
        str(SOURCE),
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(done.stderr[-2000:])
    return library


class Microbenchmarks:
    """The loaded library. A call raises Failed with the error of the device."""

    def __init__(self, library: Path) -> None:
        native = ctypes.CDLL(str(library))
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self._exchange, self._stage = native.microbenchmark_exchange, native.microbenchmark_stage
        self._exchange.argtypes = [number, pointer, *[number] * 4, pointer]
        self._stage.argtypes = [number, pointer, pointer, *[number] * 3, pointer]
        self._exchange.restype = self._stage.restype = ctypes.c_char_p

    def exchange(self, out: Tensor, size: int, rounds: int, *, by_push: bool) -> None:
        """out [blocks, count] float32: the sums of `rounds` exchanges in clusters of `size` blocks."""
        _raise(self._exchange(by_push, out.data_ptr(), len(out), size, out.shape[1], rounds, _stream(out)))

    def stage(self, source: Tensor, out: Tensor, *, chunks: int) -> None:
        """out [blocks]: sums of the rows of source [blocks, n], float32, copied by threads or in `chunks` pieces."""
        blocks, n = source.shape
        _raise(self._stage(chunks > 0, source.data_ptr(), out.data_ptr(), blocks, 4 * n, chunks, _stream(out)))


def _raise(error: bytes | None) -> None:
    if error is not None:
        raise Failed(error.decode())


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream().cuda_stream if t.is_cuda else 0


def sums_of_exchange(blocks: int, count: int, size: int, rounds: int) -> Tensor:
    """The values that `exchange` must write to out."""
    rank, i, round_ = torch.meshgrid(torch.arange(size), torch.arange(count), torch.arange(rounds), indexing="ij")
    return ((rank + 1) * (i % 7) + round_ % 5).sum((0, 2)).float().expand(blocks, count)


def measure(library: Microbenchmarks, us_of: Timer, clusters: Mapping[int, int], shared_bytes: int) -> Iterator[Row]:
    """Check and time every microbenchmark. A GPU without clusters of several blocks has no rows.

    clusters: by size, the number of clusters that the GPU can run at once. shared_bytes: shared memory per block.
    Raises Failed.
    """
    several = {size: resident for size, resident in clusters.items() if size > 1 and resident > 0}
    if several:
        yield from _exchanges(library, us_of, several)
        yield from _staging(library, us_of, shared_bytes)


def _exchanges(library: Microbenchmarks, us_of: Timer, clusters: Mapping[int, int]) -> Iterator[Row]:
    """The time of one exchange, while all clusters run at once: the time that each of 64 more adds to a launch."""
    for (size, resident), count in itertools.product(clusters.items(), (16, 64, LARGEST_COUNT)):
        out = torch.empty(resident * size, count, device="cuda")
        for name, by_push in (("exchange by barrier", False), ("exchange by push", True)):
            what, times = f"{size} blocks, {count} numbers", []
            for rounds in (1, 65):
                call = functools.partial(library.exchange, out, size, rounds, by_push=by_push)
                call()
                if not torch.equal(out.cpu(), sums_of_exchange(*out.shape, size, rounds)):
                    raise Failed(f"{name}, {what}: wrong sums")
                times.append(us_of(call))
            yield name, what, (times[1] - times[0]) / 64, "us"


def _staging(library: Microbenchmarks, us_of: Timer, shared_bytes: int) -> Iterator[Row]:
    """Stage 256 MB, more than any cache holds, in shared memory."""
    for kilobytes in (16, 64, 96, 200):
        if (kilobytes + 1) << 10 > shared_bytes:
            continue
        source = torch.randn((256 << 10) // kilobytes, kilobytes << 8, device="cuda")
        out, expected = torch.empty(len(source), device="cuda"), source.double().sum(1)
        for chunks in (0, 1, 2, 4, LARGEST_CHUNKS):
            name = f"staged tile by {chunks} bulk copies" if chunks else "staged tile by threads"
            call = functools.partial(library.stage, source, out, chunks=chunks)
            call()
            if not torch.allclose(out.double(), expected, rtol=0, atol=1e-2):
                raise Failed(f"{name}, {kilobytes} KB: wrong sums")
            yield name, f"{kilobytes} KB per block", source.nbytes / us_of(call) / 1e3, "GB/s"
