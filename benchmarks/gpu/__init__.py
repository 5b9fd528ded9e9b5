"""The parts of `make gpu-check`, a process each: benchmarks/gpu_check.py runs them, and docs/gpu-run.md says how."""
