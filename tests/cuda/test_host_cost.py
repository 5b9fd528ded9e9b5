"""Counts what a call on a GPU costs the host: host_cost.cpp counts, and also tests the cache of plans."""

import json
import os
import subprocess

import pytest

from dev import emulator

ATTRIBUTES = 3  # of a kernel that runs in clusters
# Calls of torch: seven facts of each of six tensors, and the release of each; the device's index, its guard, the end of
# the guard, and the stream.
TORCH = 6 * 8 + 4
SCRATCH = 5  # calls for its dtype, the kind of its device, its creation, its address and its release


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    program = tmp_path_factory.mktemp("host_cost") / "host_cost"
    built = emulator.library().parent  # which also holds objects of sources that no longer exist
    kernels = [built / f"{path.stem}.o" for path in emulator.sources(emulator.ROOT) if path.stem != "binding"]
    sources = [emulator.ROOT / "tests/cuda/host_cost.cpp", emulator.ROOT / "csrc/cuda/binding.cpp"]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", *os.environ.get("SE_FUSED_CXXFLAGS", "").split()]
    subprocess.run(["c++", *flags, *sources, *kernels, "-pthread", "-o", program], check=True)
    return json.loads(subprocess.run([program], check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_a_call_that_comes_again_is_a_launch_and_nothing_else(costs):
    counts = {"heap": 0, "torch": TORCH, "tensors": 0, "set_attribute": 0, "get_device": 1, "launch": 1}
    assert costs["cluster"]["again"] == counts


def test_two_passes_take_one_scratch_tensor(costs):
    counts = {"heap": 0, "torch": TORCH + SCRATCH, "tensors": 1, "set_attribute": 0, "get_device": 0, "launch": 2}
    assert costs["two_pass"]["again"] == counts


def test_each_device_is_told_once_what_a_kernel_needs(costs):
    for which in ("first", "on another device"):
        assert costs["cluster"][which]["set_attribute"] == ATTRIBUTES
        assert costs["two_pass"][which]["set_attribute"] == 0
    assert costs["set_attribute in threads"] == ATTRIBUTES * 2
