"""The one builder of the native code: by setup.py ahead of time, or when the package is first imported.

A build is a folder named by the hash of all that went into it (sources, flags, this file, Python's ABI, machine), so a
stale one is never loaded. The name of a CUDA build goes on with the architectures that it has code for, so that a build
made on one machine serves another with such a GPU. setup.py leaves it in the package; the first import, in the user's
cache folder (native.py). This file needs no other file of the package, because setup.py runs it before there is one.

There are two groups: "cpu" (the CPU operators and the module _C) and "cuda" (the CUDA operators, where nvcc is found).

Environment: CXX, the compiler; CUDA_HOME, where nvcc is, if not on the PATH; TORCH_CUDA_ARCH_LIST, what to compile for,
in torch's spellings ("8.0 9.0+PTX", "Ampere;Hopper", "All", "native"); MAX_JOBS, parallel compilations;
SE_FUSED_CXXFLAGS, more flags.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_BESIDE, _INSIDE = _PACKAGE.parent / "csrc", _PACKAGE / "csrc"
SOURCES = _INSIDE if _INSIDE.is_dir() else _BESIDE
PREBUILT = _PACKAGE / "_native"

# The oldest torch whose stable ABI has all that csrc uses; a library built for it serves every later one.
_TARGET_TORCH = "2.10"
_TARGET_TORCH_VERSION = "0x020a000000000000"
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# What the loops need to become vector code. Nothing here reorders or contracts arithmetic: NaN and Inf keep their
# meaning, and an element has the same bits in a vector as alone.
_KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
_X86 = {"v3": "x86-64-v3", "v4": "x86-64-v4"}
# Every architecture that the CUDA of today compiles for; the last one also as PTX, for those to come.
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
# torch.utils.cpp_extension's names. What is older than 7.5 cannot run the kernels and is left out.
_NAMED = {
    **dict.fromkeys(("Kepler", "Kepler+Tesla", "Maxwell", "Maxwell+Tegra"), ""),
    **dict.fromkeys(("Pascal", "Pascal+Tegra", "Volta", "Volta+Tegra"), ""),
    "Turing": "7.5+PTX", "Ampere": "8.0 8.6+PTX", "Ampere+Tegra": "8.7", "Ada": "8.9+PTX", "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX", "Blackwell+Tegra": "11.0",
    **dict.fromkeys(("All", "Common"), "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
}  # fmt: skip
OLDEST = 75
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
GROUPS = {"cpu": ("cpu", "_C"), "cuda": ("cuda",)}
_TIMEOUT = 1800  # seconds; on two cores the CPU group takes about 40, the CUDA group 30 for each architecture


class BuildError(RuntimeError):
    """The native code could not be built; the message says why."""


def _more_flags() -> list[str]:
    given = os.environ.get("SE_FUSED_CXXFLAGS", "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise BuildError(f"SE_FUSED_CXXFLAGS is {given!r}: {error}") from error


def _instruction_sets() -> dict[str, list[str]]:
    """The name of each instruction set and the flags that select it."""
    sets: dict[str, list[str]] = {"baseline": []}
    if platform.machine() in ("x86_64", "AMD64"):
        sets.update({name: [f"-march={march}"] for name, march in _X86.items()})
    return sets


def key(group: str = "cpu") -> str:
    """The name of the build of a group that belongs to these sources, for this Python on this kind of machine.

    Raises:
        BuildError: without torch.
    """
    digest = hashlib.sha256()
    others = {name for name in GROUPS if name != group}
    files = sorted(
        p for p in SOURCES.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh") and p.parent.name not in others
    )
    for path in [*files, Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for text in (*_more_flags(), str(sysconfig.get_config_var("EXT_SUFFIX")), platform.machine(), sys.platform):
        digest.update(text.encode() + b"\0")
    if group == "cpu":
        header = _torch() / "include" / "ATen" / "dlpack.h"  # all that the group has of the torch that is here
        digest.update(header.read_bytes() if header.is_file() else b"")
    return digest.hexdigest()[:24]


def compiler() -> str:
    """The path of the C++ compiler. Raises BuildError if there is none."""
    name = os.environ.get("CXX", "")
    found = shutil.which(name or "c++") or shutil.which(name or "g++")
    if found is None:
        raise BuildError(f"no C++ compiler: {name or 'c++'} is not on the PATH")
    return found


def nvcc() -> str:
    """The path of nvcc. Raises BuildError if there is none."""
    home = os.environ.get("CUDA_HOME", "")
    found = shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")
    if found is None:
        raise BuildError(f"no CUDA compiler: {Path(home, 'bin', 'nvcc') if home else 'nvcc on the PATH'} is not there")
    return found


@functools.cache
def gpus() -> list[int]:
    """The compute capabilities of this machine's GPUs (90 for 9.0), by NVML: CUDA stays uninitialised. Empty without
    NVML."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
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


