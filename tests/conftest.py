import gc
import importlib.util
import os
import re

# What is imported stays: to look through it for garbage again and again took 4 % of the time.
gc.disable()
# Before torch loads OpenMP: two processes of two threads that spin while they wait took 13 % more time on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
import triton_interpreter
from hypothesis import settings

# Before anything imports triton.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    triton_interpreter.enable()

import se_fused
from se_fused import backends, invariance

# The same examples on every machine; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items):
    """The long tests come first: at the end, one process ran alone for 40 s."""
    gc.freeze()
    gc.enable()
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


# pytest-xdist runs one process for each core; two threads still take every parallel path.
torch.set_num_threads(2)


@pytest.fixture
def native():
    """The compiled CPU backend, or a failure that says why it is not there: no test of it may pass on the reference."""
    with se_fused.use_backend("cpu"):
        assert (reason := backends.CPU.why_not(torch.device("cpu"))) is None, reason
        yield


@pytest.fixture
def exact_convolutions():
    """On GPUs PyTorch's convolutions of float32 maps are in TF32 otherwise."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture
def one_thread():
    """For many small operators, whose parallel regions crawl where processes have more threads than there are cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_violations = {}


@pytest.fixture
def known_layers(monkeypatch):
    """Layers of one class and structure, whatever their sizes, are examined on the meta device once in a process, whose
    57 runs take most of the time of `replace`. For tests in which it is certain what is recognised."""
    examine = invariance.violation

    def violation(layer, recognised, dims):
        if hasattr(layer, "_program"):  # a part of a forward, which its class and children do not tell
            return examine(layer, recognised, dims)
        key = type(layer), re.sub(r"\d+", "", f"{layer} {recognised}"), dims
        if key not in _violations:
            _violations[key] = examine(layer, recognised, dims)
        return _violations[key]

    monkeypatch.setattr(invariance, "violation", violation)


@pytest.fixture
def place(tmp_path):
    """An installation to break (installation.py)."""
    from installation import Installation

    return Installation(tmp_path)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The name of a module of models that can be imported."""
    from command_line import MODEL

    name = f"models_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name
