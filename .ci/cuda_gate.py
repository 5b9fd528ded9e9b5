"""Compiles the CUDA kernels for every architecture, without a GPU, and fails on what would be slow or would not load.

A warning, a register spill, static shared memory, other registers than the committed table's (`--update` rewrites it),
a hot kernel without 16-byte loads and stores, a library that torch cannot load or that needs a symbol which torch 2.10
does not have.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import torch
import triton

import se_fused  # noqa: F401  defines the operators that the library registers for
from se_fused import native
from se_fused.native import build, gpus, manifest, recipe, toolchain

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "csrc" / "cuda" / "registers.csv"
SYMBOLS = ROOT / "tests" / "torch_2_10_symbols.txt"
PROBES = ROOT / "benchmarks" / "gpu_probes" / "probes.cu"
SASS_OF = "90"
# Of 8.x only the step from PTX on differs; what precedes it is half the time.
TOGETHER = [tuple(group) for _, group in groupby(gpus.ARCHITECTURES, lambda sm: sm[0] if sm[0] == "8" else sm)]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(str(word) for word in command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def short(names: list[str]) -> list[str]:
    """Demangled, without namespaces and parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = []
    for name in text.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|se::cuda::|se::|^void ", "", name)
        short.append(re.sub(r"\(.*", "", name).replace(" >", ">"))
    return short


def compile_one(source: Path, architectures: Sequence[str], folder: Path) -> dict[tuple[str, str], int]:
    """The registers of each kernel on each architecture, all by the PTX of the first. The object stays in `folder`."""
    first = architectures[0]
    kind = "-c" if SASS_OF in architectures else "-fatbin"
    code = f"-gencode=arch=compute_{first},code=[{','.join(f'sm_{sm}' for sm in architectures)}]"
    flags = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-Werror", code, kind]
    log = run(toolchain.nvcc(), *recipe.NVCC_FLAGS, *flags, source, "-o", folder / f"{source.stem}.{first}.o")
    pattern = r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?Used (\d+) registers([^\n]*)"
    found = re.findall(pattern, log, re.DOTALL)
    for name, sm, _, rest in found:
        if "smem" in rest:
            sys.exit(f"{name} for sm_{sm} has static shared memory:{rest}")
    kernels = short([name for name, *_ in found])
    return {(kernel, sm): int(count) for kernel, (_, sm, count, _) in zip(kernels, found, strict=True)}


def compare(registers: dict[tuple[str, str], int], update: bool) -> None:
    kernels = sorted({kernel for kernel, _ in registers})
    rows = [[kernel, *(str(registers[kernel, sm]) for sm in gpus.ARCHITECTURES)] for kernel in kernels]
    version = re.search(r"release ([\d.]+)", run(toolchain.nvcc(), "--version"))
    assert version is not None
    header = [f"registers, nvcc {version[1]}", *(f"sm_{sm}" for sm in gpus.ARCHITECTURES)]
    if update:
        with TABLE.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
        return
    with TABLE.open(newline="") as file:
        known = list(csv.reader(file))
    if known[0] != header:
        print(f"the table is of '{known[0][0]}', this is '{header[0]}': not compared")
    elif known[1:] != rows:
        changed = [row for row in rows if row not in known] + [["gone:", *row] for row in known[1:] if row not in rows]
        sys.exit(f"{TABLE.name} differs; .ci/cuda_gate.py --update rewrites it:\n" + "\n".join(map(" ".join, changed)))


def sass_of(path: Path) -> str:
    return run(TOOLS / "cuobjdump", "-sass", path, PATH=f"{TOOLS}:{os.environ['PATH']}")


