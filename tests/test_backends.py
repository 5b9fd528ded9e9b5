"""Which backend serves a GPU, on a machine that has none: the compiled library is stood in for."""

import ctypes
import subprocess
import sys

import pytest
import torch

import se_fused
from se_fused import backends

GPU = torch.device("cuda:0")
LIMITS = [90, 132, 232448, 233472, 132, 66, 30, 15, 7, 4_250_000, 50 << 20]


class Library:
    """What backends.py calls of the CUDA library. reason: why it does not run on the device, or None; for_good: whether
    that will stay so."""

    def __init__(self, reason, for_good):
        self.reason, self.for_good, self.asked = reason, for_good, 0

    def se_fused_device_limits(self, index, limits):
        self.asked += 1
        answer = LIMITS if self.reason is None else [int(self.for_good)] + [0] * 10
        ctypes.memmove(limits, (ctypes.c_int64 * 11)(*answer), 88)
        return self.reason

    def se_fused_force_plan(self, text):
        pass


@pytest.fixture
def library(monkeypatch):
    def load(reason=None, for_good=True):
        found = Library(reason, for_good)
        monkeypatch.setattr(backends, "_cuda", found)
        monkeypatch.setattr(backends, "_gpus", {})
        monkeypatch.setattr(backends, "_said", set())
        monkeypatch.setitem(backends._unusable, "cuda", None)
        return found

    return load


OLD_DRIVER = "CUDA driver version is insufficient for CUDA runtime version"


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("reason", [OLD_DRIVER, "no kernel image is available for execution on the device"])
def test_a_gpu_that_the_library_does_not_run_on_is_served_by_another(library, monkeypatch, caplog, triton, reason):
    loaded = library(reason.encode())
    monkeypatch.setattr(backends, "_why_not_triton", lambda device: None if triton else "there is no triton")
    with se_fused.use_backend("auto"):
        assert [backends.select(GPU) for _ in range(3)] == ["triton" if triton else "reference"] * 3
        assert backends.takes_triton(GPU) is triton
        assert backends.explain(GPU).why_not["cuda"] == f"it does not run on cuda:0: {reason}"
    assert loaded.asked == 1, "a GPU is asked once"
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]
    with pytest.raises(RuntimeError, match=reason):
        backends.cuda_limits(0)
    with pytest.raises(se_fused.BackendUnavailable, match=reason), se_fused.use_backend("cuda"):
        backends.select(GPU)


def test_a_gpu_that_failed_for_what_may_pass_is_asked_again(library, monkeypatch):
    loaded = library(b"out of memory", for_good=False)
    monkeypatch.setattr(backends, "_why_not_triton", lambda device: "there is no triton")
    with se_fused.use_backend("auto"):
        assert backends.select(GPU) == "reference"
        loaded.reason = None
        assert backends.select(GPU) == "cuda"


def test_a_gpu_that_it_runs_on_is_asked_once(library):
    loaded = library()
    with se_fused.use_backend("auto"):
        assert backends.select(GPU) == "cuda"
    assert backends.cuda_limits(0) == LIMITS
    assert backends.why_not("cuda", torch.device("cpu")) == "it serves CUDA tensors; x is on cpu"
    assert loaded.asked == 1


def test_a_compiler_meets_the_first_call_that_falls_back(library, monkeypatch):
    library(OLD_DRIVER.encode())
    monkeypatch.setattr(backends, "_why_not_triton", lambda device: "there is no triton")

    def which(x):
        return x + 1 if backends.select(GPU) == "reference" else x

    torch._dynamo.reset()
    with se_fused.use_backend("auto"):
        assert float(torch.compile(which, fullgraph=True, backend="eager")(torch.zeros(()))) == 1


def test_a_compiler_takes_the_answer_and_does_not_look_inside(library):
    library()

    def which(x):
        return x + 1 if backends.select(GPU) == "cuda" else x

    torch._dynamo.reset()
    compiled = torch.compile(which, fullgraph=True, backend="eager")
    assert float(compiled(torch.zeros(()))) == 1


def test_importing_the_package_imports_no_compiler():
    code = "import sys, se_fused; print({'torch._dynamo', 'triton', 'rich', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_compiler_takes_the_limits_of_a_gpu_as_a_constant():
    def marked():
        pass

    torch.compiler.assume_constant_result(marked)
    assert vars(marked)
    assert vars(marked).items() <= vars(backends._ask_gpu).items()
