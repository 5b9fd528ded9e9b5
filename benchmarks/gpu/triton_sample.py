"""Checks about 60 cases of the Triton kernels on a GPU, compiled in parallel processes, and then times the layer."""

from __future__ import annotations

import multiprocessing
import os

import se_fused
from se_fused import backends, verify
from se_fused.cases import TOLERANCE, Case, grid

from . import layer
from .worker import Worker, run_part

STEP = 17  # coprime to the numbers of calls, layouts and precisions, so that the sample has each of them


def sample() -> list[Case]:
    return grid()[::STEP]


def check(case: Case, device: str, seed: int) -> tuple[float, str]:
    with se_fused.use_backend("triton"):
        return verify.error(case, device, seed)


def main() -> None:
    worker = Worker(__doc__ or "", backend="triton")
    processes = min(12, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        begun = [pool.apply_async(check, (case, worker.device.type, i)) for i, case in enumerate(sample())]
        for number, case in worker.each(sample()):
            error, worst = begun[number].get()
            if not error <= TOLERANCE[case.dtype]:
                worker.wrong(f"{case}: {worst} is off by {error:.1e}")
    worker.say(f"{len(begun)} cases by {processes} processes")
    if (reason := backends.CUDA.why_not(worker.device)) is None:
        worker.backend = "cuda"
        layer.run(worker, list(layer.triton_rows()))
    else:
        worker.say(f"not timed beside the CUDA kernels: {reason}")
    worker.finish()


if __name__ == "__main__":
    run_part(main)
