"""That tests/cuda_on_cpu can fail: planted faults, each of which it must catch, and how."""

import re
import subprocess

import cuda_on_cpu
import pytest
from cuda_on_cpu import probe

# Name: file under csrc/cuda, what stands there once, what replaces it, what must be said.
FAULTS = {
    "a missing barrier": (
        "reduce.cuh",
        "  __syncthreads();\n  const int columns = V * lanes;",
        "  const int columns = V * lanes;",
        "elements differ by more than",
    ),
    "a divergent barrier": (
        "reduce.cuh",
        "  __syncthreads();\n  const int columns = V * lanes;",
        "  if (threadIdx.x < 64) {\n    __syncthreads();\n  } else {\n    __syncthreads();\n  }\n"
        "  const int columns = V * lanes;",
        "divergent barrier: threads wait at lines",
    ),
    "a barrier that not all threads reach": (
        "reduce.cuh",
        "warps[lane / kWarp] = part;\n    __syncthreads();\n",
        "warps[lane / kWarp] = part;\n    if (lane >= kWarp) return part;\n    __syncthreads();\n",
        "deadlock: .*has ended",
    ),
    "a wrong tail": (
        "elementwise.cuh",
        "threadIdx.x; e < size - vectors * V; e += kThreads) {",
        "threadIdx.x; e + 1 < size - vectors * V; e += kThreads) {",
        "bytes of maps read and .* written, where the plan says",
    ),
    "a wrong shuffle mask": ("device.cuh", "0xffffffffu", "0x0000ffffu", "mask leaves out its own lane"),
    "an unwritten output": (
        "forward_two_pass.cu",
        "if (f.p2 && share.owns(i)) store_one(",
        "if (f.p2 && i > 0 && share.owns(i)) store_one(",
        "elements differ by more than",
    ),
    "an out-of-bounds read": ("reduce.cuh", "at < end; at += groups", "at <= end; at += groups", "out of bounds, near"),
    "a misaligned access": ("elementwise.cuh", "(V - first % V) % V", "(V - first % V) % V + 1", "not aligned"),
    "a partial result left out": (
        "forward_two_pass.cu",
        "for (int split = 0; split < splits; ++split) {",
        "for (int split = 1; split < splits; ++split) {",
        "elements differ by more than",
    ),
    # The stand-in has no atomic addition of floats, so that none can enter.
    "a float atomic": (
        "forward_two_pass.cu",
        "if (sums) store_one(sums + at, p.sum);",
        "if (sums) atomicAdd(sums + at, p.sum);",
        "atomicAdd",
    ),
    "a missing barrier of the cluster": (
        "forward_cluster.cu",
        "  cluster.sync();\n  each(depth,",
        "  each(depth,",
        "another block's shared memory before it is known to have started",
    ),
    "a missing barrier of the cluster, later": (
        "backward_cluster.cu",
        "    cluster.sync();\n    for (int i = threadIdx.x; i < f.c;",
        "    for (int i = threadIdx.x; i < f.c;",
        "elements differ by more than",
    ),
    "a block that does not wait for its readers": (
        "forward_cluster.cu",
        "  cluster.wait();\n",
        "",
        "an end without a wait at the cluster's last barrier",
    ),
    "a copy that is not waited for": (
        "cluster.cuh",
        "  __pipeline_wait_prior(0);\n",
        "",
        "elements differ by more than",
    ),
    "a slab that overlaps": (
        "backward_cluster.cu",
        "free += residence.slab_bytes;",
        "free += residence.slab_bytes - 64;",
        "elements differ by more than",
    ),
    "samples whose slabs overlap": (
        "forward_cluster.cu",
        "memory + b * residence.slab_bytes",
        "memory + b * (residence.slab_bytes - 64)",
        "elements differ by more than",
    ),
    "a sample after the last": (
        "forward_cluster.cu",
        "kS == 1 || f.n - n0 > kS ? kS : static_cast<int>(f.n - n0)",
        "kS",
        "a read of .* out of bounds, near x",
    ),
    "a share of a position that is packed too far apart": (
        "cluster.cuh",
        "return e - by_c.divide(e) * others;",
        "return e - by_c.divide(e) * (others - 4);",
        "a copy to outside shared memory|elements differ by more than",
    ),
    "a peer left out": (
        "cluster.cuh",
        "for (int peer = 1; peer < cluster.size; ++peer) sum +=",
        "for (int peer = 2; peer < cluster.size; ++peer) sum +=",
        "elements differ by more than",
    ),
    "a map read twice": (
        "forward_cluster.cu",
        "scale<T>(f, squeeze.x, place.at, along);",
        "(void)squeeze; scale<T>(f, Streamed<T>{static_cast<const T*>(f.x)}, place.at, along);",
        "bytes of maps read and .* written, where the plan says",
    ),
}


def test_without_a_fault_nothing_is_said():
    well, said = cuda_on_cpu.run_apart(probe.main, cuda_on_cpu.library())
    assert well, said


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, tmp_path):
    file, old, new, message = FAULTS[name]
    cuda_on_cpu.patched(tmp_path, f"csrc/cuda/{file}", old, new)
    kept = cuda_on_cpu.objects(but=f"csrc/cuda/{file}")
    try:
        library = cuda_on_cpu.compile_library(tmp_path, tmp_path / "build", kept, "-O0")
    except subprocess.CalledProcessError as error:
        said = error.output
    else:
        well, said = cuda_on_cpu.run_apart(probe.main, library)
        assert not well, "the fault went unnoticed"
    assert re.search(message, said), said[-3000:]
