"""Installs a copy of the checkout in many ways, each into its own environment.

Each way ends with native code that runs without a compiler, or fails and says how to mend it. The compiler gives out
what is built already (installation.py), except for the wheel.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from installation import ROOT, USE, Installation

from se_fused.native import manifest, recipe

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
_NOT_COPIED = (
    ".git", ".venv*", "_native", "build", "dist", "*.egg-info", "*_cache", ".hypothesis", "__pycache__", "demo_output",
    "gpu_check",
)  # fmt: skip


def environment(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """The Python of a new environment that has all packages of this one except se_fused and those of `without`."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not re.match("|".join(("se_fused", "__editable", *without)), path.name):
            (packages / path.name).symlink_to(path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(f"{packages}\n")
    return folder / "venv" / "bin" / "python"


class Place:
    def __init__(self, folder: Path) -> None:
        self.tools = Installation(folder / "tools")
        self.python = environment(folder)
        self.checkout = Path(shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*_NOT_COPIED)))
        self.environment = {**self.tools.environment, "PATH": f"{BIN}:{os.environ['PATH']}", "NO_COLOR": "1"}
        del self.environment["PYTHONPATH"]

    def run(self, line: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run shell code in the checkout; $PY is the environment's Python."""
        variables = {**self.environment, "PY": str(self.python), **more}
        return subprocess.run(
            line, shell=True, cwd=self.checkout, env=variables, capture_output=True, text=True, check=False, timeout=900
        )

    def served(self, **more: str) -> tuple[str, str]:
        """The backend without a compiler, a cache and the checkout, and what is printed."""
        nothing = {"CXX": "c+++", "PATH": "/nowhere", "SE_FUSED_CACHE": "/proc/se_fused"}
        done = subprocess.run(
            [self.python, "-c", USE], cwd=self.tools.folder, env={**self.environment, **nothing, **more}, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr


@pytest.fixture
def place(tmp_path):
    (tmp_path / "tools").mkdir()
    return Place(tmp_path)


WAYS = {
    "pip": "$PY -m pip install .",
    "pip without isolation": "$PY -m pip install --no-build-isolation .",
    "pip, editable": "$PY -m pip install -e .",
    "pip, editable without isolation": "$PY -m pip install --no-build-isolation -e .",
    "sdist": "$PY -m build --sdist && $PY -m pip install dist/*.tar.gz",
    "pip wheel": "$PY -m pip wheel --no-deps -w wheels . && $PY -m pip install wheels/*.whl",
    "build": "$PY -m build && $PY -m pip install dist/*.whl",
    "build without isolation": "$PY -m build --no-isolation && $PY -m pip install dist/*.whl",
    "uv": "uv pip install --no-deps --python $PY .",
    "uv without isolation": "uv pip install --no-deps --no-build-isolation --python $PY .",
    "uv, editable": "uv pip install --no-deps --python $PY -e .",
    "twice, after a change": (
        "$PY -m pip install . && echo >> csrc/se.h && $PY -m pip install --force-reinstall --no-deps ."
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_installation_has_native_code(place, way):
    done = place.run(WAYS[way])
    assert done.returncode == 0, done.stdout + done.stderr
    assert place.served() == ("cpu", "")
    assert place.tools.linked() == (2 if "twice" in way else 1)
    if "editable" not in way:
        (native,) = (place.python.parents[1] / "lib").glob("python*/site-packages/se_fused/_native")
        assert len(list(native.iterdir())) == 1, "nothing of an earlier build, and no lock"


# The environment variables, and the text of the error.
FAILURES = {
    "no compiler": ({"CXX": "c+++"}, "no C++ compiler: c+++ is not on the PATH; install one (apt install g++"),
    "a compiler that fails": ({"CXX": "false"}, "false gives no reason"),
    "a flag that does not exist": ({"CXX": "c++", "SE_FUSED_CXXFLAGS": "-fno-such"}, "-fno-such"),
    "no jobs": ({"MAX_JOBS": "none"}, "MAX_JOBS is 'none'; wanted a number of 1 or more"),
    "an unknown group": ({"SE_FUSED_BUILD": "gpu"}, "SE_FUSED_BUILD is 'gpu'; wanted none, all, or some of cpu, cuda"),
    "cuda without nvcc": (
        {"SE_FUSED_BUILD": "cpu,cuda", "CUDA_HOME": "/nowhere"},
        "no CUDA compiler: /nowhere/bin/nvcc",
    ),
    "an unknown GPU": (
        {"SE_FUSED_BUILD": "cuda", "CUDA_HOME": "{fake}", "TORCH_CUDA_ARCH_LIST": "9.0 Lovelace"},
        "TORCH_CUDA_ARCH_LIST has 'Lovelace'",
    ),
    "a GPU that is too old": (
        {"SE_FUSED_BUILD": "cuda", "CUDA_HOME": "{fake}", "TORCH_CUDA_ARCH_LIST": "6.0"},
        "the CUDA kernels need 7.5 or later",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_installation_without_native_code_fails_and_says_why(place, name):
    variables, words = FAILURES[name]
    fake = place.tools.folder / "cuda"
    (fake / "bin").mkdir(parents=True)
    shutil.copy(place.tools.folder / "compiler", fake / "bin" / "nvcc")
    variables = {key: value.format(fake=fake) for key, value in variables.items()}
    done = place.run("$PY -m pip install --no-build-isolation --no-deps .", **variables)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    assert "SE_FUSED_BUILD=none without native code)" in done.stdout + done.stderr
    assert place.run("cd / && $PY -c 'import se_fused'").returncode != 0, "nothing is installed"


def test_without_isolation_a_missing_package_is_named(place, tmp_path):
    place.python = environment(tmp_path / "bare", without=("ninja",))
    done = place.run("$PY -m pip install --no-build-isolation --no-deps .")
    assert done.returncode != 0
    assert "ninja is not installed: pip install ninja" in done.stdout + done.stderr


def test_asked_for_no_native_code_the_first_import_compiles(place):
    assert place.run("$PY -m pip install .", SE_FUSED_BUILD="none").returncode == 0
    cache = str(place.tools.cache)
    served, said = place.served(SE_FUSED_CACHE=cache)
    assert served == "reference"
    assert "c+++ is not on the PATH" in said
    served, said = place.served(SE_FUSED_CACHE=cache, CXX=place.environment["CXX"], PATH=os.environ["PATH"])
    assert served == "cpu"
    assert "compiling the CPU kernels" in said


def test_the_sdist_is_complete(place):
    done = place.run("make sdist VENV=$VENV", VENV=str(BIN.parent))
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (place.checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    wanted = {str(path.relative_to(place.checkout)) for path in place.checkout.rglob("*") if path.is_file()}
    wanted = {
        name for name in wanted if not re.match(r"dist/|build/|se_fused\.egg|\.git|\.pre-commit|\.coverage", name)
    }
    assert wanted - packed == set()
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `make wheel` makes with the real compilers, with CUDA for one architecture."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*_NOT_COPIED))
    names = ("CXX", "SE_FUSED_CXXFLAGS", "SE_FUSED_BUILD", "PYTHONPATH")
    variables = {key: value for key, value in os.environ.items() if key not in names}
    variables |= {"TORCH_CUDA_ARCH_LIST": "9.0"}
    done = subprocess.run(
        ["make", "wheel", f"VENV={BIN.parent}"],
        cwd=checkout,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    return wheel


@pytest.mark.long
def test_the_wheel(wheel, place):
    assert re.search(r"-cp\d+-cp\d+-manylinux_2_\d+_", wheel.name)
    shown = subprocess.run([BIN / "auditwheel", "show", wheel], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libtorch(_cuda|_python)?\.so with|libcud", shown), shown
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert {f"se_fused/csrc/{path.relative_to(ROOT / 'csrc')}" for path in recipe.SOURCES.rglob("*.h")} <= set(names)
    assert not [name for name in names if "/.lock" in name or name.startswith(("tests/", "benchmarks/", "dev/"))]
    # It is installed into an environment that has neither compiler nor ninja nor nvcc.
    place.python = environment(place.tools.folder / "bare", without=("ninja", "pybind11"))
    assert place.run(f"$PY -m pip install --no-deps {wheel}").returncode == 0
    assert place.served() == ("cpu", "")
    code = "import json; from se_fused import native; print(json.dumps(native.status()))"
    builds = json.loads(place.run(f'cd / && $PY -c "{code}"').stdout)["builds"]
    assert {build["group"] for build in builds} == ({"cpu", "cuda"} if shutil.which("nvcc") else {"cpu"})
    for build in builds:
        assert build["problem"] is None
        assert manifest.damage(Path(build["folder"])) is None
        assert build.get("architectures", ["90"]) == ["90"]
