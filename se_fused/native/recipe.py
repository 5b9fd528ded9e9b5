"""The libraries, their sources and flags, written as a file for ninja.

There are two groups: "cpu" (the CPU operators and the module _C) and "cuda" (the CUDA operators). Compiling needs no
torch: csrc/torch_c.h declares the functions of torch that the code calls.
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
import sysconfig
from pathlib import Path

from . import gpus, toolchain
from .toolchain import BuildError

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_CHECKOUT, _IN_PACKAGE = _PACKAGE.parent / "csrc", _PACKAGE / "csrc"
SOURCES = _IN_PACKAGE if _IN_PACKAGE.is_dir() else _IN_CHECKOUT

GROUPS = {"cpu": ("cpu", "_C"), "cuda": ("cuda",)}  # the libraries of each group
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Without the first two, the loops are not vectorised. None of these reorders or contracts arithmetic, so NaN and Inf
# keep their meaning, and vector code and scalar code compute the same bits for an element.
_KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
_SUFFIXES = (".h", ".cpp", ".cu", ".cuh", ".py")
_X86 = {"v3": "x86-64-v3", "v4": "x86-64-v4"}
# The loader looks for torch's functions in the libraries of these names, which the process has loaded already. The
# linker needs only the names, so it gets empty libraries.
_TORCH = ("torch", "torch_cpu")

# Two dictionaries: by object, its source and flags; by library, its objects and the names of other libraries it needs.
Recipe = tuple[dict[str, tuple[str, list[str]]], dict[str, tuple[list[str], tuple[str, ...]]]]


def instruction_sets() -> dict[str, str]:
    """The instruction sets of the CPU kernels: the suffix of each one's objects, and its name in SE_FUSED_CPU."""
    return {"baseline": "baseline", **(_X86 if platform.machine() in ("x86_64", "AMD64") else {})}


def file_name(library: str) -> str:
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}" if library == "_C" else f"libse_fused_{library}.so"


def key(group: str = "cpu") -> str:
    """A hash of everything that a build of the group depends on: sources, flags, Python and kind of machine.

    Raises:
        BuildError: if SE_FUSED_CXXFLAGS cannot be split into words, or the sources cannot be read.
    """
    digest = hashlib.sha256()
    others = {name for name in GROUPS if name != group}
    try:
        if not SOURCES.is_dir():
            raise FileNotFoundError(f"there is no folder {SOURCES}")
        for path in [*sorted(SOURCES.rglob("*")), Path(__file__)]:
            if path.suffix not in _SUFFIXES or path.parent.name in others:
                continue
            if path.is_file() and not path.name.startswith("."):  # hidden files are those of editors
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    except OSError as error:
        raise BuildError(f"the sources of the native code cannot be read: {error}") from error
    facts = (str(sysconfig.get_config_var("EXT_SUFFIX")), platform.machine(), sys.platform)
    for text in (*toolchain.extra_flags(), *facts):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:24]


def of(group: str) -> Recipe:
    """The recipe of a group."""
    return _cuda() if group == "cuda" else _cpu()


def _planner() -> dict[str, tuple[str, list[str]]]:
    return {f"plan_{path.stem}": (f"plan/{path.name}", []) for path in sorted((SOURCES / "plan").glob("*.cpp"))}


def _cpu() -> Recipe:
    python = ["-isystem", "pybind11", "-isystem", "python"]
    kernels: dict[str, tuple[str, list[str]]] = {"binding": ("cpu/binding.cpp", [])}
    for isa, name in instruction_sets().items():
        march = [f"-march={name}"] if name in _X86.values() else []
        for kernel in ("forward", "backward", "batch_norm"):
            kernels[f"{kernel}_{isa}"] = (f"cpu/{kernel}.cpp", [*_KERNEL_FLAGS, f"-DSE_CPU_ISA={isa}", *march])
    module = {"python": ("python.cpp", python), "fast_path": ("fast_path.cpp", python)} | _planner()
    return kernels | module, {"cpu": (list(kernels), _TORCH), "_C": (list(module), ())}


def _cuda() -> Recipe:
    objects = _planner() | {"binding": ("cuda/binding.cpp", [])}
    objects |= {path.stem: (f"cuda/{path.name}", []) for path in sorted((SOURCES / "cuda").glob("*.cu"))}
    return objects, {"cuda": (list(objects), _TORCH)}


def write_ninja(folder: Path, group: str) -> None:
    """Write `folder`/build.ninja, and beside it links to everything that it reads. So no library contains a path of
    this machine, and build.ninja has no path with characters that ninja cannot escape.

    Raises:
        BuildError: if a tool or package is missing.
    """
    from ninja import ninja_syntax

    (folder / "csrc").symlink_to(SOURCES)
    if group == "cpu":
        try:
            import pybind11
        except ImportError as error:
            raise BuildError("pybind11 is not installed: pip install pybind11") from error
        (folder / "pybind11").symlink_to(pybind11.get_include())
        (folder / "python").symlink_to(sysconfig.get_paths()["include"])

    def quote(*words: str | Path) -> str:
        return str(ninja_syntax.escape(shlex.join(str(word) for word in words)))

    objects, libraries = of(group)
    with (folder / "build.ninja").open("w", encoding="utf-8", errors="surrogateescape") as file:
        ninja = ninja_syntax.Writer(file, width=10_000)
        compiler = quote(*toolchain.compiler(), *FLAGS, *toolchain.extra_flags())
        ninja.rule("cpp", f"{compiler} $flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        if group == "cuda":
            ninja.rule(
                "cu", f"{quote(toolchain.nvcc(), *NVCC_FLAGS, *gpus.architecture_flags())} $flags -c $in -o $out"
            )
        # nvcc links CUDA's runtime statically, so one library works with a torch for any CUDA version.
        linker = quote(toolchain.nvcc()) if group == "cuda" else compiler
        ninja.rule("link", f"{linker} -shared $in -o $out $flags")
        ninja.rule("empty", f"{quote(*toolchain.compiler())} -shared -x c++ /dev/null -Wl,-soname,$soname -o $out")
        for name in _TORCH:
            ninja.build(f"empty/lib{name}.so", "empty", variables={"soname": f"lib{name}.so"})
        for name, (source, flags) in objects.items():
            ninja.build(f"{name}.o", Path(source).suffix[1:], f"csrc/{source}", variables={"flags": quote(*flags)})
        for name, (inputs, needed) in libraries.items():
            flags = ["-Lempty", "-Xlinker", "--no-as-needed", *(f"-l{each}" for each in needed)] if needed else []
            ninja.build(
                file_name(name), "link", [f"{i}.o" for i in inputs], variables={"flags": quote(*flags)},
                implicit=[f"empty/lib{each}.so" for each in needed],
            )  # fmt: skip
