"""Finding the GPUs of a machine, and the architectures that the CUDA kernels are compiled for."""

import inspect
import re
import subprocess
import sys

import pytest
import torch.utils.cpp_extension

from se_fused.native import BuildError, gpus


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("9.0", ["90"]),
        ("8.0;9.0+PTX", ["80", "90+PTX"]),
        ("7.5, 8.6  9.0a", ["75", "86", "90a"]),
        ("Ampere", ["80", "86+PTX"]),
        ("Volta;Turing Hopper", ["75+PTX", "90+PTX"]),
        ("6.0 7.0+PTX 7.5", ["75"]),
        ("All", [*gpus.ARCHITECTURES[:-1], "120+PTX"]),
        ("native", ["89"]),
        ("", ["89"]),
    ],
)
def test_architectures_are_spelled_as_torch_spells_them(monkeypatch, asked, names):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(gpus, "here", lambda: [70, 89])
    assert gpus.architectures() == names


def test_every_name_that_torch_knows_is_known():
    names = inspect.getsource(torch.utils.cpp_extension._get_cuda_arch_flags)
    known = re.findall(r"\('([A-Z][\w+]+)', '([\d.;]+(?:\+PTX)?)'\)", names)
    assert len(known) > 10
    for name, value in known:
        modern = [word for word in value.split(";") if float(word.removesuffix("+PTX")) >= 7.5]
        assert gpus.NAMED[name].split() == modern, name


def test_without_a_gpu_all_architectures_are_compiled(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(gpus, "here", list)
    monkeypatch.setattr(sys, "executable", "")  # no process can ask torch
    assert gpus.architectures() == [*gpus.ARCHITECTURES[:-1], "120+PTX"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [("sm_90", "has 'sm_90'; wanted such as"), ("9.0 Lovelace", "has 'Lovelace'"), ("6.0;Volta", "need 7.5 or later")],
)
def test_an_architecture_that_nobody_knows(monkeypatch, asked, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(BuildError, match=message):
        gpus.architectures()


def test_gpus_are_found_without_nvml(monkeypatch):
    monkeypatch.setattr(gpus, "here", list)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    answer = subprocess.CompletedProcess([], 0, "(9, 0) (8, 6)\n", "")
    monkeypatch.setattr(gpus.subprocess, "run", lambda command, **_: answer)
    assert gpus.architectures() == ["86", "90"]


def test_for_gpus_that_are_too_old_nothing_is_compiled(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(gpus, "here", lambda: [70])
    with pytest.raises(BuildError, match=r"need compute capability 7\.5"):
        gpus.architectures()


@pytest.mark.parametrize(
    ("architectures", "gpu", "runs"),
    [
        (["80"], 86, True),
        (["86"], 80, False),
        (["80"], 90, False),
        (["80+PTX"], 90, True),
        (["90+PTX"], 80, False),
        (["75", "90"], 90, True),
        (["90a"], 90, True),
        (["100a"], 103, False),
        (["100a+PTX"], 120, False),
        (["100f+PTX"], 120, False),
        (["100"], 103, True),
    ],
)
def test_on_which_gpus_code_runs(architectures, gpu, runs):
    assert gpus.runs_on(architectures, gpu) is runs
