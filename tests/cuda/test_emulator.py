"""What dev/emulator checks besides results: bank conflicts, stale reads, and too much shared memory."""

import re
from pathlib import Path

import pytest
import torch
from cases import Case, assert_close, call, truth
from gradients import compare

import se_fused
from dev import emulator

# For reads of the staged tile in float16, by layout, side and channels: the measured wavefronts per wavefront of the
# minimum. Rows of 49 or 196 elements are not a multiple of 16 bytes, so the rows that a warp reduces side by side use
# the same banks.
WAVEFRONTS = {
    ("contiguous", 7, 512): 1.628,
    ("contiguous", 14, 256): 1.458,
    ("contiguous", 28, 128): 1,
    ("contiguous", 56, 64): 1,
    ("channels_last", 7, 512): 1,
    ("channels_last", 14, 256): 1,
    ("channels_last", 28, 128): 1,
    ("channels_last", 56, 64): 1,
}


def hold_wavefronts(path: Path) -> None:
    library = emulator.Library(path)
    library.setup("H200", "cluster")
    with library.forced(), torch.no_grad():
        for (layout, side, c), most in WAVEFRONTS.items():
            case = Case(n=1, c=c, r=c // 16, spatial=(side, side), dtype=torch.float16, layout=layout)
            call(se_fused.squeeze_excite, case.tensors(), case.options)
            assert "cluster forward" in library.last_plan()
            taken, least = library.wavefronts(2)
            assert taken >= least > 0
            assert taken <= most * least, f"{layout} {side}: {taken / least:.3f} wavefronts for each of {least}"
            taken, least = library.wavefronts(4)  # the vectors of the layers
            assert taken == least > 0, f"{layout} {side}: {taken} wavefronts of the layers, which need {least}"


def run_kernels(path: Path) -> None:
    """Run in place, in two passes and in clusters, and backward."""
    library = emulator.Library(path)
    case = Case(n=2, c=48, r=8, spatial=(6, 6))
    with library.forced():
        for plan in ("two_pass fused_hidden=0", "cluster size=2"):
            library.setup("H200", plan)
            tensors = case.tensors()
            expected = truth(tensors, case.options)
            with torch.no_grad():
                y = call(se_fused.squeeze_excite, tensors, case.options, inplace=True)
            assert_close(y, expected, case.dtype)
            compare(case)


def test_the_kernels_read_shared_memory_without_more_conflicts():
    well, said = emulator.run_apart(hold_wavefronts, emulator.library())
    assert well, said


def test_without_a_fault_there_is_no_message():
    well, said = emulator.run_apart(run_kernels, emulator.library())
    assert well, said


# By name: the calls, the file under csrc, a text that it has once, its replacement, and the message that must appear.
FAULTS = {
    "vectors read element by element": (
        hold_wavefronts,
        "cuda/device.cuh",
        "  return {emulator::read_shared(raw, sizeof(T))};",
        "  T elements[V];\n"
        "  for (int i = 0; i < V; ++i) elements[i] = emulator::read_shared(p + i, sizeof(T));\n"
        "  Vector<V, T> read{};\n"
        "  memcpy(&read.raw, elements, sizeof(elements));\n"
        "  (void)raw;\n"
        "  return read;",
        r"contiguous 7: \d\.\d+ wavefronts for each of",
    ),
    "a misaligned vector": (
        run_kernels,
        "cuda/forward_cluster.cu",
        "*h = work + at.whole,",
        "*h = work + at.whole + 1,",
        "a read of .* bytes that is not aligned to them",
    ),
    "a vector outside shared memory": (
        run_kernels,
        "cuda/forward_cluster.cu",
        "own, depth, h, 0,",
        "own, depth, h + (64 << 10), 0,",
        "a read of .* bytes outside shared memory",
    ),
    "a map read where it is written, by the read-only path": (
        run_kernels,
        "cuda/forward_two_pass.cu",
        "Streamed<T>",
        "Global<T>",
        "the launch writes what it reads by the read-only path, in x",
    ),
    "more shared memory than a kernel is allowed": (
        run_kernels,
        "plan/two_pass.cpp",
        "(kSamples * (kGemvChunk + kColumns)",
        "(kSamples * (3 * kGemvChunk + kColumns)",
        "kernel backward_hidden: invalid argument",
    ),
    "a barrier that makes no writes visible before another block reads": (
        run_kernels,
        "cuda/forward_cluster.cu",
        "cluster.sync();",
        "cluster.arrive();\n  cluster.wait();",
        "after a barrier of the cluster that publishes nothing",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, tmp_path):
    calls, file, old, new, message = FAULTS[name]
    emulator.patched(tmp_path, f"csrc/{file}", old, new)
    kept = emulator.objects(but=f"csrc/{file}")
    library = emulator.compile_library(tmp_path, tmp_path / "build", kept, "-O0")
    well, said = emulator.run_apart(calls, library)
    assert not well, "the fault went unnoticed"
    assert re.search(message, said), said[-3000:]
