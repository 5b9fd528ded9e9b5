"""Checks the fast arithmetic for half-precision maps on every float16 and bfloat16 number.

The emulated special function unit errs by its worst, in each combination of directions (dev/emulator/cuda_runtime.h).
Before a result is rounded to the map's type, it may be off by a quarter of that type's step.
"""

import ctypes
import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dev import emulator
from dev.emulator import DEVICE, FLAGS, ROOT
from se_fused.options import ACTIVATIONS

DTYPES = {torch.float16: 2, torch.bfloat16: 3}  # as enum DType of csrc/se.h
NAMES = ("silu", "hardswish")
DIRECTIONS = range(4)


class Library:
    """csrc/cuda/activations.cuh of the checkout at `root`, compiled with the host's compiler."""

    def __init__(self, root: Path, folder: Path) -> None:
        path = folder / "libhalf_activations.so"
        source, headers = ROOT / "tests/cuda/half_activations.cpp", ["-I", root / DEVICE, "-I", root / "csrc/cuda"]
        subprocess.run(["c++", *FLAGS.split(), "-O1", "-shared", *headers, source, "-o", path], check=True)
        self._call = ctypes.CDLL(str(path)).half_activations

    def __call__(self, name: str, x: Tensor, directions: int = 0, width: int = 8) -> tuple[Tensor, Tensor]:
        """The activation and its derivative, in float32."""
        padded = F.pad(x, (0, -len(x) % 8))
        y, slope = padded.float(), padded.float()
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (padded, y, slope))
        number = list(ACTIVATIONS).index(name)
        self._call(number, DTYPES[x.dtype], width, directions, *pointers, ctypes.c_int64(len(padded)))
        return y[: len(x)], slope[: len(x)]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return Library(ROOT, tmp_path_factory.mktemp("half"))


def finite(dtype: torch.dtype) -> Tensor:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    return every[every.isfinite()]


def truth(name: str, v: Tensor) -> tuple[Tensor, Tensor]:
    if name == "silu":
        s = v.sigmoid()
        return v * s, s * (1 + v * (-v).sigmoid())
    inside = torch.where(v <= -3, 0, v / 3 + 0.5)
    return v * (v + 3).clamp(0, 6) / 6, torch.where(v >= 3, 1, inside)


def step(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between the two numbers of `dtype` around each value."""
    info = torch.finfo(dtype)
    exponent = value.abs().clamp(min=info.tiny).frexp().exponent - 1
    return torch.full_like(value, info.eps).ldexp(exponent)


def errors(library: Library, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Names of results, each with its largest error in units of the allowed one."""
    x = finite(dtype)
    v = x.double()
    for name, directions in itertools.product(NAMES, DIRECTIONS):
        results, expected = library(name, x, directions), truth(name, v)
        for what, result, exact in zip(("", "'"), results, expected, strict=True):
            allowed = step(exact, dtype) / 4
            if (name, what) == ("silu", "'"):
                # Where the slope is 0 its terms of 0.2 cancel, and any float32 arithmetic errs by units in their last
                # place. Four float16 numbers lie so near and may be off by the smallest float16; no bfloat16 does.
                allowed = torch.where((v + 1.27846).abs() < 2**-9, 2**-24, allowed)
            error = ((result.double() - exact).abs() / allowed).nan_to_num(torch.inf)
            yield f"{name}{what} of {x[error.argmax()]}, directions {directions}", error.max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_is_right_to_a_quarter_of_a_step(half, dtype):
    assert len(finite(dtype)) == {torch.float16: 63488, torch.bfloat16: 65280}[dtype]
    assert [(what, error) for what, error in errors(half, dtype) if error >= 1] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_value_alone_has_the_bits_that_it_has_in_a_vector(half, dtype, name):
    x = finite(dtype)
    for alone, together in zip(half(name, x, width=1), half(name, x, width=8), strict=True):
        assert torch.equal(alone.view(torch.int32), together.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_nan_and_infinities_are_as_in_pytorch(half, dtype, name, directions):
    v = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3.0, -3.0, torch.finfo(dtype).min], dtype=dtype)
    y, slope = half(name, v, directions)
    leaf = v.float().requires_grad_()
    expected = ACTIVATIONS[name](leaf)
    (expected_slope,) = torch.autograd.grad(expected.sum(), leaf)
    if name == "hardswish":
        expected_slope[0] = torch.nan  # PyTorch gives NaN in a vector, but the incoming gradient at a row's end
    torch.testing.assert_close(y, expected.detach(), equal_nan=True)
    torch.testing.assert_close(slope, expected_slope, equal_nan=True)
    zero = expected.detach() == 0
    assert torch.equal(y[zero].signbit(), expected.detach()[zero].signbit())


# Name: a file, the text that stands there once, its replacement, and the type that shows the error.
FAULTS = {
    "a reciprocal off by a thousandth": (f"{DEVICE}/cuda_runtime.h", "1 / double{v}", "1.001 / double{v}", *DTYPES),
    "an exponential off by a thousandth": (f"{DEVICE}/cuda_runtime.h", "std::exp2(", "1.001 * std::exp2(", *DTYPES),
    "a sixth off by a thousandth": ("csrc/cuda/activations.cuh", "1.0f / 6", "1.001f / 6", *DTYPES),
    "a third off by a thousandth": ("csrc/cuda/activations.cuh", "1.0f / 3", "1.001f / 3", *DTYPES),
    "a sigmoid that ends too soon": ("csrc/cuda/activations.cuh", "? 16 : 0", "? 0 : 0", torch.bfloat16),
    "1 - sigmoid by a difference": ("csrc/cuda/activations.cuh", "v, e * r,", "v, 1 - kUnit<T> * r,", *DTYPES),
    "infinity times 0": (
        "csrc/cuda/activations.cuh",
        "sigmoid_exponent<T>(v), 127.0f",
        "sigmoid_exponent<T>(v), 200.0f",
        *DTYPES,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_error_is_found(name, tmp_path):
    file, old, new, *dtypes = FAULTS[name]
    emulator.patched(tmp_path, file, old, new)
    library = Library(tmp_path, tmp_path)
    for dtype in dtypes:
        assert any(error >= 1 for _, error in errors(library, dtype))
