"""Inputs that share memory, strides or history give the reference's results, or are refused if they cannot."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, assert_close, call, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from strided import places, views
from torch.utils.checkpoint import checkpoint

import se_fused
from se_fused import memory, reference

pytestmark = pytest.mark.usefixtures("native")
NAMES = ("x", "w1", "b1", "w2", "b2", "residual", "scale", "shift")


def _reversed(t):
    axes = tuple(reversed(range(t.dim())))
    return t.permute(axes).contiguous().permute(axes)


# The ways in which a tensor can lie in memory.
LAYOUTS = {
    "as made": lambda t: t,
    "reversed": _reversed,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "negated": lambda t: torch._neg_view(-t),
}
# The ways in which inputs come from leaves. C = R, so that one weight can be the other.
HISTORIES = {
    "apart": lambda t: t,
    "w2 is w1 transposed": lambda t: {**t, "w2": t["w1"].t()},
    "w2 is w1": lambda t: {**t, "w2": t["w1"]},
    "b2 is b1": lambda t: {**t, "b2": t["b1"]},
    "residual is x": lambda t: {**t, "residual": t["x"]},
    "residual comes from x": lambda t: {**t, "residual": t["x"] * 2},
    "x comes from w1": lambda t: {**t, "x": t["x"] + t["w1"].sum()},
    "w1 comes from x": lambda t: {**t, "w1": t["w1"] * t["x"].mean()},
    "shift is scale": lambda t: {**t, "shift": t["scale"]},
    "shift comes from x": lambda t: {**t, "shift": t["shift"] * t["x"].mean()},
    "no scale and shift": lambda t: {**t, "scale": None, "shift": None},
}


def _under(hooks):
    def run(f, tensors):
        with hooks():
            return f(*tensors)

    return run


WAYS = {
    "plain": lambda f, tensors: f(*tensors),
    "save_on_cpu": _under(torch.autograd.graph.save_on_cpu),
    "hooks that change strides": _under(
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), _reversed)
    ),
    "checkpoint": lambda f, tensors: checkpoint(f, *tensors, use_reentrant=False),
}


def gradients(function, leaves, history, way, g, order, options):
    """The gradients of y with g for all leaves; at order 2, the gradients of the sum of their squares."""
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    tensors = list(HISTORIES[history](leaves).values())

    def run(*values):
        return call(function, dict(zip(NAMES, values, strict=True)), options)

    wanted = list(leaves.values())
    found = torch.autograd.grad(WAYS[way](run, tensors), wanted, g, create_graph=order == 2, allow_unused=True)
    if order == 2:
        penalty = sum(f.square().sum() for f in found if f is not None)
        found = torch.autograd.grad(penalty, wanted, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


@given(
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 9),
    history=st.sampled_from(list(HISTORIES)),
    way=st.sampled_from(list(WAYS)),
    order=st.sampled_from([1, 2]),
    options=st.fixed_dictionaries(
        {
            "act": st.sampled_from(["relu", "silu"]),
            "squeeze": st.sampled_from(["mean", "max"]),
            "post_act": st.sampled_from([None, "tanh"]),
        }
    ),
)
@settings(max_examples=400)
def test_gradients_whatever_the_strides_and_the_history(layouts, history, way, order, options):
    case = Case(n=2, c=6, r=6, spatial=(3, 4), dtype=torch.float64, residual="map", affine=True)
    leaves = {name: LAYOUTS[layout](t) for (name, t), layout in zip(case.tensors().items(), layouts, strict=False)}
    # PyTorch itself does not keep a separate gradient for each element of memory of an expanded leaf.
    g = LAYOUTS[layouts[8]](torch.randn_like(leaves["x"].contiguous()))
    got, wanted = (
        gradients(f, leaves, history, way, g, order, options)
        for f in (se_fused.squeeze_excite, reference.squeeze_excite)
    )
    for name, right in wanted.items():
        assert (got[name] is None) == (right is None), name
        if right is not None:
            # Wide, because an order-2 gradient sums products of rounded gradients, and the unit is not their scale.
            assert_close(got[name], right, torch.float64, f"gradient of {name}", factor=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_weight_gets_its_own_gradient_in_its_own_strides(dtype):
    """The strides must also be those of the operator's own memory, because torch.compile allocates by the fake."""
    tensors = Case(c=16, r=4, dtype=dtype).tensors()
    w1 = _reversed(tensors["w1"]).requires_grad_()
    (got,) = torch.autograd.grad(call(se_fused.squeeze_excite, {**tensors, "w1": w1}, {}).sum(), w1)
    (wanted,) = torch.autograd.grad(call(reference.squeeze_excite, {**tensors, "w1": w1}, {}).sum(), w1)
    # Wider, because `wanted` is rounded too: the reference computes it in `dtype`.
    assert_close(got, wanted.double(), dtype, factor=8)
    assert got.stride() == w1.stride()


@pytest.mark.parametrize("vectorize", [False, True])
def test_batched_gradients(vectorize):
    tensors = Case(c=4, r=2, spatial=(2, 2), dtype=torch.float64).tensors()

    def jacobian(function):
        return torch.autograd.functional.jacobian(
            lambda x, w: call(function, {**tensors, "x": x, "w1": w}, {}),
            (tensors["x"], tensors["w1"]),
            vectorize=vectorize,
        )

    torch.testing.assert_close(jacobian(se_fused.squeeze_excite), jacobian(reference.squeeze_excite))


# In place: x and another tensor lie anywhere in one flat memory.


