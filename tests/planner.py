"""The planner of csrc/plan/, and the calls, devices and plans that its tests use."""

import contextlib
from pathlib import Path

from hypothesis import strategies as st

from se_fused import native

ROOT = Path(__file__).resolve().parents[1]
C = native.load_extension()
H200 = C.preset("H200")
DEVICES = C.device_presets()


def plan(device=H200, forced="two_pass", **call):
    return C.plan(device, forced=forced, **{"n": 32, "c": 256, "r": 16, "l": 56 * 56, "dtype": "float16"} | call)


def cluster(device=H200, **call):
    return plan(device, **{"forced": "cluster"} | call)


CALLS = st.fixed_dictionaries(
    {
        "n": st.integers(1, 300), "c": st.integers(1, 5000), "r": st.integers(0, 800),
        "l": st.one_of(st.integers(1, 300), st.integers(1, 100_000)),
        "dtype": st.sampled_from(["float32", "float64", "float16", "bfloat16"]), "channels_last": st.booleans(),
        "backward": st.booleans(), "squeeze": st.integers(0, 2), "alignment": st.sampled_from([1, 2, 4, 8, 16]),
        "pre_act": st.booleans(), "post_act": st.booleans(), "residual": st.booleans(),
    }
)  # fmt: skip


CLUSTERS = [f"cluster size={size} threads={threads}" for size in (1, 2, 4, 8, 16) for threads in (256, 512)]


def forced_plans(device, call):
    """The plans that can run a call, by name: those of each algorithm and kind of cluster."""
    plans = {"two_pass": C.plan(device, **call, forced="two_pass")}
    for forced in CLUSTERS:
        with contextlib.suppress(ValueError):
            plans[forced] = C.plan(device, **call, forced=forced)
    return plans
