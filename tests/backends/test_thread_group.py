"""Runs the CPU kernels' thread group (thread_group.cpp) with and without ThreadSanitizer, and with planted faults."""

import os
import platform
import re
import subprocess

import pytest

from dev import emulator

FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread"]  # SE_FUSED_CXXFLAGS may name another sanitizer
TSAN, PLAIN = ["-O1", "-g", "-fsanitize=thread"], ["-O2"]
HEADER = "csrc/cpu/thread_group.h"
RACE, WRONG = "ThreadSanitizer: data race", r"^pool '.*', \d threads, \d+ elements: "

# What the header says, what it says with the fault, the compiler's flags, and the message that must come.
FAULTS = {
    "the wait does not acquire": (
        "done_->load(std::memory_order_acquire)",
        "done_->load(std::memory_order_relaxed)",
        TSAN,
        RACE,
    ),
    "the counter does not release": (
        "done_->fetch_add(finished, std::memory_order_acq_rel)",
        "done_->fetch_add(finished, std::memory_order_acquire)",
        TSAN,
        RACE,
    ),
    "only the first phase waits": ("target_ += chunks;", "target_ = chunks;", TSAN, RACE),
    "a late thread repeats what is done": (
        "if (seen >> 32 > phase_) return INT64_MAX >> 1;",
        "if (seen >> 32 > phase_) counter.store(seen = none);",
        PLAIN,
        WRONG,
    ),
}


def compiled(root, folder, flags):
    """The program, with the header under `root`, which is this checkout or a patched copy of it."""
    program = folder / "thread_group"
    source = emulator.ROOT / "tests/backends/thread_group.cpp"
    subprocess.run(["c++", *FLAGS, *flags, "-I", root, source, "-o", program], check=True)
    return program


def run(program):
    # ThreadSanitizer ends with "unexpected memory mapping" where Linux randomizes more address bits than it expects.
    fixed = ["setarch", platform.machine(), "-R"]
    try:
        subprocess.run([*fixed, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):  # there is no setarch, or a container forbids it
        fixed = []
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([*fixed, program], env=environment, stderr=subprocess.PIPE, text=True, timeout=120)


def skip_unless_linked(flags, folder):
    command = ["c++", *flags, "-x", "c++", "-", "-o", folder / "empty"]
    result = subprocess.run(command, input="int main() {}", stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        pytest.skip(f"c++ cannot link {flags[-1]}: {result.stderr.strip()[-300:]}")


@pytest.mark.parametrize("flags", [TSAN, PLAIN], ids=["ThreadSanitizer", "plain"])
def test_phases_meet_whichever_threads_the_pool_runs(flags, tmp_path):
    if flags is TSAN:
        skip_unless_linked(flags, tmp_path)
    result = run(compiled(emulator.ROOT, tmp_path, flags))
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, tmp_path):
    old, new, flags, message = FAULTS[name]
    if flags is TSAN:
        skip_unless_linked(flags, tmp_path)
    emulator.patched(tmp_path, HEADER, old, new)
    result = run(compiled(tmp_path, tmp_path, flags))
    assert result.returncode != 0, "the fault went unnoticed"
    assert re.search(message, result.stderr), result.stderr[-3000:]
