"""Adds the native code to the package: its sources and its libraries. If a library cannot be built, installation fails.

Environment: SE_FUSED_BUILD says what to build: "cpu", "cpu,cuda", "all" (cuda only if there is nvcc) or "none" (then
the first import compiles). If it is not set: cpu, and also cuda if there is nvcc and either a GPU or
TORCH_CUDA_ARCH_LIST.
"""

import os
import shutil
import sys
import types
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
# Makes se_fused.native importable without importing se_fused, which needs torch.
sys.modules["se_fused"] = types.ModuleType("se_fused")
sys.modules["se_fused"].__path__ = [str(ROOT / "se_fused")]
from se_fused.native import BuildError, build, gpus, recipe, toolchain  # noqa: E402


def groups():
    """The groups to build. Raises BuildError if SE_FUSED_BUILD names one that does not exist."""
    asked = os.environ.get("SE_FUSED_BUILD", "").strip()
    if asked == "none":
        return []
    if asked not in ("", "all"):
        chosen = [name.strip() for name in asked.split(",")]
        if not set(chosen) <= set(recipe.GROUPS):
            raise BuildError(f"SE_FUSED_BUILD is {asked!r}; wanted none, all, or some of {', '.join(recipe.GROUPS)}")
        return chosen
    try:
        toolchain.nvcc()
    except BuildError:
        return ["cpu"]
    wanted = asked or os.environ.get("TORCH_CUDA_ARCH_LIST") or any(gpu >= gpus.OLDEST for gpu in gpus.here())
    return ["cpu", "cuda"] if wanted else ["cpu"]


class Log(build.Watcher):
    """Prints the steps of a compilation to the log of the installation."""

    def waits(self):
        print(build.WAITING, flush=True)

    def begins(self):
        print("se_fused: compiling", flush=True)

    def step(self, done, steps):
        print(f"se_fused: compiled {done} of {steps}", flush=True)


class BuildWithNative(build_py):
    def run(self):
        package = ROOT / "se_fused" if self.editable_mode else Path(self.build_lib) / "se_fused"
        if not self.editable_mode:  # no file of an earlier build may get into a wheel
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", package / "csrc")
        native = package / build.PREBUILT.name
        native.mkdir(exist_ok=True)
        try:
            chosen = groups()
            if "cuda" in chosen:  # report a wrong request before anything is compiled
                toolchain.nvcc()
                gpus.architectures()
            for group in chosen:
                print(f"se_fused: native code in {build.build(native, group, Log())}", flush=True)
        except BuildError as error:
            ways = "SE_FUSED_BUILD=cpu installs without CUDA kernels, SE_FUSED_BUILD=none without native code"
            raise SystemExit(f"se_fused: {error}\n({ways})") from error
        if not self.editable_mode:
            (native / ".lock").unlink(missing_ok=True)


class PlatformDistribution(Distribution):
    """Marks the wheel as holding compiled code, although setuptools sees no extension module."""

    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildWithNative}, distclass=PlatformDistribution)