def _gpus_of_torch() -> list[int]:
    """The same without NVML, by a process of its own, which takes seconds."""
    program = "import torch; print(*map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))"
    command = [sys.executable or "python3", "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({10 * int(major) + int(minor) for major, minor in re.findall(r"\((\d+), (\d+)\)", done.stdout)})


def architectures() -> list[str]:
    """What to compile for, such as ["80", "90+PTX"]: TORCH_CUDA_ARCH_LIST, else the GPUs that are here, else all.

    Raises:
        BuildError: for a list that torch would not take, or that has nothing from 7.5 on.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    names: list[str] = []
    if asked and asked != "native":
        for word in re.split(r"[ ;,]+", asked):
            for name in _NAMED.get(word, word).split():
                if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                    raise BuildError(
                        f"TORCH_CUDA_ARCH_LIST has {name!r}; wanted such as '8.0 9.0+PTX' or 'Ampere;Hopper'"
                    )
                names.append(name.replace(".", ""))
        names = [name for name in dict.fromkeys(names) if number(name) >= OLDEST]
        if not names:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST is {asked!r}; the CUDA kernels need 7.5 or later")
        return names
    here = gpus() or _gpus_of_torch()
    names = [str(gpu) for gpu in here if gpu >= OLDEST]
    if here and not names:
        raise BuildError(f"the CUDA kernels need compute capability 7.5; the GPUs here have {max(here) / 10}")
    return names or [*ARCHITECTURES[:-1], f"{ARCHITECTURES[-1]}+PTX"]


def number(architecture: str) -> int:
    """90 of "90", "90a" and "90+PTX"."""
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


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed")
    return Path(spec.origin).parent


def binding_flags() -> list[str]:
    """Flags of what is compiled against torch's stable ABI."""
    return [f"-DTORCH_TARGET_VERSION={_TARGET_TORCH_VERSION}", "-isystem", str(_torch() / "include")]


def link_flags() -> list[str]:
    # torch's libraries are in the process already: they are named here, so that the loader looks there.
    return [f"-L{_torch() / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]


def _write_ninja(folder: Path, group: str) -> None:
    from ninja import ninja_syntax

    def quote(*words: str | Path) -> str:
        return str(ninja_syntax.escape(shlex.join(str(word) for word in words)))

    objects, libraries = _cuda_recipe() if group == "cuda" else _cpu_recipe()
    with (folder / "build.ninja").open("w") as file:
        ninja = ninja_syntax.Writer(file, width=10_000)
        compile_command = quote(compiler(), *_FLAGS, *_more_flags())
        ninja.rule("cpp", f"{compile_command} $flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        if group == "cuda":
            ninja.rule("cu", f"{quote(nvcc(), *NVCC_FLAGS, *architecture_flags())} $flags -c $in -o $out")
        # nvcc links CUDA's runtime statically: one library serves a torch of any CUDA.
        linker = quote(nvcc()) if group == "cuda" else compile_command
        ninja.rule("link", f"{linker} -shared $in -o $out $flags")
        for name, (source, flags) in objects.items():
            path = ninja_syntax.escape_path(str(SOURCES / source))
            ninja.build(f"{name}.o", Path(source).suffix[1:], path, variables={"flags": quote(*flags)})
        for name, (inputs, flags) in libraries.items():
            ninja.build(file_name(name), "link", [f"{i}.o" for i in inputs], variables={"flags": quote(*flags)})


# Objects: the source and flags of each. Libraries: the objects and flags of each.
_Recipe = tuple[dict[str, tuple[str, list[str]]], dict[str, tuple[list[str], list[str]]]]


def _planner() -> dict[str, tuple[str, list[str]]]:
    return {f"plan_{path.stem}": (f"plan/{path.name}", []) for path in sorted((SOURCES / "plan").glob("*.cpp"))}


def _cpu_recipe() -> _Recipe:
    import pybind11

    isas = _instruction_sets()
    facts = [
        f'-DSE_FUSED_TARGET_TORCH="{_TARGET_TORCH}"',
        f'-DSE_FUSED_INSTRUCTION_SETS="{" ".join(["baseline", *(_X86[name] for name in isas if name in _X86)])}"',
        "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"],
    ]  # fmt: skip
    objects = {"binding": ("cpu/binding.cpp", binding_flags())}
    for isa, flags in isas.items():
        for kernel in ("forward", "backward"):
            objects[f"{kernel}_{isa}"] = (f"cpu/{kernel}.cpp", [*_KERNEL_FLAGS, f"-DSE_CPU_ISA={isa}", *flags])
    kernels, facts_module = list(objects), {"python": ("python.cpp", facts)} | _planner()
    facts_module["direct"] = ("direct.cpp", [*facts, "-isystem", str(_torch() / "include")])
    return objects | facts_module, {"cpu": (kernels, link_flags()), "_C": (list(facts_module), [])}


def _cuda_recipe() -> _Recipe:
    objects = {"binding": ("cuda/binding.cpp", binding_flags())} | _planner()
    objects |= {path.stem: (f"cuda/{path.name}", []) for path in sorted((SOURCES / "cuda").glob("*.cu"))}
    return objects, {"cuda": (list(objects), link_flags())}


def file_name(library: str) -> str:
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}" if library == "_C" else f"libse_fused_{library}.so"


def _jobs() -> list[str]:
    jobs = os.environ.get("MAX_JOBS", "")
    if not jobs:
        return []
    if not jobs.isdigit() or int(jobs) == 0:
        raise BuildError(f"MAX_JOBS is {jobs!r}; wanted a number of 1 or more")
    return ["-j", jobs]


def build(parent: Path, group: str = "cpu") -> Path:
    """Build a group into a folder of `parent` and return that folder; a build that is there stays as it is.

    Safe against other processes that build the same, and against being killed: the folder appears whole or not at all.

    Raises:
        BuildError: without a compiler or torch, or if compilation fails; the message ends with the compiler's.
    """
    target = parent / "-".join([key(group), *(architectures() if group == "cuda" else [])])
    if target.is_dir():
        return target
    try:
        import ninja
        from filelock import FileLock
    except ImportError as error:
        raise BuildError(f"{error.name} is not installed") from error
    with FileLock(parent / f"{target.name}.lock", timeout=_TIMEOUT):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=parent, prefix="building-") as name:
            folder = Path(name)
            _write_ninja(folder, group)
            command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *_jobs()]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
            except subprocess.TimeoutExpired as error:
                raise BuildError(f"compilation took more than {_TIMEOUT} s") from error
            if done.returncode != 0:
                raise BuildError(f"compilation failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
            finished = folder / "finished"
            finished.mkdir()
            for library in GROUPS[group]:
                (folder / file_name(library)).rename(finished / file_name(library))
            finished.rename(target)
    return target


if __name__ == "__main__":  # for a machine that only has to load them: `make prebuild`
    PREBUILT.mkdir(exist_ok=True)
    for each in GROUPS:
        print(build(PREBUILT, each))
