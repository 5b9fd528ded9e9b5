"""The Triton kernels against the reference in float64: on a GPU if there is one, else in Triton's interpreter."""

import math
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from cases import Case, assert_close, call, cases, in_float64, in_pytorch, truth
from gradients import ORDER_KEEPING, gradients
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import se_fused
from se_fused import backends, reference
from se_fused.backends import Cuda, Triton, forcing
from se_fused.backends.choice import Choice
from se_fused.options import ACTIVATIONS, SQUEEZES, Options

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

triton = pytest.importorskip("se_fused.triton")
from se_fused.triton import launch, plan  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about intended infinities and NaN


@pytest.fixture(autouse=True)
def forced():
    with se_fused.use_backend("triton"):
        assert (reason := backends.ALL["triton"].why_not(DEVICE)) is None, reason
        yield


@contextmanager
def launches(how):
    """Makes small maps plan as larger ones do, with tiles so small that there are several."""
    limits = {
        "one program per sample": {"_MAX_WARPS": 1},
        "three launches": {"_ONE_PROGRAM_ELEMENTS": 0, "_FORWARD_BYTES_PER_THREAD": 16},
        "groups of samples": {"_ONE_PROGRAM_ELEMENTS": 0, "_PROGRAMS": 1},
        "as planned": {},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits[how].items():
            patch.setattr(plan, name, value)
        plan.plan.cache_clear()
        yield
    plan.plan.cache_clear()


NO_SHRINKING = (Phase.explicit, Phase.generate)  # shrinking takes minutes in the interpreter
HOW = ["one program per sample", "three launches", "groups of samples", "as planned"]


def small(case):
    """Limits a case to 3 samples of about 1500 elements: the interpreter takes up to 1 ms per line of a program."""
    spatial = case.spatial
    while case.c * math.prod(spatial) > 1500 and max(spatial) > 1:
        spatial = tuple((size + 1) // 2 for size in spatial)
    return replace(case, n=min(case.n, 3), spatial=spatial)


def check_forward(case, how):
    tensors = case.tensors(DEVICE)
    with torch.no_grad(), launches(how):
        y = call(se_fused.squeeze_excite, tensors, case.options)
    assert y.dtype == case.dtype
    assert_close(y, truth(tensors, case.options), case.dtype)


def check_gradients(case, how):
    tensors = case.tensors(DEVICE)
    g = torch.randn_like(tensors["x"])
    with launches(how):
        actual = gradients(se_fused.squeeze_excite, tensors, case.options, g)
    with se_fused.use_backend("reference"):
        expected = gradients(reference.squeeze_excite, in_float64(tensors), case.options, g.double())
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert_close(grad, expected[name], grad.dtype, f"gradient of {name}", factor=4)


@pytest.mark.long
@given(cases().map(small), st.sampled_from(HOW))
@settings(max_examples=40, phases=NO_SHRINKING)
def test_every_option_shape_dtype_and_layout(case, how):
    check_forward(case, how)


@given(cases(pre_acts=ORDER_KEEPING, affines=(False,)).map(small), st.sampled_from(HOW))
@settings(max_examples=25, phases=NO_SHRINKING)
def test_every_gradient(case, how):
    check_gradients(case, how)


@pytest.mark.parametrize("how", HOW[:3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("n", "c", "r", "spatial"),
    [
        (2, 96, 24, (7, 7)),  # rows of 49
        (3, 54, 8, (14, 14)),  # C is not a multiple of 4
        (4, 308, 77, (1, 1)),  # L = 1; the weights are larger than the maps
        (1, 3, 1, (33, 31)),  # a row longer than a tile
        (2, 40, None, (5, 5)),  # the one-FC form
    ],
)
def test_real_and_odd_shapes(n, c, r, spatial, layout, how):
    check_gradients(Case(n=n, c=c, r=r, spatial=spatial, layout=layout, options={"squeeze": "mean_max"}), how)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("place", "squeeze"), [("act", "mean"), ("pre_act", "max"), ("post_act", "mean")])
def test_special_values_stay_in_their_sample(place, name, squeeze):
    specials = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e38, -1e38, 1e-40]
    case = Case(n=len(specials) + 1, c=4, r=2, spatial=(2, 3), options={place: name, "squeeze": squeeze})
    tensors = case.tensors(DEVICE)
    for sample, value in enumerate(specials):
        tensors["x"][sample, 2, 1, 1] = value
    with torch.no_grad():
        y = call(se_fused.squeeze_excite, tensors, case.options)
        expected = in_pytorch(tensors, case.options)
    for sample in range(case.n):  # one at a time, because the largest value sets the tolerance
        assert_close(y[sample], expected[sample].double(), torch.float32, f"sample {sample}")


@pytest.mark.parametrize("how", HOW[:3])
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_gradients_of_nan_and_of_equal_maxima(squeeze, how):
    case = Case(n=3, c=4, r=2, spatial=(3, 3), dtype=torch.float64, options={"squeeze": squeeze, "pre_act": "relu"})
    tensors = case.tensors(DEVICE)
    tensors["x"][0, 1, 2, 1] = float("nan")
    tensors["x"][1] = 2
    g = torch.randn_like(tensors["x"])
    with launches(how):
        actual = gradients(se_fused.squeeze_excite, tensors, case.options, g)
    with se_fused.use_backend("reference"):
        expected = gradients(reference.squeeze_excite, tensors, case.options, g)
    for name, grad in actual.items():
        torch.testing.assert_close(grad, expected[name], equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", HOW[:2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("residual", ["none", "x"])
def test_in_place_writes_the_same_values_to_x(dtype, layout, residual, how):
    case = Case(n=2, c=9, r=3, dtype=dtype, layout=layout, residual=residual, options={"post_act": "relu"})
    tensors = case.tensors(DEVICE)
    with torch.no_grad(), launches(how):
        y = call(se_fused.squeeze_excite, tensors, case.options)
        assert torch.equal(y, call(se_fused.squeeze_excite, tensors, case.options))
        out = call(se_fused.squeeze_excite, tensors, case.options, inplace=True)
    assert out is tensors["x"]
    assert torch.equal(out, y)


class Guarded:
    """Copies tensors into the middle of memory filled with NaN. Outputs start as NaN too."""

    MARGIN = 4096

    def __init__(self):
        self.memory = []

    def __call__(self, t, fill=True):
        if t is None:
            return None
        memory = torch.full((t.numel() + 2 * self.MARGIN,), float("nan"), dtype=t.dtype, device=DEVICE)
        inner = memory[self.MARGIN : self.MARGIN + t.numel()].as_strided(
            t.shape, t.stride(), storage_offset=self.MARGIN
        )
        if fill:
            inner.copy_(t)
        self.memory.append((memory, t.numel()))
        return inner

    def untouched(self):
        return all(
            memory[: self.MARGIN].isnan().all() and memory[self.MARGIN + size :].isnan().all()
            for memory, size in self.memory
        )


@pytest.mark.parametrize("how", HOW[:3])
@pytest.mark.parametrize(("squeeze", "dtype"), [("mean", torch.bfloat16), ("mean_max", torch.float32)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("n", "c", "r", "l"), [(3, 13, 5, 21), (2, 16, 4, 16), (3, 7, None, 5), (3, 33, 9, 1)])
def test_nothing_outside_the_tensors_is_read_or_written(n, c, r, l, channels_last, dtype, squeeze, how, monkeypatch):
    layout = "channels_last" if channels_last else "contiguous"
    case = Case(
        n=n, c=c, r=r, spatial=(l,), dtype=dtype, layout=layout, residual="map", affine=True, float_weights=True
    )
    guarded = Guarded()
    plain = case.tensors()
    plain["residual"] = torch.empty_like(plain["x"]).copy_(plain["residual"])  # in the memory order of x
    tensors = {name: guarded(t) for name, t in plain.items()}
    *inputs, scale, shift = tensors.values()
    options = {"act": "silu", "gate": "sigmoid", "squeeze": squeeze, "pre_act": "relu", "post_act": "silu"}
    encoded = Options.of(**options)
    scratch = launch.Problem.scratch
    monkeypatch.setattr(launch.Problem, "scratch", lambda self, *shape: guarded(scratch(self, *shape), fill=False))
    saved = [guarded(t, fill=False) for t in (torch.empty(n, c), torch.empty(n, r or 0), torch.empty(n, c))]
    y = guarded(inputs[0], fill=False)
    g = guarded(torch.randn_like(inputs[0]))
    grads = [guarded(t, fill=False) for t in inputs]
    with launches(how):
        triton.forward_out(*inputs, scale, shift, *encoded, channels_last, y, *saved)
        triton.backward_out(g, *inputs, *saved, *encoded, channels_last, False, *grads)
    assert guarded.untouched()
    assert not any(t.isnan().any() for t in (y, *saved, *grads) if t is not None)
    assert_close(y, truth(tensors, options), dtype)


def test_auto_never_interprets_and_explain_says_why():
    tensors = Case().tensors()
    positional = [tensors[name] for name in ("x", "w1", "b1", "w2", "b2")]
    if DEVICE.type == "cpu":
        assert se_fused.explain(*positional).backend == "triton"
        with se_fused.use_backend("auto"):
            assert "only where it is asked for" in se_fused.explain(*positional).why_not["triton"]
    assert Triton().why_not(torch.device("meta")) == "it runs on CUDA and ROCm tensors; x is on meta"


class OnGpu(Triton):
    def why_not(self, device):
        return None


def test_a_gpu_without_the_cuda_library_runs_on_triton_and_logs_it_once(caplog):
    cuda = Cuda()
    cuda.leave_out("no nvcc was found")
    among, device = Choice((cuda, OnGpu(), backends.CPU)), torch.device("cuda")
    with se_fused.use_backend("auto"):
        assert [among.select(device).name, among.select(device).name] == ["triton", "triton"]
    assert caplog.messages == ["se_fused: cuda tensors run on Triton: no nvcc was found (python -m se_fused info)"]


def test_without_triton_the_reason_is_kept(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("se_fused.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    triton = Triton()
    with forcing.force(forcing.Forced("triton", triton)):
        for _ in range(2):
            assert "triton cannot be imported" in triton.why_not(DEVICE)


def test_compile_keeps_one_operator_that_runs_on_triton():
    torch._dynamo.reset()
    case = Case(n=2, c=6, r=3, spatial=(3, 3), dtype=torch.float64)
    seen = []
    compiled = torch.compile(
        lambda *inputs: se_fused.squeeze_excite(*inputs) + 1,
        fullgraph=True,
        backend=lambda graph, _: seen.append(str(graph.graph)) or graph,
    )
    inputs = [case.tensors(DEVICE)[name] for name in ("x", "w1", "b1", "w2", "b2")]
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), se_fused.squeeze_excite(*inputs) + 1)
    assert "se_fused.squeeze_excite.default" in seen[0]
