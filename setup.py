"""Adds the native code to the package: its sources always, and its libraries where torch is importable."""

import importlib.util
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent


def load_builder():
    spec = importlib.util.spec_from_file_location("se_fused_build", ROOT / "se_fused" / "build.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    return builder


class BuildWithNative(build_py):
    def run(self):
        super().run()
        package = ROOT / "se_fused" if self.editable_mode else Path(self.build_lib) / "se_fused"
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        if importlib.util.find_spec("torch") is None:
            print("se_fused: torch is not importable here (--no-build-isolation?): the first import will compile")
            return
        builder = load_builder()
        native = package / "_native"
        native.mkdir(exist_ok=True)
        import torch

        for group in ["cpu"] + ["cuda"] * (torch.version.cuda is not None):
            try:
                print(f"se_fused: native code in {builder.build(native, group)}")
            except builder.BuildError as error:
                print(f"se_fused: no native code: {error}")


class PlatformDistribution(Distribution):
    """The wheel holds compiled code though setuptools sees no extension module."""

    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildWithNative}, distclass=PlatformDistribution)
