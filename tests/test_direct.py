"""The way around the dispatcher (csrc/direct.cpp): who takes it, who must not, and that both give the same bits."""

import pytest
import torch
from cases import LAYOUTS, Case, assert_close, call, cases, truth
from hypothesis import given, settings
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import se_fused
from se_fused import backends

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.skipif(
        not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no DLPack exchange"
    ),
]
DENSE = ("contiguous", "channels_last", "offset")


@pytest.fixture
def answers(monkeypatch):
    """What the direct way said to each call that came to it."""
    found = []

    def forward(*args, native=backends.forward_direct):
        found.append(native(*args))
        return found[-1]

    monkeypatch.setattr(backends, "forward_direct", forward)
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
    tensors = case.tensors()
    y = run(tensors, options=case.options)
    direct, backends.forward_direct = backends.forward_direct, backends._refuse
    try:
        assert torch.equal(y.nan_to_num(), run(tensors, options=case.options).nan_to_num())
    finally:
        backends.forward_direct = direct


def test_in_place_counts_as_a_change(answers):
    x = Case().tensors()
    version = x["x"]._version
    run(x, inplace=True)
    assert answers == [True]
    assert x["x"]._version == version + 1


class Subclass(torch.Tensor):
    pass


REFUSED = {
    "strided weights": lambda t: {**t, "w1": t["w1"].T.contiguous().T},
    "a strided residual": lambda t: {**t, "residual": LAYOUTS["channels_last"](t["x"].clone())},
    "a lazily negated map": lambda t: {**t, "x": torch._neg_view(t["x"])},
    "a lazily negated weight": lambda t: {**t, "w2": torch._neg_view(t["w2"])},
    "a subclass": lambda t: {**t, "b1": t["b1"].as_subclass(Subclass)},
    "a tensor without memory": lambda t: {**t, "b2": torch._efficientzerotensor((16,), dtype=torch.float32)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_read_goes_to_the_dispatcher(answers, name):
    tensors = REFUSED[name](Case().tensors())
    assert_close(run(tensors), truth(tensors, {}), torch.float32)
    assert answers == [False]


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
    assert answers == []


def test_the_profiler_sees_the_operator(answers):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(Case().tensors())
    assert any(event.key == "se_fused::squeeze_excite" for event in profile.key_averages())
    assert answers == []


def test_a_trace_keeps_the_operator(answers):
    tensors, other = Case().tensors(), Case(seed=1).tensors()["x"]
    with torch.no_grad():
        traced = torch.jit.trace(
            lambda x: call(se_fused.squeeze_excite, {**tensors, "x": x}, {}), tensors["x"], check_trace=False
        )
        assert_close(traced(other), truth({**tensors, "x": other}, {}), torch.float32)
    assert answers == []


def test_a_transform_and_autograd_do_not_take_it(answers):
    tensors = Case().tensors()
    maps = torch.stack([tensors["x"], 2 * tensors["x"]])
    y = torch.vmap(lambda x: run({**tensors, "x": x}))(maps)
    assert_close(y[1], truth({**tensors, "x": maps[1]}, {}), torch.float32)
    tensors["w1"].requires_grad_()
    assert call(se_fused.squeeze_excite, tensors, {}).requires_grad
    assert answers == []


def test_memory_shared_until_it_is_written_stays_with_its_owner(answers):
    tensors = Case().tensors()
    owner, before = tensors["x"], tensors["x"].clone()
    tensors["x"] = torch._lazy_clone(owner)
    expected = truth({**tensors, "x": before}, {})
    assert_close(run(tensors, inplace=True), expected, torch.float32)
    assert torch.equal(owner, before)
    assert answers == [True]
