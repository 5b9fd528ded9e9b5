"""The laboratory: what the kernels are tested and tuned with, apart from the package and its tests.

emulator/           runs the CUDA kernels on a CPU and checks every access
microbenchmarks/    GPU features, each timed alone
sweep.py            times every plan beside the planner's choice
refit.py            fits the planner's constants to such a sweep
"""
