"""The peak memory of a call, from the kernel: where a tool of PyTorch watches, a replaced block computes as before."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path

# The environment of a process in which glibc maps and unmaps each tensor of 64 KB or more by itself.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# The kernel counts the pages of a thread in batches of up to 64, and a peak is the difference of two counts.
NOISE = 2 * 64 * 4096


def can_measure() -> bool:
    return platform.libc_ver()[0] == "glibc" and Path("/proc/self/clear_refs").exists()


def peak_of(call: Callable[[], object]) -> int:
    """How many bytes more than before a call holds at its peak, with its result. It is the second call that is
    measured: the first one loads code."""
    call()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return peak - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
