"""Measures the assumptions of the planner's model (csrc/plan/model.cpp), and other ways to copy and to exchange."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import se_fused
from benchmarks.gpu import calls
from benchmarks.gpu.calls import SIZES
from benchmarks.gpu.worker import Worker, run_part
from benchmarks.shapes import Shape
from se_fused import backends
from se_fused.native import BuildError

from .. import microbenchmarks

COPIES = tuple(1 << power for power in range(20, 30, 3))  # 1 MB to 512 MB
# A call with almost nothing to compute. Its time is that of the launch; the time of the exchange grows with the size.
TINY = calls.Row(Shape(1, 64, 1, 16, r=8), torch.float16, "contiguous", "forward")


def us_of(device: torch.device, function: Callable[[], object]) -> float:
    replay = calls.Replay([function], 32, device)
    return statistics.median(replay.time() for _ in range(calls.ROUNDS))


def bandwidths(device: torch.device) -> Iterator[microbenchmarks.Row]:
    for size in COPIES:
        source = torch.randint(256, (size,), dtype=torch.uint8, device=device).view(torch.float32)
        target = torch.empty_like(source)
        functions = {
            "read": (size, source.sum), "write": (size, target.zero_),
            "copy by a kernel": (2 * size, calls.copier(2 * size, device)),
            "copy by memcpy": (2 * size, partial(target.copy_, source)),
        }  # fmt: skip
        for name, (moved, function) in functions.items():
            yield name, f"{size} bytes", moved / us_of(device, function) / 1e3, "GB/s"


def active_clusters(device: torch.device) -> Iterator[microbenchmarks.Row]:
    for size, count in _clusters().items():
        yield "clusters with one block per SM", f"{size} blocks", count, "clusters"


def empty_calls(device: torch.device) -> Iterator[microbenchmarks.Row]:
    (inputs,) = calls.draw(TINY, 1, device)
    for plan in ("two_pass", *(f"cluster size={size}" for size in SIZES)):
        try:
            with torch.no_grad(), se_fused.use_backend("cuda", plan):
                took = us_of(device, partial(inputs.call, se_fused.squeeze_excite))
        except ValueError:
            continue  # the device has no such clusters
        yield "a call with nothing to compute", plan, took, "us"


def exchanges_and_staging(device: torch.device) -> Iterator[microbenchmarks.Row]:
    with tempfile.TemporaryDirectory() as folder:
        library = microbenchmarks.Microbenchmarks(microbenchmarks.compile_microbenchmarks(Path(folder)))
    shared_bytes = backends.CUDA.limits(torch.cuda.current_device())[2]
    yield from microbenchmarks.measure(library, partial(us_of, device), _clusters(), shared_bytes)


def _clusters() -> dict[int, int]:
    return dict(zip(SIZES, backends.CUDA.limits(torch.cuda.current_device())[4:9], strict=True))


def main() -> None:
    worker = Worker(__doc__ or "")
    rows: list[dict[str, str]] = []
    of_a_gpu = [active_clusters, empty_calls, exchanges_and_staging] if worker.device.type == "cuda" else []
    for _, microbenchmark in worker.each([bandwidths, *of_a_gpu], lambda microbenchmark: microbenchmark.__name__):
        try:
            for name, what, value, unit in microbenchmark(worker.device):
                rows.append({"microbenchmark": name, "of": what, "value": f"{value:.4g}", "unit": unit})
                worker.say(f"  {name}, {what}: {value:.4g} {unit}")
        except BuildError as error:  # no nvcc
            worker.skip(error)
        except microbenchmarks.Failed as error:
            worker.wrong(f"{microbenchmark.__name__}: {error}")
        worker.facts({"microbenchmarks": rows})
    worker.finish()


if __name__ == "__main__":
    run_part(main)
