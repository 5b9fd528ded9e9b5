"""Describes the installation, for `python -m se_fused info`."""

from __future__ import annotations

import contextlib
import os
import platform
from typing import Any

import torch
from rich.table import Table

import se_fused

from . import backends, native
from .native import BuildError

VARIABLES = (
    "SE_FUSED_BACKEND", "SE_FUSED_CPU", "SE_FUSED_CACHE", "SE_FUSED_CXXFLAGS",
    "CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS",
)  # fmt: skip


def _devices() -> list[str]:
    return ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def facts() -> dict[str, Any]:
    """Collect versions, builds of the native code, environment variables, and for each device and backend the reason
    why the backend cannot run on it, or None."""
    found: dict[str, Any] = {
        "se_fused": se_fused.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    # If the extension module is not loaded, asking it for the CPU's features would compile it.
    found["cpu_features"] = None
    if backends.CPU.why_not(torch.device("cpu")) is None:
        with contextlib.suppress(BuildError):  # only the module may be missing; the list of builds says why
            found["cpu_features"] = native.load_extension().cpu_features()
    found["native"] = native.status()
    found["environment"] = {name: os.environ.get(name) for name in VARIABLES}
    found["backends"] = {
        device: {name: backend.why_not(torch.device(device)) for name, backend in backends.ALL.items()}
        for device in _devices()
    }
    return found


def table(facts: dict[str, Any], encoding: str) -> Table:
    """Format `facts` for a terminal with this encoding."""
    rows = Table(show_header=False)
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")  # not cut short, so that a path can be copied

    def add(name: str, text: str) -> None:  # a path may have characters that this terminal cannot show
        rows.add_row(name, text.encode(encoding, "backslashreplace").decode(encoding))

    for name, value in facts.items():
        if name == "environment":
            for variable, setting in value.items():
                add(variable, "not set" if setting is None else setting)
        elif name == "backends":
            for device, reasons in value.items():
                for backend, reason in reasons.items():
                    add(f"{backend} on {device}", reason or "usable")
        elif name == "native":
            for build in value["builds"]:
                add(f"build in the {build['place']}", _describe(build))
            if value["others"]:
                add("for other sources, flags or Pythons", "\n".join(value["others"]))
            for tool in ("cache", "compiler", "nvcc", "ninja"):
                add(tool, value[tool])
        elif value is not None:
            add(name, ", ".join(value) if isinstance(value, list) else str(value))
    return rows


def _describe(build: dict[str, Any]) -> str:
    """A build in lines of text: its group and targets, date and compiler, folder, and problem."""
    targets = build.get("architectures") or build.get("instruction_sets") or ["?"]
    lines = [
        f"{build.get('group')} kernels for {', '.join(map(str, targets))}",
        f"built {build.get('built')} by {build.get('nvcc') or build.get('compiler')}",
        build["folder"],
        f"problem: {build['problem']}" if build["problem"] else "no problem",
    ]
    return "\n".join(lines)
