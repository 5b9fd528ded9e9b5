"""The fast path around the dispatcher: which calls take it, which must not, and that both ways give the same bits."""

import logging
import os

import pytest
import torch
from cases import LAYOUTS, Case, assert_close, call, cases, truth
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import se_fused
from se_fused import backends, native
from se_fused.backends import Cpu

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.skipif(
        not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no DLPack exchange"
    ),
]
DENSE = ("contiguous", "channels_last", "offset")


@pytest.fixture
def answers(monkeypatch):
    """For each call, whether it took the fast path."""
    found, fast_path = [], backends.CPU.fast_path

    def watched(*args, **more):
        y = fast_path(*args, **more)
        found.append(y is not None)
        return y

    monkeypatch.setattr(backends.CPU, "fast_path", watched)
    return found


def run(tensors, **more):
    with torch.no_grad():
        return call(se_fused.squeeze_excite, tensors, more.pop("options", {}), **more)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_dense_maps_take_it(answers, layout, inplace):
    if layout == "expanded" and inplace:
        pytest.skip("in place is refused")
    tensors = Case(layout=layout).tensors()
    expected, strides = truth(tensors, {}), torch.empty_like(tensors["x"]).stride()
    y = run(tensors, inplace=inplace)
    assert answers == [layout in DENSE]
    assert_close(y, expected, torch.float32)
    assert y.stride() == (tensors["x"].stride() if inplace else strides)


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.bfloat16, float_weights=True, residual="map"),
        Case(dtype=torch.float16, kernel_dims=2),
        Case(dtype=torch.float64, r=None, bias=False),
        Case(spatial=(13,), layout="channels_last", residual="x"),
        Case(spatial=(3, 2, 5), layout="channels_last"),
        Case(affine=True, dtype=torch.float16, float_weights=True),
    ],
    ids=str,
)
def test_every_kind_of_tensor_takes_it(answers, case):
    tensors = case.tensors()
    for name in ("w1", "b2"):
        if tensors[name] is not None:
            tensors[name] = torch.nn.Parameter(tensors[name])
    assert_close(run(tensors), truth(tensors, {}), case.dtype)
    assert answers == [True]


@given(cases(layouts=DENSE))
@settings(max_examples=60)
def test_both_ways_give_the_same_bits(case):
    tensors, found = case.tensors(), []
    if case.residual == "map":
        tensors["residual"] = LAYOUTS[case.layout](tensors["residual"])
    for name in ("scale", "shift") if case.affine else ():
        tensors[name] = tensors[name].to(torch.promote_types(case.dtype, torch.float32))
    fast_path = backends.CPU.fast_path
    for way in (lambda *args, **more: found.append(fast_path(*args, **more)) or found[-1], lambda *_, **__: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends.CPU, "fast_path", way)
            found.append(run(tensors, options=case.options))
    fast, same, dispatched = found
    assert fast is same
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[fast.element_size()]
    assert torch.equal(fast.view(bits), dispatched.view(bits))


def test_in_place_counts_as_a_change(answers):
    x = Case().tensors()
    version = x["x"]._version
    run(x, inplace=True)
    assert answers == [True]
    assert x["x"]._version == version + 1


@pytest.mark.parametrize("inplace", [False, True])
def test_inference_mode_takes_it(answers, inplace):
    with torch.inference_mode():
        tensors = Case().tensors()
        expected = truth(tensors, {})
        y = run(tensors, inplace=inplace)
        assert y.is_inference()
        assert_close(y, expected, torch.float32)
    assert answers == [True]


class Subclass(torch.Tensor):
    pass


