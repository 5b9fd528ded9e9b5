"""The GPUs of this machine, and the GPU architectures that the CUDA kernels are compiled for.

Environment: TORCH_CUDA_ARCH_LIST names the architectures to compile for, in torch's spellings ("8.0 9.0+PTX",
"Ampere;Hopper", "All", "native").
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sys

from .toolchain import BuildError

# All architectures from 7.5 on that CUDA compiles for today; the last one also as PTX, for future ones.
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
# The names that torch.utils.cpp_extension takes. Architectures before 7.5 are left out, because they cannot run the
# kernels.
NAMED = {
    **dict.fromkeys(("Kepler", "Kepler+Tesla", "Maxwell", "Maxwell+Tegra"), ""),
    **dict.fromkeys(("Pascal", "Pascal+Tegra", "Volta", "Volta+Tegra"), ""),
    "Turing": "7.5+PTX", "Ampere": "8.0 8.6+PTX", "Ampere+Tegra": "8.7", "Ada": "8.9+PTX", "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX", "Blackwell+Tegra": "11.0",
    **dict.fromkeys(("All", "Common"), "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
}  # fmt: skip
OLDEST = 75


@functools.cache
def here() -> list[int]:
    """The compute capabilities of this machine's GPUs (90 for 9.0), from NVML, so that CUDA stays uninitialised. Empty
    if there is no NVML."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        nvml.nvmlInit_v2  # noqa: B018  raises AttributeError if another library has this file name
    except (OSError, AttributeError):
        return []
    count, handle, major, minor = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    found = set()
    for i in range(count.value):
        if (
            nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(handle)) == 0
            and nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
        ):
            found.add(10 * major.value + minor.value)
    return sorted(found)


def _of_torch() -> list[int]:
    """The compute capabilities from torch, for machines without NVML; asked in another process, which takes seconds."""
    program = "import torch; print(*map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))"
    if not os.path.basename(sys.executable or "").startswith("python"):  # a program that embeds Python
        return []
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({10 * int(major) + int(minor) for major, minor in re.findall(r"\((\d+), (\d+)\)", done.stdout)})


def architectures() -> list[str]:
    """The architectures to compile for, such as ["80", "90+PTX"]: those of TORCH_CUDA_ARCH_LIST, else of the GPUs of
    this machine, else all.

    Raises:
        BuildError: for a list that torch would not take, or without an architecture from 7.5 on; or if all GPUs of this
            machine are older.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    names: list[str] = []
    if asked and asked != "native":
        for word in re.split(r"[ ;,]+", asked):
            for name in NAMED.get(word, word).split():
                if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                    raise BuildError(
                        f"TORCH_CUDA_ARCH_LIST has {name!r}; wanted such as '8.0 9.0+PTX' or 'Ampere;Hopper'"
                    )
                names.append(name.replace(".", ""))
        names = [name for name in dict.fromkeys(names) if number(name) >= OLDEST]
        if not names:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST is {asked!r}; the CUDA kernels need 7.5 or later")
        return names
    found = here() or _of_torch()
    names = [str(gpu) for gpu in found if gpu >= OLDEST]
    if found and not names:
        raise BuildError(f"the CUDA kernels need compute capability 7.5; the GPUs here have {max(found) / 10}")
    return names or [*ARCHITECTURES[:-1], f"{ARCHITECTURES[-1]}+PTX"]


def number(architecture: str) -> int:
    """The number of an architecture: 90 for "90", "90a" and "90+PTX"."""
    return int(re.sub(r"\D.*", "", architecture))


def architecture_flags() -> list[str]:
    """nvcc's -gencode flags for `architectures()`."""
    flags = []
    for name in architectures():
        sm = name.removesuffix("+PTX")
        flags += ["-gencode", f"arch=compute_{sm},code=sm_{sm}"]
        if name.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{sm},code=compute_{sm}"]
    return flags


def runs_on(architectures: list[str], gpu: int) -> bool:
    """Whether code for these architectures runs on a GPU of compute capability `gpu`.

    Machine code runs on its own and later minor versions of the same major version, PTX on all later architectures.
    """
    for name in architectures:
        oldest = number(name)
        if re.search("[af]", name):  # code for exactly this architecture (a) or its family (f); both are treated as "a"
            if oldest == gpu:
                return True
        elif oldest <= gpu and (oldest // 10 == gpu // 10 or name.endswith("+PTX")):
            return True
    return False
