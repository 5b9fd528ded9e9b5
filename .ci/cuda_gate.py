"""Compiles the CUDA kernels for every architecture, without a GPU, and fails if they would be slow or would not load.

It fails on a warning, local memory (spilled registers, arrays), static shared memory, registers or instructions that
differ from the committed tables (`--update` rewrites both), a hot kernel without 16-byte loads and stores, a vector
loop that reads shared memory in pieces, and a library that torch cannot load or that needs a symbol which torch 2.10
does not have.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path

import sass
import torch
import triton

import se_fused  # noqa: F401  defines the operators that the library registers for
from se_fused import native
from se_fused.native import build, gpus, manifest, recipe, toolchain

ROOT = Path(__file__).resolve().parents[1]
REGISTERS, INSTRUCTIONS = (ROOT / "csrc" / "cuda" / name for name in ("registers.csv", "instructions.csv"))
SYMBOLS = ROOT / "tests" / "cuda" / "torch_2_10_symbols.txt"
MICROBENCHMARKS = ROOT / "dev" / "microbenchmarks" / "microbenchmarks.cu"
SASS_OF = "90"
# Those of one major version, and all from 10.0 on, are compiled together: they share the steps up to PTX, which take
# half the time. sm_120 had the same machine code from sm_100's PTX as from its own.
TOGETHER = [tuple(group) for _, group in groupby(gpus.ARCHITECTURES, lambda sm: min(int(sm) // 10, 10))]
LONGEST = (
    "forward_two_pass",
    "backward_two_pass",
    "backward_cluster",
)  # first, so that no core ends long before another
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# They move maps.
HOT = "(squeeze|scale|batch_norm|backward_reduce|backward_apply|forward_cluster|backward_cluster)_kernel"

Code = dict[tuple[str, str], list[sass.Instruction]]  # by kernel and architecture


def run(*command: str | Path, folder: Path | None = None, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, **environment}
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def short(names: list[str]) -> list[str]:
    """The demangled names, without namespaces, parameters and the reductions' pack of parameter types."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = []
    for name in text.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|se::cuda::|se::|^void ", "", name)
        name = re.sub(r"\(.*", "", name).replace(" >", ">")
        short.append(re.sub(r"(Reduction<.*>), (long, long, int|Elementwise, Divisor)\b.*>$", r"\1>", name))
    return short


def compile_one(source: Path, architectures: Sequence[str], folder: Path) -> dict[tuple[str, str], int]:
    """The registers of each kernel on each architecture. All use the PTX of the first. The object stays in `folder`."""
    first = architectures[0]
    kind = "-c" if SASS_OF in architectures else "-fatbin"
    code = f"-gencode=arch=compute_{first},code=[{','.join(f'sm_{sm}' for sm in architectures)}]"
    flags = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-Werror", code, kind]
    log = run(toolchain.nvcc(), *recipe.NVCC_FLAGS, *flags, source, "-o", folder / f"{source.stem}.{first}.o")
    pattern = r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?Used (\d+) registers([^\n]*)"
    found = re.findall(pattern, log, re.DOTALL)
    if re.search(r"[1-9]\d* bytes stack frame", log):
        sys.exit(f"a kernel of {source.name} has variables in local memory:\n{log}")
    for name, sm, _, rest in found:
        if "smem" in rest:
            sys.exit(f"{name} for sm_{sm} has static shared memory:{rest}")
    kernels = short([name for name, *_ in found])
    return {(kernel, sm): int(count) for kernel, (_, sm, count, _) in zip(kernels, found, strict=True)}


def examine(folder: Path, job: tuple[Path, Sequence[str]]) -> tuple[dict[tuple[str, str], int], Code]:
    source, together = job
    registers = compile_one(source, together, folder)
    return registers, disassemble(folder / f"{source.stem}.{together[0]}.o")


def compare(table: Path, columns: Sequence[str], rows: list[list[str]], update: bool) -> list[str]:
    """Return how the rows differ from the committed table; with `update`, rewrite the table."""
    version = re.search(r"release ([\d.]+)", run(toolchain.nvcc(), "--version"))
    assert version is not None
    header = [f"{table.stem}, nvcc {version[1]}", *columns]
    if update:
        with table.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
        return []
    with table.open(newline="") as file:
        known = list(csv.reader(file))
    if known[0] != header:
        print(f"the table is of '{known[0][0]}', this is '{header[0]}': not compared")
        return []
    if known[1:] == rows:
        return []
    changed = [row for row in rows if row not in known] + [["gone:", *row] for row in known[1:] if row not in rows]
    return [f"{table.name} differs; .ci/cuda_gate.py --update rewrites it:", *map(" ".join, changed)]


def compare_registers(registers: dict[tuple[str, str], int], update: bool) -> list[str]:
    kernels = sorted({kernel for kernel, _ in registers})
    rows = [[kernel, *(str(registers[kernel, sm]) for sm in gpus.ARCHITECTURES)] for kernel in kernels]
    return compare(REGISTERS, [f"sm_{sm}" for sm in gpus.ARCHITECTURES], rows, update)


def sass_of(path: Path) -> str:
    return run(TOOLS / "cuobjdump", "-sass", path, PATH=f"{TOOLS}:{os.environ['PATH']}")


