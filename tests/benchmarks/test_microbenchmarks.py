"""The GPU microbenchmarks on the emulator: they are right under any schedule, and each planted fault is caught."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dev import emulator, microbenchmarks
from dev.microbenchmarks import LARGEST_CHUNKS, LARGEST_COUNT


@pytest.fixture(scope="module")
def device():
    library = emulator.library()
    return emulator.Library(library), microbenchmarks.Microbenchmarks(library)


def exchange(device, seed, size, count, rounds, by_push):
    machine, library = device
    out = torch.full((2 * size, count), torch.nan)
    machine.setup(seed=seed)
    machine.watch(out=out)
    library.exchange(out, size, rounds, by_push=by_push)
    assert torch.equal(out, microbenchmarks.sums_of_exchange(*out.shape, size, rounds))


def stage(device, seed, blocks, sixteens, chunks):
    machine, library = device
    source, out = torch.randint(-9, 9, (blocks, 4 * sixteens)).float(), torch.full((blocks,), torch.nan)
    machine.setup(seed=seed)
    machine.watch(source=source, out=out)
    library.stage(source, out, chunks=chunks)
    assert torch.equal(out, source.sum(1))


SEEDS = st.integers(0, 2**32)


@given(SEEDS, st.sampled_from([2, 4, 8]), st.integers(1, LARGEST_COUNT), st.integers(1, 4), st.booleans())
@settings(max_examples=20)
def test_exchanges(device, seed, size, count, rounds, by_push):
    exchange(device, seed, size, count, rounds, by_push)


@given(SEEDS, st.integers(1, 3), st.integers(1, 700), st.integers(0, LARGEST_CHUNKS))
@settings(max_examples=20)
def test_staging(device, seed, blocks, sixteens, chunks):
    stage(device, seed, blocks, max(sixteens, chunks), chunks)


def test_measure_gives_every_row(monkeypatch):
    """Each microbenchmark is called, checked and timed, on a device that computes with PyTorch."""

    class Device:
        def exchange(self, out, size, rounds, *, by_push):
            out.copy_(microbenchmarks.sums_of_exchange(*out.shape, size, rounds))

        def stage(self, source, out, *, chunks):
            out.copy_(source.double().sum(1))

    for name in ("empty", "randn"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, real=real, device: real(*[min(n, 64) for n in size]))
    clusters = {1: 132, 2: 66, 4: 32, 8: 15, 16: 0}
    times = lambda call: 2.0 if call.args[2:] == (65,) else 1.0  # noqa: E731
    rows = list(microbenchmarks.measure(Device(), times, clusters, 100 << 10))
    assert len(rows) == 3 * 3 * 2 + 3 * 5  # no clusters of 16 blocks, no staged tile of 200 KB
    assert ("exchange by push", "8 blocks, 64 numbers", 1 / 64, "us") in rows
    for none in (dict.fromkeys(clusters, 0), dict.fromkeys(clusters, 0) | {1: 108}):
        assert list(microbenchmarks.measure(Device(), lambda call: 1.0, none, 64 << 10)) == []
    monkeypatch.setattr(Device, "exchange", lambda self, out, *_, **__: out.zero_())
    with pytest.raises(microbenchmarks.Failed, match="exchange by barrier, 2 blocks, 16 numbers: wrong sums"):
        next(microbenchmarks.measure(Device(), lambda call: 1.0, clusters, 0))


# Name: the text that stands once in microbenchmarks.cu, its replacement, and what must be reported.
FAULTS = {
    "a push before the other block's mbarrier is ready": (
        "    arrived[0].init(1);\n    arrived[1].init(1);\n  }\n  cluster.sync();\n",
        "    arrived[1].init(1);\n  }\n  cluster.sync();\n  if (i == 0) arrived[0].init(1);\n  __syncthreads();\n",
        "a push before the other block's mbarrier is initialised",
    ),
    "a push before the other block has started": (
        "    arrived[1].init(1);\n  }\n  cluster.sync();\n",
        "    arrived[1].init(1);\n  }\n  __syncthreads();\n",
        "another block's shared memory before it is known to have started",
    ),
    "too few bytes expected": (
        "static_cast<unsigned>(size * count * sizeof(float))",
        "static_cast<unsigned>((size * count - 1) * sizeof(float))",
        "more bytes at an mbarrier than it expects|a block has ended before what is under way to it",
    ),
    "too many bytes expected": (
        "static_cast<unsigned>(size * count * sizeof(float))",
        "static_cast<unsigned>((size * count + 1) * sizeof(float))",
        "deadlock: .*waits at an mbarrier",
    ),
    "one buffer for all rounds": (
        "const int buffer = round % 2;",
        "const int buffer = 0;",
        "more (bytes|arrivals) at an mbarrier than",
    ),
    "a read before the phase has ended": (
        "    arrived[chunk].wait(0);\n    sum += sum_of(staged, begin(chunk), begin(chunk + 1));\n",
        "    sum += sum_of(staged, begin(chunk), begin(chunk + 1));\n    arrived[chunk].wait(0);\n",
        "AssertionError",
    ),
    "a wait by threads that nobody waits for": (
        "      arrived[buffer].wait(round / 2 % 2);\n",
        "    }\n    arrived[buffer].wait(round / 2 % 2);\n    if (i < count) {\n",
        "deadlock: .*waits at an mbarrier",
    ),
    "a block that ends while others push": (
        "total += from[rank * count + i];\n    }\n  }\n",
        "total += from[rank * count + i];\n    }\n    if (cluster.rank == 1) return;\n  }\n",
        "a block has ended before what is under way to it|the shared memory of a block that has ended",
    ),
    "an mbarrier that is not initialised": (
        "chunk < chunks; ++chunk) arrived[chunk].init(1);",
        "chunk + 1 < chunks; ++chunk) arrived[chunk].init(1);",
        "an mbarrier that is not initialised",
    ),
    "chunks that leave a gap": (
        "copy_bulk(staged + begin(chunk), from + begin(chunk), size,",
        "copy_bulk(staged + begin(chunk), from + begin(chunk), size - 16,",
        "deadlock: .*waits at an mbarrier",
    ),
    "chunks that overlap": (
        "copy_bulk(staged + begin(chunk), from",
        "copy_bulk(staged + begin(chunk) - 4 * (chunk > 0), from",
        "AssertionError",
    ),
    "a bulk copy of 8 bytes too much": (
        "copy_bulk(staged + begin(chunk), from + begin(chunk), size,",
        "copy_bulk(staged + begin(chunk), from + begin(chunk), size + 8,",
        "not multiples of 16",
    ),
    "a bulk copy from beyond the buffer": (
        "copy_bulk(staged + begin(chunk), from + begin(chunk), size,",
        "copy_bulk(staged + begin(chunk), from + begin(chunk) + 4, size,",
        "a read of 16 bytes out of bounds, near source",
    ),
    "a second arrival": (
        "      arrived[chunk].arrive(size);\n",
        "      arrived[chunk].arrive(size);\n      arrived[chunk].arrive(0);\n",
        "more arrivals at an mbarrier than its phase has",
    ),
}


def use(device):
    """Run everything that a faulty library must fail."""
    for seed in range(4):
        exchange(device, seed, 4, 40, 5, by_push=True)
        exchange(device, seed, 2, 3, 9, by_push=True)
        stage(device, seed, 2, 101, 3)


def load_and_use(library: Path) -> None:
    use((emulator.Library(library), microbenchmarks.Microbenchmarks(library)))


def test_without_a_fault_nothing_is_said(device):
    use(device)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, tmp_path):
    old, new, message = FAULTS[name]
    source = f"{emulator.MICROBENCHMARKS}/microbenchmarks.cu"
    emulator.patched(tmp_path, source, old, new)
    kept = emulator.objects(source)
    library = emulator.compile_library(tmp_path, tmp_path / "build", kept, "-O0")
    well, said = emulator.run_apart(load_and_use, library)
    assert not well, "the fault went unnoticed"
    assert re.search(message, said), said[-3000:]