REFUSED = {
    "strided weights": lambda t: {**t, "w1": t["w1"].T.contiguous().T},
    "a strided residual": lambda t: {**t, "residual": LAYOUTS["channels_last"](t["x"].clone())},
    "a lazily negated map": lambda t: {**t, "x": torch._neg_view(t["x"])},
    "a lazily negated weight": lambda t: {**t, "w2": torch._neg_view(t["w2"])},
    "a subclass": lambda t: {**t, "b1": t["b1"].as_subclass(Subclass)},
    "a tensor without memory": lambda t: {**t, "b2": torch._efficientzerotensor((16,), dtype=torch.float32)},
    "a strided shift": lambda t: {**t, "scale": t["b2"], "shift": torch.ones(32)[::2]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_read_goes_to_the_dispatcher(answers, name):
    tensors = REFUSED[name](Case().tensors())
    assert_close(run(tensors), truth(tensors, {}), torch.float32)
    assert answers == [False]


WRONG = {
    "weights of too many dimensions": lambda t: {**t, "w1": t["w1"][..., None, None, None, None]},
    "weights of another R": lambda t: {**t, "w2": t["w2"][:, :1].contiguous()},
    "a bias of another size": lambda t: {**t, "b2": t["b2"][:1]},
    "weights of another dtype": lambda t: {**t, "w1": t["w1"].double()},
    "a residual of another shape": lambda t: {**t, "residual": t["x"][:1]},
    "a sparse map": lambda t: {**t, "x": t["x"].to_sparse()},
    "a map of integers": lambda t: {**t, "x": t["x"].int()},
    "a map of too few dimensions": lambda t: {**t, "x": t["x"][0, 0]},
    "a vector": lambda t: {**t, "x": t["x"][0, 0, 0]},
    "weights that are no tensor": lambda t: {**t, "w1": t["w1"].tolist()},
    "no weights": lambda t: {**t, "w2": None},
    "a scale without a shift": lambda t: {**t, "scale": t["b2"]},
    "a shift of another size": lambda t: {**t, "scale": t["b2"], "shift": t["b2"][:1]},
    "a scale of another dtype": lambda t: {**t, "scale": t["b2"].double(), "shift": t["b2"]},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_as_ever(answers, name):
    with pytest.raises((TypeError, ValueError), match=r"squeeze_excite: (x|w1|w2|b2|residual|scale|shift) is "):
        run(WRONG[name](Case().tensors()))
    assert True not in answers


def test_it_fails_without_a_trace(monkeypatch, caplog):
    def broken():
        raise ImportError("no such symbol")

    monkeypatch.setattr(native, "load_extension", broken)
    cpu = Cpu()
    with caplog.at_level(logging.WARNING, "se_fused"):
        cpu.load()
    assert "no such symbol" in caplog.text
    assert not cpu.has_fast_path()
    assert cpu.why_not(torch.device("cpu")) is None


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_another_backend_does_not_take_it(answers, name):
    if name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton runs on CPU tensors in its interpreter only")
    with se_fused.use_backend(name):
        assert_close(run(Case().tensors()), truth(Case().tensors(), {}), torch.float32)
    assert True not in answers


@pytest.mark.parametrize(
    ("mode", "method"), [(TorchFunctionMode, "__torch_function__"), (TorchDispatchMode, "__torch_dispatch__")]
)
def test_modes_see_the_operator(answers, mode, method):
    seen = []

    def watch(self, func, types, args=(), kwargs=None):
        seen.append(str(func))
        return func(*args, **(kwargs or {}))

    with type("Watching", (mode,), {method: watch})():
        run(Case().tensors())
    assert any("se_fused.squeeze_excite" in name for name in seen), seen
    assert True not in answers


def test_the_profiler_sees_the_operator(answers):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(Case().tensors())
    assert any(event.key == "se_fused::squeeze_excite" for event in profile.key_averages())
    assert True not in answers


def test_a_trace_gets_the_formula(answers):
    tensors, other = Case().tensors(), Case(seed=1).tensors()["x"]
    with torch.no_grad():
        traced = torch.jit.trace(
            lambda x: call(se_fused.squeeze_excite, {**tensors, "x": x}, {}), tensors["x"], check_trace=False
        )
        assert_close(traced(other), truth({**tensors, "x": other}, {}), torch.float32)
    assert True not in answers


def test_a_transform_and_autograd_do_not_take_it(answers):
    tensors = Case().tensors()
    maps = torch.stack([tensors["x"], 2 * tensors["x"]])
    y = torch.vmap(lambda x: run({**tensors, "x": x}))(maps)
    assert_close(y[1], truth({**tensors, "x": maps[1]}, {}), torch.float32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors["x"], torch.ones_like(tensors["x"]))
        assert forward_ad.unpack_dual(run({**tensors, "x": dual})).tangent.count_nonzero() > 0
    tensors["w1"].requires_grad_()
    assert call(se_fused.squeeze_excite, tensors, {}).requires_grad
    assert True not in answers


def test_compilers_see_the_operator(answers):
    tensors = Case().tensors()
    graph = make_fx(lambda x: run({**tensors, "x": x}))(tensors["x"])
    assert torch.ops.se_fused.squeeze_excite.default in [node.target for node in graph.graph.nodes]
    with FakeTensorMode() as mode:
        fake = {name: None if t is None else mode.from_tensor(t) for name, t in tensors.items()}
        assert run(fake).shape == tensors["x"].shape
    assert True not in answers


def test_memory_shared_until_it_is_written_stays_with_its_owner(answers):
    tensors = Case().tensors()
    owner, before = tensors["x"], tensors["x"].clone()
    tensors["x"] = torch._lazy_clone(owner)
    expected = truth({**tensors, "x": before}, {})
    assert_close(run(tensors, inplace=True), expected, torch.float32)
    assert torch.equal(owner, before)
    assert answers == [True]