def check_wide_accesses(objects: list[Path], pool: Executor) -> None:
    hot = 0
    for sass in pool.map(sass_of, objects):
        parts = re.split(r"\n\s+Function : (\w+)\n", sass)[1:]
        for name, code in zip(short(parts[::2]), parts[1::2], strict=True):
            writes = re.match(r"(scale|distribute)_|\w+_in_cluster", name) is not None
            if "double" in name or not (writes or name.startswith("reduce_")):
                continue
            width = re.search(r"PositionShare<\w+, (\d+)|^reduce_\w+<(\d+)", name)
            element = 2 if re.search("__half|__nv_bfloat16", name) else 4
            if width and int(width[1] or width[2]) * element < 16:
                continue
            hot += 1
            wide = ["LDG", "STG"] if writes else ["LDG"]
            for wanted in [*wide, "LDGSTS"] if "cluster" in name else wide:
                if not re.search(rf"{wanted}\.E\S*\.128", code):
                    sys.exit(f"{name}: no {wanted}.E.128 in its SASS")
    if hot < 20:
        sys.exit(f"only {hot} hot kernels found in the SASS")
    print(f"16-byte accesses in all {hot} hot kernels")


def check_probes(folder: Path, pool: Executor) -> None:
    list(pool.map(lambda sm: compile_one(PROBES, [sm], folder), ("90", "100", "120")))
    sass = sass_of(folder / f"{PROBES.stem}.{SASS_OF}.o")
    for wanted in ("UBLKCP", "STAS", "SYNCS.PHASECHK"):  # bulk copies, pushes, waits at an mbarrier
        if wanted not in sass:
            sys.exit(f"no {wanted} in the SASS of {PROBES.name}")
    print("the probes copy in bulk, push and wait at mbarriers")


def check_library(objects: list[Path], folder: Path, pool: Executor) -> None:
    def compile_host(name: str) -> Path:
        source, flags = sources[name]
        run(*toolchain.compiler(), *recipe.FLAGS, *flags, "-c", recipe.SOURCES / source, "-o", folder / f"{name}.o")
        return folder / f"{name}.o"

    cpu = native.library("cpu")
    sources, _ = recipe.of("cuda")
    objects = [*objects, *pool.map(compile_host, [name for name, (source, _) in sources.items() if ".cpp" in source])]
    # As `make prebuild` leaves it; and then as a machine finds it that has the GPU and no compiler.
    build.PREBUILT = folder / "packaged"
    library = build.PREBUILT / f"{recipe.key('cuda')}-{SASS_OF}" / "libse_fused_cuda.so"
    library.parent.mkdir(parents=True)
    torch_libraries = [
        "-L",
        Path(torch.__file__).parent / "lib",
        "-Xlinker",
        "--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
    ]
    run(toolchain.nvcc(), "-shared", *objects, "-o", library, *torch_libraries)
    manifest.write(library.parent, {"group": "cuda"}, [library.name])
    os.environ["CUDA_HOME"], gpus.here = str(folder), lambda: [90]
    if native.load("cuda", lambda path: (torch.ops.load_library(path), path)[1]) != library:
        sys.exit("a packaged library of these sources was not taken")
    known = set(SYMBOLS.read_text().split())
    for path in (library, cpu):
        undefined = re.findall(r"\b((?:aoti_)?torch_\w+)$", run("nm", "-D", "--undefined-only", path), re.MULTILINE)
        missing = sorted(set(undefined) - known)
        if not undefined or missing:
            sys.exit(f"{path.name} needs what torch 2.10 does not export: {missing}")
    if "CUDA: registered at" not in torch._C._dispatch_dump("se_fused::backward_out"):
        sys.exit("the library registers nothing for CUDA")
    print(
        "a packaged library is found without nvcc, loads beside a torch without CUDA and needs nothing after torch 2.10"
    )


def main() -> None:
    sources = sorted((recipe.SOURCES / "cuda").glob("*.cu"))
    registers: dict[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        jobs = {
            (source, together): pool.submit(compile_one, source, together, folder)
            for source in sources
            for together in TOGETHER
        }
        for (source, together), job in jobs.items():
            registers |= job.result()
            print(f"compiled {source.name} for sm_{', sm_'.join(together)}", flush=True)
        compare(registers, "--update" in sys.argv)
        objects = [folder / f"{source.stem}.{SASS_OF}.o" for source in sources]
        check_wide_accesses(objects, pool)
        check_probes(folder, pool)
        check_library(objects, folder, pool)


if __name__ == "__main__":
    main()
