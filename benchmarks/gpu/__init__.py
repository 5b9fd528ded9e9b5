"""The parts of `make gpu-check`. benchmarks/gpu_check.py runs each in a process; docs/gpu-run.md describes them."""
