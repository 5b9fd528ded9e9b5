"""The forward pass against the reference in float64."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, Case, assert_close, call, cases, in_pytorch, truth
from hypothesis import given, settings

import se_fused
from se_fused.options import ACTIVATIONS, SQUEEZES

pytestmark = pytest.mark.usefixtures("native")


@given(cases())
@settings(max_examples=600)
def test_every_option_shape_dtype_and_layout(case):
    tensors = case.tensors()
    with torch.no_grad():
        y = call(se_fused.squeeze_excite, tensors, case.options)
        eager = tensors["x"] * torch.ones(case.n, case.c, *(1,) * len(case.spatial), dtype=case.dtype)
    assert y.dtype == case.dtype
    assert [s for s, size in zip(y.stride(), y.shape, strict=True) if size > 1] == [
        s for s, size in zip(eager.stride(), y.shape, strict=True) if size > 1
    ]
    assert_close(y, truth(tensors, case.options), case.dtype)


@given(cases(layouts=("contiguous", "channels_last", "every_second", "some_channels", "transposed", "offset")))
@settings(max_examples=150)
def test_in_place_writes_the_same_over_x(case):
    tensors = case.tensors()
    with torch.no_grad():
        y = call(se_fused.squeeze_excite, tensors, case.options)
        x, strides, version = tensors["x"], tensors["x"].stride(), tensors["x"]._version
        out = call(se_fused.squeeze_excite, tensors, case.options, inplace=True)
    assert out is x
    assert x.stride() == strides
    assert x._version > version
    assert torch.equal(x, y) or torch.equal(x.isnan(), y.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize(
    ("n", "c", "r", "spatial"),
    [
        (1, 16, 1, (7, 7)),  # rows of 49, R = 1
        (3, 54, 8, (2, 14, 14)),  # C is no multiple of 4
        (2, 440, 110, (7, 7)),  # weights are larger than the maps: several samples share one pass over them
        (9, 308, 77, (3, 3)),  # an odd number of samples for two threads
        (1, 96, 4, (56, 56)),  # the threads share one sample
        (4, 24, 6, (33, 31)),  # one sample per thread
        (1, 4920, 13, (1, 1)),  # L = 1, more channels than a block
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_real_and_odd_shapes(dtype, squeeze, n, c, r, spatial, layout):
    case = Case(n=n, c=c, r=r, spatial=spatial, dtype=dtype, layout=layout, options={"squeeze": squeeze})
    tensors = case.tensors()
    with torch.no_grad():
        assert_close(call(se_fused.squeeze_excite, tensors, case.options), truth(tensors, case.options), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("place", ["act", "pre_act", "post_act"])
def test_special_values_stay_in_their_sample(place, name, squeeze, layout):
    """NaN, infinities, signed zeros and extreme magnitudes give what they give in eager PyTorch."""
    specials = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e38, -1e38, 1e-40]
    case = Case(n=len(specials) + 1, c=9, r=3, layout=layout, options={place: name, "squeeze": squeeze})
    tensors = case.tensors()
    for sample, value in enumerate(specials):
        tensors["x"][sample, 4, 2, 3] = value
    with torch.no_grad():
        y = call(se_fused.squeeze_excite, tensors, case.options)
        expected = in_pytorch(tensors, case.options)
    for sample in range(case.n):  # each by itself, because the largest value sets the tolerance
        assert_close(y[sample], expected[sample].double(), torch.float32, f"sample {sample}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("pre_act", [None, "relu", "silu"])
@pytest.mark.parametrize("name", ["scale", "shift", "x"])
def test_special_values_by_way_of_scale_and_shift_stay_in_their_channel(name, pre_act, squeeze, layout):
    """An infinity times 0 is NaN, as in eager PyTorch."""
    specials = [float("nan"), float("inf"), -float("inf"), 0.0, 1e30, -1e30]
    case = Case(n=2, c=len(specials) + 1, r=3, layout=layout, affine=True, bias=False)
    options = {"pre_act": pre_act, "squeeze": squeeze}
    for value in specials:
        tensors = case.tensors()
        tensors["scale"][1] = 0
        tensors[name][(1, 1, 2, 3) if name == "x" else 1] = value
        with torch.no_grad():
            y = call(se_fused.squeeze_excite, tensors, options)
            expected = in_pytorch(tensors, options)
        for channel in range(case.c):  # each by itself, because the largest value sets the tolerance
            assert_close(y[:, channel], expected[:, channel].double(), torch.float32, f"{value}, channel {channel}")


def test_half_precision_sums_do_not_overflow():
    case = Case(c=8, r=2, spatial=(64, 64), dtype=torch.float16)
    tensors = case.tensors()
    tensors["x"].fill_(60000)
    tensors["w1"].mul_(1e-4)
    with torch.no_grad():
        assert_close(call(se_fused.squeeze_excite, tensors, {}), truth(tensors, {}), torch.float16)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_run_nor_batch_nor_threads(dtype, layout):
    case = Case(n=13, c=200, r=30, spatial=(28, 28), dtype=dtype, layout=layout, options={"squeeze": "mean_max"})
    tensors = case.tensors()
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            y = call(se_fused.squeeze_excite, tensors, case.options)
            assert torch.equal(y, call(se_fused.squeeze_excite, tensors, case.options))
            torch.set_num_threads(1)
            assert torch.equal(y, call(se_fused.squeeze_excite, tensors, case.options))
            torch.set_num_threads(3)
            assert torch.equal(y, call(se_fused.squeeze_excite, tensors, case.options))
            alone = call(se_fused.squeeze_excite, {**tensors, "x": tensors["x"][7:8]}, case.options)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(y[7:8], alone)


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 8, 0, 5), (2, 8, 0)])
def test_empty_maps_behave_as_the_reference(shape):
    tensors = {**Case(c=8, r=2).tensors(), "x": torch.randn(shape, requires_grad=True)}
    leaves = [t.requires_grad_() for name, t in tensors.items() if t is not None]
    y, expected = (call(f, tensors, {}) for f in (se_fused.squeeze_excite, se_fused.reference.squeeze_excite))
    assert y.shape == expected.shape
    grads, wanted = (torch.autograd.grad(out.sum(), leaves) for out in (y, expected))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, equal_nan=True)


def test_layouts_are_what_their_names_say():
    t = torch.randn(2, 16, 5, 7)
    assert not LAYOUTS["every_second"](t).is_contiguous()
    assert LAYOUTS["channels_last"](t).is_contiguous(memory_format=torch.channels_last)
    assert LAYOUTS["offset"](t).data_ptr() % 16 != 0
    assert all(torch.equal(LAYOUTS[name](t), t) for name in LAYOUTS if name != "expanded")