@given(views({"residual": (2, 3, 2, 2), "w2": (3, 3), "scale": (3,)}), st.booleans())
@settings(max_examples=600)
def test_in_place_is_right_or_refused_wherever_inputs_lie(drawn, exact):
    x_view, name, other_view = drawn
    if name == "residual" and exact:
        other_view = x_view
    flat = torch.randn(64)
    x, other = flat.as_strided(*x_view), flat.as_strided(*other_view)
    tensors = {**dict.fromkeys(NAMES), "x": x, "w2": torch.randn(3, 3), name: other}
    if name == "scale":
        tensors["shift"] = torch.randn(3)
    mine, its = places(*x_view), places(*other_view)
    legal = len(set(mine)) == len(mine) and (not set(mine) & set(its) or (name == "residual" and mine == its))
    copies = {key: t if t is None else t.clone() for key, t in tensors.items()}
    before = flat.clone()
    with torch.no_grad():
        if legal:
            y = call(se_fused.squeeze_excite, tensors, {}, inplace=True)
            assert y is x
            assert_close(x, truth(copies, {}), torch.float32)
            rest = sorted(set(range(64)) - set(mine))
            assert torch.equal(flat[rest], before[rest])
        else:
            with pytest.raises(
                ValueError, match=rf"squeeze_excite: (x is a tensor that overlaps|{name} is in the memory)"
            ):
                call(se_fused.squeeze_excite, tensors, {}, inplace=True)
            assert torch.equal(flat, before)


def test_in_place_takes_what_lies_between_the_elements_of_x():
    both = torch.randn(2, 6, 4, 4)
    x, residual = both[:, :3], both[:, 3:]
    tensors = {**dict.fromkeys(NAMES), "x": x, "w2": torch.randn(3, 3), "residual": residual}
    expected = truth(tensors, {})
    with torch.inference_mode():
        assert_close(call(se_fused.squeeze_excite, tensors, {}, inplace=True), expected, torch.float32)


def test_in_place_of_a_negated_view():
    tensors = Case().tensors()
    tensors["x"] = torch._neg_view(tensors["x"])
    expected = truth(tensors, {})
    with torch.no_grad():
        y = call(se_fused.squeeze_excite, tensors, {}, inplace=True)
    assert y is tensors["x"]
    assert_close(y, expected, torch.float32)


def test_in_place_on_an_inference_tensor_after_inference():
    with torch.inference_mode():
        tensors = Case().tensors()
    with torch.no_grad(), pytest.raises(ValueError, match="x is an inference tensor outside inference mode"):
        call(se_fused.squeeze_excite, tensors, {}, inplace=True)
    with torch.inference_mode():
        expected = truth(tensors, {})
        assert_close(call(se_fused.squeeze_excite, tensors, {}, inplace=True), expected, torch.float32)


def test_freed_storage_is_named():
    """The test has a process of its own, because reading freed storage would end it."""
    program = f"""
import itertools, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch, se_fused
from cases import Case, call
for name, offset, grad in itertools.product(["x", "w1", "b2", "residual", "shift"], [0, 64], [False, True]):
    tensors = Case(residual="map", affine=True).tensors()
    flat = torch.randn(offset + tensors[name].numel())
    tensors[name] = flat[offset:].view(tensors[name].shape)
    flat.untyped_storage().resize_(0)
    try:
        with torch.set_grad_enabled(grad):
            call(se_fused.squeeze_excite, {{**tensors, "w2": tensors["w2"].requires_grad_(grad)}}, {{}})
    except ValueError as error:
        assert f"squeeze_excite: {{name}} is a tensor" in str(error) and "whose storage was freed" in str(error), error
        print("named")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["named"] * 20


def test_the_kernels_refuse_what_the_call_would():
    """The test calls the bare operators, whose arguments Python does not check."""
    flat = torch.randn(65)
    x, y = flat[:64].view(1, 4, 4, 4), flat[1:].view(1, 4, 4, 4)
    out = torch.ops.se_fused.forward_out.default
    options, nothing = (0, 9, 0.0, 0.0, 0, 0, 0), (None,) * 4
    with pytest.raises(RuntimeError, match="y overlaps x"):
        out(x, None, None, torch.randn(4, 4), *nothing, *options, False, y, None, None, None)
    with pytest.raises(RuntimeError, match="y overlaps w2"):
        out(x.clone(), None, None, flat[1:17].view(4, 4), *nothing, *options, False, y, None, None, None)
    with pytest.raises(RuntimeError, match="y overlaps shift"):
        out(x.clone(), None, None, torch.randn(4, 4), None, None, torch.randn(4), flat[1:5], *options, False, y,
            None, None, None)  # fmt: skip
    with pytest.raises(RuntimeError, match="scale without shift"):
        out(x.clone(), None, None, torch.randn(4, 4), None, None, torch.randn(4), None, *options, False, y,
            None, None, None)  # fmt: skip
    z = torch.empty(4, 2).t()
    with pytest.raises(RuntimeError, match="z is not row-major"):
        out(torch.randn(2, 4, 2, 2), None, None, torch.randn(4, 4), *nothing, *options, False,
            torch.empty(2, 4, 2, 2), z, torch.empty(2, 0), torch.empty(2, 4))  # fmt: skip


def test_overlap_counts_bytes():
    half = torch.zeros(16, dtype=torch.float16)
    as_float = half.view(torch.float32)
    assert memory.overlap(half[:2], as_float[:1])
    assert not memory.overlap(half[:2], as_float[1:])
    assert memory.overlaps_itself(torch.zeros(8).as_strided((3, 3), (2, 1)))
    assert not memory.overlaps_itself(torch.zeros(16).as_strided((3, 2), (2, 3)))
