"""Loads the compiled libraries, or builds them if no packaged one fits, and reports the machine."""

from __future__ import annotations

from se_fused import native

from .worker import Worker, run_part


def main() -> None:
    worker = Worker(__doc__ or "")
    for _, name in worker.each(["cpu"] if worker.device.type == "cpu" else ["cpu", "cuda"]):
        worker.say(f"  {native.library(name).parent.name}")
    worker.finish()


if __name__ == "__main__":
    run_part(main)
