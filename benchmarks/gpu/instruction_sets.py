"""The CPU kernels of each instruction set that this CPU has, on the whole grid, in one process each."""

from __future__ import annotations

import os
import subprocess
import sys

from se_fused import native

from .worker import Worker, run_part

# Two threads suffice for every parallel path, and the processes run side by side.
CHECK = """
import torch
torch.set_num_threads(2)
import se_fused
from se_fused import cases, verify
with se_fused.use_backend("cpu"):
    for case, error, worst in verify.run():
        if not error <= cases.TOLERANCE[case.dtype]:
            print(f"wrong: {case}: {worst} is off by {error:.1e}")
"""


def main() -> None:
    worker = Worker(__doc__ or "")
    names = native.load_extension().cpu_features()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHECK], env={**os.environ, "SE_FUSED_CPU": name}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for name in names
    ]  # fmt: skip
    for number, name in worker.each(names):
        output, _ = processes[number].communicate()
        for line in output.splitlines():  # warnings too
            worker.wrong(f"{name}: {line}") if line.startswith("wrong: ") else worker.say(f"  {line}")
        if processes[number].returncode:
            worker.wrong(f"{name}: exit {processes[number].returncode}")
    worker.finish()


if __name__ == "__main__":
    run_part(main)
