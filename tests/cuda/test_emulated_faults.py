"""Faults planted in the kernels, each of which dev/emulator must catch with the right message."""

import re
import subprocess

import every_kernel
import pytest

from dev import emulator

PARTS_OF_OTHERS = "  if (f.r) gemv_t<1>(w2.from(c0, 0), own, depth, dp2, 0, work, hidden_part);\n"
# By name: the file under csrc/cuda, a text that it has once, its replacement, and the message that must appear.
FAULTS = {
    "a missing barrier": (
        "reduce.cuh",
        "  __syncthreads();\n  for (int column = thread();",
        "  for (int column = thread();",
        "elements differ by more than",
    ),
    "a divergent barrier": (
        "reduce.cuh",
        "  __syncthreads();\n  for (int column = thread();",
        "  if (threadIdx.x < 64) {\n    __syncthreads();\n  } else {\n    __syncthreads();\n  }\n"
        "  for (int column = thread();",
        "divergent barrier: threads wait at lines",
    ),
    "a barrier that not all threads reach": (
        "reduce.cuh",
        "warps[rank / kWarp] = part;\n    __syncthreads();\n",
        "warps[rank / kWarp] = part;\n    if (rank >= kWarp) return part;\n    __syncthreads();\n",
        "deadlock: .*has ended",
    ),
    "a wrong tail": (
        "elementwise.cuh",
        "threadIdx.x; i < count - vectors * V; i += blockDim.x) {",
        "threadIdx.x; i + 1 < count - vectors * V; i += blockDim.x) {",
        "bytes of maps read and .* written, where the plan says",
    ),
    "a last access past the vectors": (
        "elementwise.cuh",
        "threadIdx.x, vectors, blockDim.x,",
        "threadIdx.x, vectors + 1, blockDim.x,",
        "out of bounds, near|bytes of maps read and .* written, where the plan says",
    ),
    "a last load of a batch left out": (
        "device.cuh",
        "for (int j = 0; j < kAhead - 1; ++j) {\n      if (i + j * step < end) finish(",
        "for (int j = 0; j < kAhead - 1; ++j) {\n      if (i + j * step + 1 < end) finish(",
        "bytes of maps read and .* written, where the plan says",
    ),
    "a wrong shuffle mask": ("device.cuh", "0xffffffffu", "0x0000ffffu", "mask leaves out its own lane"),
    "an unwritten output": (
        "forward_two_pass.cu",
        "if (f.p2 && tile.owns(i)) store_one(",
        "if (f.p2 && i > 0 && tile.owns(i)) store_one(",
        "elements differ by more than",
    ),
    "an out-of-bounds read": (
        "reduce.cuh",
        "begin + rank, end, threads_per_row, parts",
        "begin + rank, end + 1, threads_per_row, parts",
        "out of bounds, near",
    ),
    "a misaligned access": ("elementwise.cuh", "(V - first % V) % V", "(V - first % V) % V + 1", "not aligned"),
    "a partial result left out": (
        "forward_two_pass.cu",
        "merge_splits(sums + first, splits, c,",
        "merge_splits(sums + first, splits - 1, c,",
        "elements differ by more than",
    ),
    "a partial result merged twice": (
        "forward_two_pass.cu",
        "merge_splits(sums + first, splits, c,",
        "merge_splits(sums + first - c, splits + 1, c,",
        "elements differ by more than",
    ),
    "a partial gradient merged twice": (
        "backward.cuh",
        "merge_splits(partial, splits, f.c,",
        "merge_splits(partial - f.c, splits + 1, f.c,",
        "elements differ by more than",
    ),
    # The emulator has no atomic addition of floats, so that no kernel can use one.
    "a float atomic": (
        "forward_two_pass.cu",
        "if (sums) store_one(sums + at, p.sum);",
        "if (sums) atomicAdd(sums + at, p.sum);",
        "atomicAdd",
    ),
    "a missing barrier of the cluster": (
        "forward_cluster.cu",
        "  cluster.sync();\n  for (int k = thread();",
        "  for (int k = thread();",
        "another block's shared memory before it is known to have started",
    ),
    "a missing barrier of the cluster, backward": (
        "backward_cluster.cu",
        "  cluster.sync();\n  for (int k = thread();",
        "  for (int k = thread();",
        "another block's shared memory before it is known to have started",
    ),
    "an exchange before the barrier of the cluster": (
        "backward_cluster.cu",
        PARTS_OF_OTHERS + "  cluster.sync();\n",
        "  cluster.sync();\n" + PARTS_OF_OTHERS,
        "elements differ by more than",
    ),
    "hidden units that are not all there": (
        "forward_cluster.cu",
        "  __syncthreads();\n  cluster.arrive();",
        "  cluster.arrive();",
        "elements differ by more than",
    ),
    "a block that does not wait for its readers": (
        "forward_cluster.cu",
        "  cluster.wait();\n",
        "",
        "an end without a wait at the cluster's last barrier",
    ),
    "a copy that is not waited for": (
        "staged_tile.cuh",
        "  __pipeline_wait_prior(0);\n",
        "",
        "elements differ by more than",
    ),
    "a staged tile that is read before it is there": (
        "forward_cluster.cu",
        "  await_copies();\n",
        "  __syncthreads();\n",
        "elements differ by more than",
    ),
    "a staged tile of gradients that is read before it is there": (
        "backward_cluster.cu",
        "  await_copies();\n",
        "  __syncthreads();\n",
        "elements differ by more than",
    ),
    "staged rows that are read before they are there": (
        "staged_tile.cuh",
        "    await_copies();\n    reduce_tile(tile, staged,",
        "    __syncthreads();\n    reduce_tile(tile, staged,",
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
        "const unsigned e = i < head ? i : i + vectors * V;",
        "const unsigned e = i;",
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
        "    free += staged_bytes;",
        "    free += staged_bytes - 64;",
        "elements differ by more than",
    ),
    "staged rows of which one is left out": (
        "staged_tile.cuh",
        "i0 < tile.channels; i0 += groups.count()) {",
        "i0 < tile.channels - 1; i0 += groups.count()) {",
        "elements differ by more than",
    ),
    "staged rows stored for another channel": (
        "staged_tile.cuh",
        "op.store(tile.n * op.problem().c + tile.c0 + i, 0, part)",
        "op.store(tile.n * op.problem().c + i, 0, part)",
        "elements differ by more than",
    ),
    "channels of a position that are packed too far apart": (
        "elementwise.cuh",
        "position * static_cast<unsigned>(channels) + i}",
        "position * static_cast<unsigned>(channels + 8) + i}",
        "a copy to outside shared memory|elements differ by more than",
    ),
    "a block left out": (
        "cluster.cuh",
        "if (rank0 + j < size) sum +=",
        "if (rank0 + j + 1 < size) sum +=",
        "elements differ by more than",
    ),
    "a map read twice": (
        "forward_cluster.cu",
        "ScaleOperation<T, StagedTile<T>, kPlain, Tile>{f, x, s, tile.c0}",
        "ScaleOperation<T, Streamed<T>, kPlain, Tile>{f, {static_cast<const T*>(f.x)}, s, tile.c0}",
        "bytes of maps read and .* written, where the plan says",
    ),
    "a wrong row where blocks begin at different ones": (
        "gemv.cuh",
        "first + i < rows ? first + i : first + i - rows;",
        "first + i < rows ? first + i : i;",
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
        "          sums[s * columns + j0 + j] = sum;\n        }\n        __syncthreads();\n",
        "          sums[s * columns + j0 + j] = sum;\n        }\n",
        "elements differ by more than",
    ),
    "a prefetch out of bounds": (
        "gemv.cuh",
        "prefetch(data + row * stride + (i < bytes ? i : bytes - 1));",
        "prefetch(data + row * stride + (i < bytes ? i : bytes + (1 << 16)));",
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
        "if constexpr (kRun == W) {",
        "if constexpr (kRun == W || (kRun == W / 2 && W > 2)) {",
        "elements differ by more than",
    ),
    "a gate that begins one run too late": (
        "elementwise.cuh",
        "r + k / kRun * kRun < l ? v[0] : next;",
        "r + k / kRun * kRun <= l ? v[0] : next;",
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
        "from[r + W > l ? i + 1 : i];",
        "from[i];",
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
        "  __syncthreads();\n  tile.for_each_vector(",
        "  tile.for_each_vector(",
        "assert_near",
    ),
    "scale and shift of another tile's channels": (
        "batch_norm.cu",
        "(norm, tile.c0 + i, scale[i], shift[i])",
        "(norm, i, scale[i], shift[i])",
        "assert_near",
    ),
    "an activation left out": (
        "batch_norm.cu",
        "    activate<T>(f.act, Options{}, v);\n    store",
        "    store",
        "assert_near",
    ),
    "channels without scale and shift": (
        "batch_norm.cu",
        "if (channel >= norm.c) return;",
        "if (channel + 1 >= norm.c) return;",
        "assert_near",
    ),
}


def test_without_a_fault_there_is_no_message():
    well, said = emulator.run_apart(every_kernel.main, emulator.library())
    assert well, said


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, tmp_path):
    file, old, new, message = FAULTS[name]
    emulator.patched(tmp_path, f"csrc/cuda/{file}", old, new)
    kept = emulator.objects(but=f"csrc/cuda/{file}")
    try:
        library = emulator.compile_library(tmp_path, tmp_path / "build", kept, "-O0")
    except subprocess.CalledProcessError as error:
        said = error.output
    else:
        well, said = emulator.run_apart(every_kernel.main, library)
        assert not well, "the fault went unnoticed"
    assert re.search(message, said), said[-3000:]
