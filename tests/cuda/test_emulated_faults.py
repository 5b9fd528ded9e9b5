"""Faults planted in the kernels, each of which dev/emulator must catch with the right message."""

import functools
import os
import re
import subprocess

import every_kernel
import pytest
from test_emulator import hold_wavefronts, run_kernels

from dev import emulator

PARTS_OF_OTHERS = "if (f.r) gemv_t<1>(w2.from(c0, 0), own, depth, dp2, 0, work, hidden_part);\n"
SCALE = "tile.for_each_vector(ScaleOperation<T, {}<T>, kPlain, Tile>{{f, {}, s, tile.c0}});"
MAP = "{static_cast<const T*>(f.x)}"
MERGED = "if (kPlain || sums) merge_splits(sums + first, splits, c, [&](A sum) { part.sum += sum; });"
# By name: the file under csrc/cuda, a text that it has once, the replacement of the part between two @ (dev/emulator),
# the message that must appear, and the calls, if they are not those of every_kernel.
FAULTS = {
    "a missing barrier": (
        "reduce.cuh",
        "@__syncthreads();@\n  for (int column = thread();",
        "",
        "elements differ by more than",
    ),
    "a divergent barrier": (
        "reduce.cuh",
        "@__syncthreads();@\n  for (int column = thread();",
        "  if (threadIdx.x < 64) {\n    __syncthreads();\n  } else {\n    __syncthreads();\n  }",
        "divergent barrier: threads wait at lines",
    ),
    "a barrier that not all threads reach": (
        "reduce.cuh",
        "warps[rank / kWarp] = part;\n    @__syncthreads();@\n",
        "if (rank >= kWarp) return part;\n    __syncthreads();",
        "deadlock: .*has ended",
    ),
    "a wrong tail": (
        "elementwise.cuh",
        "threadIdx.x; @i < count - vectors * V@; i += blockDim.x) {",
        "i + 1 < count - vectors * V",
        "bytes of maps read and .* written, where the plan says",
    ),
    "a last access past the vectors": (
        "elementwise.cuh",
        "threadIdx.x, @vectors@, blockDim.x,",
        "vectors + 1",
        "out of bounds, near|bytes of maps read and .* written, where the plan says",
    ),
    "a last load of a batch left out": (
        "device.cuh",
        "for (int j = 0; j < kAhead - 1; ++j) {\n      if (@i + j * step < end@) finish(",
        "i + j * step + 1 < end",
        "bytes of maps read and .* written, where the plan says",
    ),
    "a wrong shuffle mask": ("device.cuh", "0xffffffffu", "0x0000ffffu", "mask leaves out its own lane"),
    "an unwritten output": (
        "forward_two_pass.cu",
        "if (@f.p2 && tile.owns(i)@) store_one(",
        "f.p2 && i > 0 && tile.owns(i)",
        "elements differ by more than",
    ),
    "an out-of-bounds read": (
        "reduce.cuh",
        "begin + rank, @end@, threads_per_row, parts",
        "end + 1",
        "out of bounds, near",
    ),
    "a misaligned access": ("elementwise.cuh", "(V - first % V) % V", "(V - first % V) % V + 1", "not aligned"),
    "a partial result left out": (
        "forward_two_pass.cu",
        MERGED,
        MERGED.replace("splits,", "splits - 1,"),
        "elements differ by more than",
    ),
    "a partial result merged twice": (
        "forward_two_pass.cu",
        MERGED,
        MERGED.replace("first, splits,", "first - c, splits + 1,"),
        "elements differ by more than",
    ),
    "a partial gradient merged twice": (
        "backward.cuh",
        "merge_splits(partial, splits, f.c, [&](A other) { sum += other; });",
        "merge_splits(partial - f.c, splits + 1, f.c, [&](A other) { sum += other; });",
        "elements differ by more than",
    ),
    "a missing barrier of the cluster": (
        "forward_cluster.cu",
        "cluster.sync();",
        "",
        "another block's shared memory before it is known to have started",
    ),
    "a missing barrier of the cluster, backward": (
        "backward_cluster.cu",
        PARTS_OF_OTHERS + "  cluster.sync();",
        PARTS_OF_OTHERS,
        "another block's shared memory before it is known to have started",
    ),
    "an exchange before the barrier of the cluster": (
        "backward_cluster.cu",
        PARTS_OF_OTHERS + "  cluster.sync();",
        "  cluster.sync();\n" + PARTS_OF_OTHERS,
        "elements differ by more than",
    ),
    "a missing barrier where a cluster is one block": (
        "cluster.cuh",
        "if (size == 1) return __syncthreads();",
        "if (size == 1) return;",
        "elements differ by more than",
    ),
    "hidden units that are not all there": (
        "forward_cluster.cu",
        "@__syncthreads();@\n  cluster.arrive();",
        "",
        "elements differ by more than",
    ),
    "a block that does not wait for its readers": (
        "forward_cluster.cu",
        "cluster.wait();",
        "",
        "an end without a wait at the cluster's last barrier",
    ),
    "a copy that is not waited for": (
        "staged_tile.cuh",
        "__pipeline_wait_prior(0);",
        "",
        "elements differ by more than",
    ),
    "a staged tile that is read before it is there": (
        "forward_cluster.cu",
        "await_copies();",
        "__syncthreads();",
        "elements differ by more than",
    ),
    "a staged tile of gradients that is read before it is there": (
        "backward_cluster.cu",
        "await_copies();",
        "__syncthreads();",
        "elements differ by more than",
    ),
    "staged rows that are read before they are there": (
        "staged_tile.cuh",
        "@await_copies();@\n    reduce_tile(tile, staged,",
        "__syncthreads();",
        "elements differ by more than",
    ),
    "a staged tile without the remainder of its address": (
        "staged_tile.cuh",
        "tile.wide ? tile.first % V : 0",
        "0",
        "not aligned|elements differ by more than",
    ),
    "a staged tile without what lies after its vectors": (
        "staged_tile.cuh",
        "i < head ? i : i + vectors * V",
        "i",
        "elements differ by more than",
    ),
    "a staged tile that overlaps the next": (
        "backward_cluster.cu",
        "free += config.staged_bytes;",
        "free += config.staged_bytes - 64;",
        "elements differ by more than",
    ),
    "staged rows that overlap the next map": (
        "staged_tile.cuh",
        "free += staged_bytes;",
        "free += staged_bytes - 64;",
        "elements differ by more than",
    ),
    "staged rows of which one is left out": (
        "staged_tile.cuh",
        "@i0 < tile.channels@; i0 += groups.count()) {",
        "i0 < tile.channels - 1",
        "elements differ by more than",
    ),
    "staged rows stored for another channel": (
        "staged_tile.cuh",
        "op.store(@tile.n * op.problem().c + tile.c0 + i@, 0, part)",
        "tile.n * op.problem().c + i",
        "elements differ by more than",
    ),
    "channels of a position that are packed too far apart": (
        "elementwise.cuh",
        "position * static_cast<unsigned>(@channels@) + i}",
        "channels + 8",
        "a copy to outside shared memory|elements differ by more than",
    ),
    "a block left out": (
        "cluster.cuh",
        "if (@rank0 + j < size@) sum +=",
        "rank0 + j + 1 < size",
        "elements differ by more than",
    ),
    "a map read twice": (
        "forward_cluster.cu",
        SCALE.format("StagedTile", "x"),
        SCALE.format("Streamed", MAP),
        "bytes of maps read and .* written, where the plan says",
    ),
    "a wrong row where blocks begin at different ones": (
        "gemv.cuh",
        "first + i < rows ? first + i : first + i - rows",
        "first + i < rows ? first + i : i",
        "elements differ by more than",
    ),
    "a sum that is not added to what is there": (
        "gemv.cuh",
        "sum = more ? sum + partial[s] : partial[s];",
        "sum = more ? partial[s] : partial[s];",
        "elements differ by more than",
    ),
    "sums over the warps that are not all there": (
        "gemv.cuh",
        "sums[s * columns + j0 + j] = sum;\n        }\n        @__syncthreads();@\n",
        "",
        "elements differ by more than",
    ),
    "a prefetch out of bounds": (
        "gemv.cuh",
        "i < bytes ? i : bytes - 1",
        "i < bytes ? i : bytes + (1 << 16)",
        "out of bounds",
    ),
    "a bias of the hidden layer that is not added": (
        "forward_cluster.cu",
        "h[k] = bias<T>(f.b1, f.weight_dtype, k);",
        "h[k] = 0;",
        "elements differ by more than",
    ),
    "a bias of the gates that is not added": (
        "forward_cluster.cu",
        "s[i] = bias<T>(f.b2, f.weight_dtype, tile.c0 + i);",
        "s[i] = 0;",
        "elements differ by more than",
    ),
    "a bias of another block's channel": (
        "forward_cluster.cu",
        "s[i] = bias<T>(f.b2, f.weight_dtype, tile.c0 + i);",
        "s[i] = bias<T>(f.b2, f.weight_dtype, i);",
        "elements differ by more than",
    ),
    "one gate for both halves of an access": (
        "elementwise.cuh",
        "v[0] = from[i];",
        "v[0] = from[i];\n"
        "if constexpr (kRun == W / 2 && W > 2) {\n  for (int k = 1; k < W; ++k) v[k] = v[0];\n  return;\n}",
        "elements differ by more than",
    ),
    "a gate that begins one run too late": (
        "elementwise.cuh",
        "@r + k / kRun * kRun < l@ ? v[0] : next;",
        "r + k / kRun * kRun <= l",
        "elements differ by more than",
    ),
    "a gate that changes between halves of an access only": (
        "elementwise.cuh",
        "for_each_whole_vector<1>(operation, begin, vectors);",
        "for_each_whole_vector<V == 1 ? 1 : V / 2>(operation, begin, vectors);",
        "elements differ by more than",
    ),
    "a next channel that is the same": (
        "elementwise.cuh",
        "from[@r + W > l ? i + 1 : i@];",
        "i",
        "elements differ by more than",
    ),
    "rows shorter than an access of which only the first ends": (
        "elementwise.cuh",
        "if (--left == 0) left = l, ++at;",
        "if (--left == 0) ++at;",
        "elements differ by more than",
    ),
    "scale and shift that are not all there": (
        "batch_norm.cu",
        "@__syncthreads();@\n  tile.for_each_vector(",
        "",
        "assert_near",
    ),
    "scale and shift of another tile's channels": (
        "batch_norm.cu",
        "(norm, @tile.c0 + i@, scale[i], shift[i])",
        "i",
        "assert_near",
    ),
    "an activation left out": (
        "batch_norm.cu",
        "@activate<T>(f.act, Options{}, v);@\n    store",
        "",
        "assert_near",
    ),
    "channels without scale and shift": (
        "batch_norm.cu",
        "channel >= norm.c",
        "channel + 1 >= norm.c",
        "assert_near",
    ),
    "vectors read element by element": (
        "device.cuh",
        "return {emulator::read_shared(raw, sizeof(T))};",
        "  T elements[V];\n"
        "  for (int i = 0; i < V; ++i) elements[i] = emulator::read_shared(p + i, sizeof(T));\n"
        "  Vector<V, T> read{};\n"
        "  memcpy(&read.raw, elements, sizeof(elements));\n"
        "  return read;",
        r"contiguous 7: \d\.\d+ wavefronts for each of",
        hold_wavefronts,
    ),
    "a misaligned vector": (
        "forward_cluster.cu",
        "*h = @work + at.whole@,",
        "work + at.whole + 1",
        "a read of .* bytes that is not aligned to them",
        run_kernels,
    ),
    "a vector outside shared memory": (
        "forward_cluster.cu",
        "own, depth, @h@, 0,",
        "h + (64 << 10)",
        "a read of .* bytes outside shared memory",
        run_kernels,
    ),
    "a map read where it is written, by the read-only path": (
        "forward_two_pass.cu",
        SCALE.format("Streamed", MAP),
        SCALE.format("Global", MAP),
        "the launch writes what it reads by the read-only path, in x",
        run_kernels,
    ),
    "more shared memory than a kernel is allowed": (
        "../plan/two_pass.cpp",
        "(kSamples * (@kGemvChunk@ + kColumns)",
        "3 * kGemvChunk",
        "kernel backward_hidden: invalid argument",
        run_kernels,
    ),
    "a barrier that makes no writes visible before another block reads": (
        "forward_cluster.cu",
        "cluster.sync();",
        "cluster.arrive();\n  cluster.wait();",
        "after a barrier of the cluster that publishes nothing",
        run_kernels,
    ),
}


