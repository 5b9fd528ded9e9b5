"""A replaced layer computes what the original would, whatever is done to its inside afterwards."""

import contextlib
import copy
import gc
import logging
import weakref
from collections import OrderedDict, deque
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import se_fused
from se_fused import ops

pytestmark = [
    pytest.mark.usefixtures("one_thread", "known_layers"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
X = torch.randn(2, 16, 5, 4, dtype=torch.float64)


class Layer(nn.Module):
    """An SE layer of many parts: children, grandchildren, attributes, a method."""

    scale = 1.0

    def __init__(self):
        super().__init__()
        self.fc1, self.act = nn.Linear(16, 4), nn.LeakyReLU()
        self.rest = nn.Sequential(nn.Linear(4, 16), nn.Sigmoid())
        self.axes, self.queue = [2, 3], deque([1.0])

    def squeeze(self, x):
        return x.mean(self.axes)

    def forward(self, x, mask=None):
        s = self.rest(self.act(self.fc1(self.squeeze(x))))
        s = s if getattr(self, "strength", None) is None else self.strength * s
        return x * (self.scale * self.queue[0] * getattr(self, "_gain", 1.0)) * s[:, :, None, None]


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.a = nn.Parameter(torch.full((base.out_features, base.in_features), 0.1, dtype=torch.float64))

    def forward(self, v):
        return self.base(v) + F.linear(v, self.a)


class Doubled(nn.Linear):
    def forward(self, v):
        return 2 * super().forward(v)


def adapter(m):
    m.fc1 = Adapter(m.fc1)


def inner_adapter(m):
    m.rest[0] = Adapter(m.rest[0])


def swapped_act(m):
    m.act = nn.SiLU()


def swapped_gate(m):
    m.rest[1] = nn.Hardsigmoid()


def longer(m):
    m.rest.append(nn.Tanh())


def slope(m):
    m.act.negative_slope = 0.3


def shadowed(m):
    m.scale = 2.0


def read_if_there(m):
    m.strength = 0.5


def list_in_place(m):
    m.axes[:] = [3, 2]
    m.axes.reverse()
    m.axes[0] = -2


def list_to_other_axes(m):
    m.squeeze = lambda x: x.amax((2, 3))


def child_forward(m):
    m.act.forward = torch.tanh


def other_class(m):
    m.fc1.__class__ = Doubled


def pruned(m):
    prune.l1_unstructured(m.fc1, "weight", 0.5)
    m.fc1.weight_orig.data.mul_(3)


def spectral(m):
    torch.manual_seed(3)
    nn.utils.spectral_norm(m.fc1)


def old_weight_norm(m):
    nn.utils.weight_norm(m.rest[0])


def new_weight_norm(m):
    parametrizations.weight_norm(m.fc1)


def hook(m):
    m.fc1.register_forward_hook(lambda module, args, out: 2 * out)


def pre_hook(m):
    m.act.register_forward_pre_hook(lambda module, args: (args[0] - 1,))


def backward_hook(m):
    m.fc1.register_full_backward_hook(lambda module, gi, go: (3 * gi[0],))


def no_bias(m):
    m.fc1.bias = None


def new_weight(m):
    m.fc1.weight = nn.Parameter(torch.ones_like(m.fc1.weight))


def transposed_weight(m):
    m.rest[0].weight = nn.Parameter(m.rest[0].weight.detach().t().contiguous().t())


def tied(m):
    m.rest[0].weight = nn.Parameter(torch.zeros(16, 4, dtype=torch.float64).copy_(m.fc1.weight.detach().t()))
    m.fc1.weight = nn.Parameter(m.rest[0].weight.detach().t())


def trained(m):
    with torch.no_grad():
        m.fc1.weight.add_(0.1)


def frozen(m):
    m.fc1.weight.requires_grad_(False)


def mode(m):
    m.train(not m.training)


def mark(m):
    m.fc1._is_hf_initialized = True


def private(m):
    m._gain = 2.0


def order(m):
    linear = m.rest[0]
    del m.rest[0]
    m.rest.add_module("0", linear)


def hooks_anew(m):
    m.act._forward_hooks = OrderedDict()
    m.act.register_forward_hook(lambda module, args, out: 2 * out)


def queue_in_place(m):
    m.queue[0] = 3.0


def method_for_a_mark(m):
    m._is_hf_initialized = True
    m(X)
    del m._is_hf_initialized
    m.squeeze = lambda x: x.amax((2, 3))


def noted(m):
    m.note = "read by nobody"


# Each change, with whether the call is still fused afterwards.
CHANGES = {
    **dict.fromkeys(
        (
            adapter, inner_adapter, swapped_act, swapped_gate, longer, slope, shadowed, read_if_there, list_in_place,
            list_to_other_axes, child_forward, other_class, pruned, spectral, old_weight_norm, new_weight_norm, hook,
            pre_hook, backward_hook, noted, private, order, hooks_anew, queue_in_place, method_for_a_mark,
        ),
        False,
    ),
    **dict.fromkeys((no_bias, new_weight, transposed_weight, tied, trained, frozen, mode, mark), True),
}  # fmt: skip


def pair():
    torch.manual_seed(1)
    before = Layer().double()
    after = copy.deepcopy(before)
    assert list(se_fused.replace(after).replaced) == [""]
    return before, after


def digest(m):
    x = X.clone().requires_grad_()
    y = m(x)
    leaves = [x, *(p for p in m.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)]


def assert_same(before, after):
    try:
        wanted = digest(before)
    except Exception as error:  # the two changes exclude each other
        with pytest.raises(type(error)):
            digest(after)
        return
    for a, b in zip(wanted, digest(after), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            # float64, with room for the rounding of a few sums, as in `equivalence`.
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def fused_calls(m):
    with mock.patch.object(ops, "call", wraps=ops.call) as fused:
        m(X)
    return fused.call_count


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_one_change(change, caplog):
    before, after = pair()
    assert_same(before, after)
    for m in (before, after):
        change(m)
    with caplog.at_level(logging.WARNING, "se_fused"):
        assert_same(before, after)
        assert_same(before, after)
        assert fused_calls(after) == CHANGES[change]
    said = [r.message for r in caplog.records if r.name == "se_fused"]
    assert len(said) == (not CHANGES[change])
    assert all("a replaced Layer computes as it did before `replace`: " in text for text in said)
    assert not any(text.endswith(": None") for text in said)


@given(st.lists(st.sampled_from(list(CHANGES)), max_size=4), st.sampled_from(["none", "deepcopy", "restore"]))
@settings(max_examples=150)
def test_changes_in_any_order(changes, then):
    before, after = pair()
    for change in changes:
        for m in (before, after):
            # Some changes cannot follow others: a parameter is gone, or a class is no longer Linear.
            with contextlib.suppress(Exception):
                change(m)
        assert_same(before, after)
    if then == "deepcopy" and not any(c in (pruned, spectral, old_weight_norm) for c in changes):
        after = copy.deepcopy(after)
    if then == "restore":
        se_fused.restore(after)
        assert type(after) is Layer
    assert_same(before, after)


def test_what_is_undone_is_fused_again():
    _, after = pair()
    act, after.act = after.act, nn.SiLU()
    assert fused_calls(after) == 0
    after.act = act
    assert fused_calls(after) == 1
    handle = after.fc1.register_forward_hook(lambda *_: None)
    assert fused_calls(after) == 0
    handle.remove()
    assert fused_calls(after) == 1


def test_a_forward_replaced_on_the_class_is_used():
    class Own(Layer):
        pass

    layer = Own().double()
    se_fused.replace(layer)
    Own.forward = lambda self, x: 2 * x
    assert torch.equal(layer(X), 2 * X)


def test_what_the_class_defines_is_watched():
    def squeeze(self, x):
        return x.amax((2, 3))

    for name, value in (("scale", 2.0), ("squeeze", squeeze)):
        Own = type("Own", (Layer,), {})
        before = Own().double()
        after = copy.deepcopy(before)
        se_fused.replace(after)
        assert fused_calls(after) == 1
        setattr(Own, name, value)
        assert_same(before, after)
        assert fused_calls(after) == 0


def test_a_copy_that_torch_makes_past_the_class_follows_its_changes():
    before, after = pair()
    results = []
    for m in (before, after):
        m.alpha = nn.Parameter(torch.ones(1, dtype=torch.float64))
        nn.utils.parametrize.register_parametrization(m, "alpha", nn.Identity())
        other = copy.deepcopy(m)
        nn.utils.parametrize.remove_parametrizations(other, "alpha")
        slope(other)
        results.append(other(X))
    assert torch.equal(*results)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_in_the_original_are_its_own(x_dtype, dtype):
    class Casts(Layer):
        def forward(self, x):
            z = self.squeeze(x).to(self.fc1.weight.dtype)
            return x * self.rest(self.act(self.fc1(z))).to(x.dtype)[:, :, None, None]

    before = Casts().to(dtype)
    after = copy.deepcopy(before)
    assert len(se_fused.replace(after).replaced) == 1
    got, wanted = after(X.to(x_dtype)), before(X.to(x_dtype))
    assert got.dtype is wanted.dtype
    # bfloat16 keeps 8 significant bits: some 4 roundings of 2**-9, in a sum over h.
    torch.testing.assert_close(got, wanted, rtol=2**-6, atol=2**-6)
    assert fused_calls(after.to(torch.float64)) == 1


def test_a_hook_for_all_modules_sees_those_inside():
    _, after = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        after(X)
    finally:
        handle.remove()
    assert "Linear" in seen
    assert fused_calls(after) == 1


def test_a_copy_of_a_changed_layer_is_the_original():
    before, after = pair()
    for m in (before, after):
        slope(m)
    other = copy.deepcopy(after)
    assert type(other) is Layer
    assert_same(before, other)


def test_prepare_qat_and_quantize_dynamic_after_replace():
    for change in (
        lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True),
        lambda m: torch.ao.quantization.prepare_qat(m.train(), inplace=True),
    ):
        results = []
        for replaced in (False, True):
            torch.manual_seed(1)
            model = nn.Sequential(Layer())
            if replaced:
                se_fused.replace(model)
            model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
            change(model)
            results.append(model(X.float()))
        assert torch.equal(*results)


def test_functional_call_follows():
    before, after = pair()
    weights = {name: torch.randn_like(p) for name, p in before.named_parameters()}
    torch.testing.assert_close(*(torch.func.functional_call(m, weights, (X,)) for m in (before, after)))
    assert_same(before, after)


def test_calls_with_the_defaults_are_fused():
    before, after = pair()
    with mock.patch.object(ops, "call", wraps=ops.call) as fused:
        for args, kwargs in (
            ((X,), {}),
            ((), {"x": X}),
            ((X, None), {}),
            ((X,), {"mask": None}),
            ((), {"mask": None, "x": X}),
        ):
            torch.testing.assert_close(after(*args, **kwargs), before(*args, **kwargs))
        assert fused.call_count == 5
        after(X, 1)
        assert fused.call_count == 5
    for args, kwargs in (((X, None, None), {}), ((X,), {"x": X}), ((), {}), ((X,), {"other": None})):
        with pytest.raises(TypeError):
            after(*args, **kwargs)


def test_a_replaced_model_dies_with_its_last_reference():
    gc.disable()
    try:
        model = nn.Sequential(Layer())
        dead = weakref.ref(model[0])
        se_fused.replace(model)
        model(X.float())
        del model
        assert dead() is None
    finally:
        gc.enable()