def disassemble(binary: Path) -> Code:
    folder = binary.with_suffix(".cubins")
    folder.mkdir()
    run(TOOLS / "cuobjdump", "-xelf", "all", binary, folder=folder)
    code: Code = {}
    for cubin in sorted(folder.iterdir()):
        functions = sass.read(run(TOOLS / "nvdisasm", "-c", cubin))
        sm = cubin.stem.rpartition("_")[2]
        code |= {(name, sm): lines for name, lines in zip(short(list(functions)), functions.values(), strict=True)}
    return code


def compare_instructions(loops: dict[tuple[str, str], list[sass.Loop]], update: bool) -> list[str]:
    """Compare one row per vector loop and per group of architectures on which the loop costs the same."""
    same: dict[tuple[str, int, tuple[str, ...]], list[str]] = defaultdict(list)
    for (name, sm), of in sorted(loops.items(), key=lambda item: gpus.ARCHITECTURES.index(item[0][1])):
        for number, loop in enumerate(of):
            same[name, number, loop.row()].append(sm)
    known = sorted(same.items(), key=lambda item: (item[0][:2], gpus.ARCHITECTURES.index(item[1][0])))
    rows = [[name, str(number), " ".join(sms), *row] for (name, number, row), sms in known]
    return compare(INSTRUCTIONS, ["loop", "sm", *sass.COLUMNS], rows, update)


def is_hot(name: str, sm: str) -> bool:
    """Whether the kernel moves maps in 16-byte accesses."""
    if "double" in name or not re.match(HOT, name):
        return False
    if "_cluster_kernel" in name and int(sm) < 80:
        return False  # empty
    width = re.search(r"NhwcTile<\w+, (\d+)|\b(?:Row|Position)Reduction<(\d+)", name)
    element = 2 if re.search("__half|__nv_bfloat16", name) else 4
    return not width or int(width[1] or width[2]) * element >= 16


def faults(name: str, sm: str, code: Sequence[sass.Instruction], loops: Sequence[sass.Loop]) -> list[str]:
    """What would make a hot kernel slow."""
    cluster, reduces = "_cluster_kernel" in name, "Reduction<" in name
    wanted = {"LDGSTS", "STG"} if cluster else {"LDG"} if reduces else {"LDG", "STG"}
    if "StagedRowReduction<" in name and int(sm) >= 80:
        wanted = {"LDGSTS"}  # sm_75 does not have it
    if name.startswith("backward_cluster"):
        wanted.add("LDG")  # forward_cluster_kernel may have no residual
    missing = sorted(wanted - {one.kind for one in code})
    return [f"no {kind}.128" for kind in missing] + (sass.pieces(code, loops) if cluster else [])


def check_hot_kernels(code: Code, loops: dict[tuple[str, str], list[sass.Loop]]) -> list[str]:
    guilty: dict[str, list[str]] = defaultdict(list)
    for sm in gpus.ARCHITECTURES:
        hot = sorted(name for name, of in code if of == sm and is_hot(name, sm))
        if len(hot) < 20:
            sys.exit(f"only {len(hot)} hot kernels found in the SASS for sm_{sm}")
        for name in hot:
            if found := faults(name, sm, code[name, sm], loops[name, sm]):
                guilty[f"{name}: {'; '.join(found)}"].append(f"sm_{sm}")
    if not guilty:
        print("16-byte accesses in all hot kernels")
    return sorted(f"{what} ({', '.join(sms)})" for what, sms in guilty.items())


def check_microbenchmarks(folder: Path, pool: Executor) -> None:
    list(pool.map(lambda sm: compile_one(MICROBENCHMARKS, [sm], folder), ("90", "100", "120")))
    sass = sass_of(folder / f"{MICROBENCHMARKS.stem}.{SASS_OF}.o")
    for wanted in ("UBLKCP", "STAS", "SYNCS.PHASECHK"):  # bulk copies, pushes, waits at an mbarrier
        if wanted not in sass:
            sys.exit(f"no {wanted} in the SASS of {MICROBENCHMARKS.name}")
    print("the microbenchmarks copy in bulk, push and wait at mbarriers")


def check_library(objects: list[Path], folder: Path, pool: Executor) -> None:
    def compile_host(name: str) -> Path:
        source, flags = sources[name]
        run(*toolchain.compiler(), *recipe.FLAGS, *flags, "-c", recipe.SOURCES / source, "-o", folder / f"{name}.o")
        return folder / f"{name}.o"

    cpu = native.library("cpu")
    sources, _ = recipe.of("cuda")
    objects = [*objects, *pool.map(compile_host, [name for name, (source, _) in sources.items() if ".cpp" in source])]
    # The library is packaged as `make prebuild` does, and then loaded as on a machine with the GPU but no compiler.
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
        jobs = [(source, together) for source in sources for together in TOGETHER]
        jobs.sort(key=lambda job: LONGEST.index(job[0].stem) if job[0].stem in LONGEST else len(LONGEST))
        update = "--update" in sys.argv
        code: Code = {}
        for (source, together), (found, part) in zip(jobs, pool.map(partial(examine, folder), jobs), strict=True):
            registers |= found
            code |= part
            print(f"compiled {source.name} for sm_{', sm_'.join(together)}", flush=True)
        loops = {key: sass.vector_loops(lines) for key, lines in code.items()}
        failed = compare_registers(registers, update) + compare_instructions(loops, update)
        failed += check_hot_kernels(code, loops)
        check_microbenchmarks(folder, pool)
        check_library([folder / f"{source.stem}.{SASS_OF}.o" for source in sources], folder, pool)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