@pytest.fixture(scope="module")
def faulty():
    """The library that has all faults."""
    return emulator.with_faults(
        [emulator.Fault(os.path.normpath(f"csrc/cuda/{file}"), old, new) for file, old, new, *_ in FAULTS.values()]
    )


def test_without_a_fault_there_is_no_message():
    well, said = emulator.run_apart(every_kernel.main, emulator.library())
    assert well, said


@pytest.mark.parametrize("calls", [every_kernel.main, hold_wavefronts, run_kernels])
def test_no_fault_acts_unless_it_is_chosen(faulty, calls):
    well, said = emulator.run_apart(calls, faulty)
    assert well, said


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(faulty, name):
    *_, message, calls = (*FAULTS[name], every_kernel.main)[:5]
    chosen = functools.partial(calls, fault=list(FAULTS).index(name))
    well, said = emulator.run_apart(chosen, faulty)
    assert not well, "the fault went unnoticed"
    assert re.search(message, said), said[-3000:]


def test_no_kernel_can_add_floats_atomically(tmp_path):
    """Their sum would depend on the order; the emulator has no such function."""
    file = "csrc/cuda/forward_two_pass.cu"
    emulator.patched(tmp_path, file, "if (sums) store_one(sums + at, p.sum);", "if (sums) atomicAdd(sums + at, p.sum);")
    with pytest.raises(subprocess.CalledProcessError) as error:
        emulator.compile_library(tmp_path, tmp_path / "build", emulator.objects(file), "-O0")
    assert "atomicAdd" in error.value.output
