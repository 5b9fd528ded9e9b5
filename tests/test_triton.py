"""The Triton kernels against the reference in float64: on a GPU where there is one, else in Triton's interpreter."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from cases import DTYPES, Case, assert_close, call, cases, in_float64, truth
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_gradients import NAMES, ORDER_KEEPING, gradients

import se_fused
from se_fused import arguments, backends, reference
from se_fused.reference import ACTIVATIONS, SQUEEZES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

triton = pytest.importorskip("se_fused.triton")
from se_fused.triton import launch, plan  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where infinities and NaN are meant


@pytest.fixture(autouse=True)
def forced():
    with se_fused.use_backend("triton"):
        assert backends.why_not("triton", DEVICE) is None, backends.why_not("triton", DEVICE)
        yield


@contextmanager
def launches(how):
    """`one`: a program for each sample. `three`: as on large maps, in small tiles, so that small maps have many."""
    limits = {"one": {"_ONE_PROGRAM_ELEMENTS": 2**40}, "three": {"_ONE_PROGRAM_ELEMENTS": 0, "_FORWARD_BYTES": 16}}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ordinary": {}, **limits}[how].items():
            patch.setattr(plan, name, value)
        plan.plan.cache_clear()
        yield
    plan.plan.cache_clear()


HOW = st.sampled_from(["one", "three", "ordinary"])


def on_device(tensors):
    moved = {name: t if t is None else t.to(DEVICE) for name, t in tensors.items()}
    if tensors["residual"] is tensors["x"]:
        moved["residual"] = moved["x"]
    return moved


def check_forward(case, how):
    tensors = on_device(case.tensors())
    with torch.no_grad(), launches(how):
        y = call(se_fused.squeeze_excite, tensors, case.options)
    assert y.dtype == case.dtype
    assert_close(y, truth(tensors, case.options), case.dtype)


def check_gradients(case, how):
    tensors = on_device(case.tensors())
    g = torch.randn_like(tensors["x"])
    with launches(how):
        actual = gradients(se_fused.squeeze_excite, tensors, case.options, g)
    with se_fused.use_backend("reference"):
        expected = gradients(reference.squeeze_excite, in_float64(tensors), case.options, g.double())
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert_close(grad, expected[name], grad.dtype, f"gradient of {name}", factor=4)


@given(cases(), HOW)
@settings(max_examples=100, phases=(Phase.explicit, Phase.generate))
def test_every_option_shape_dtype_and_layout(case, how):
    check_forward(case, how)


@given(cases(pre_acts=ORDER_KEEPING), HOW)
@settings(max_examples=100, phases=(Phase.explicit, Phase.generate))
def test_every_gradient(case, how):
    check_gradients(case, how)
