"""Gradients against the reference in float64 and finite differences, and in every mode of differentiation."""

import pytest
import torch
from cases import GATE_CHOICES, Case, call, cases
from gradients import NAMES, ORDER_KEEPING, compare, gradients
from hypothesis import assume, given, settings
from torch.autograd import forward_ad

import se_fused
from se_fused import reference
from se_fused.options import ACTIVATIONS, SQUEEZES

pytestmark = pytest.mark.usefixtures("native")


@given(cases(dtypes=(torch.float64,)))
@settings(max_examples=300)
def test_every_option_in_float64(case):
    # At the end of a map, where a vector does not fit, PyTorch's activations give equal elements different bits.
    assume(case.layout != "expanded" or case.options["pre_act"] in ORDER_KEEPING)
    compare(case)


@given(cases(pre_acts=ORDER_KEEPING, affines=(False,)))
@settings(max_examples=300)
def test_every_dtype_and_layout(case):
    compare(case)


@pytest.mark.parametrize(
    ("n", "c", "r", "spatial"),
    [(1, 96, 4, (56, 56)), (9, 308, 77, (7, 7)), (2, 440, 110, (7, 7)), (4, 24, 6, (33, 31))],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_real_and_odd_shapes(n, c, r, spatial, layout, squeeze):
    compare(Case(n=n, c=c, r=r, spatial=spatial, layout=layout, options={"squeeze": squeeze}))


def small(residual="none", r=2, affine=False, **options):
    """A case for finite differences: with high probability away from kinks, and without equal maxima."""
    case = Case(
        n=2, c=2, r=r, spatial=(3,), dtype=torch.float64, residual=residual, affine=affine, seed=7, options=options
    )
    tensors = {name: t if t is None else t.requires_grad_() for name, t in case.tensors().items()}
    inputs = {n: t for n, t in tensors.items() if t is not None and not (n == "residual" and residual == "x")}

    def function(*values):
        given = dict(zip(inputs, values, strict=True))
        if residual == "x":
            given["residual"] = given["x"]
        return call(se_fused.squeeze_excite, {name: given.get(name) for name in NAMES}, options)

    return function, list(inputs.values())


OPTIONS = (
    [{"act": name} for name in ACTIVATIONS]
    + [{"pre_act": name} for name in ACTIVATIONS]
    + [{"post_act": name, "residual": "map"} for name in ACTIVATIONS]
    + [{"gate": gate} for gate in GATE_CHOICES]
    + [{"squeeze": squeeze, "pre_act": "silu"} for squeeze in SQUEEZES]
    + [{"residual": "x"}, {"residual": "x", "post_act": "tanh"}, {"residual": "map"}, {"r": None}]
    + [{"affine": True, "squeeze": squeeze, "pre_act": "silu"} for squeeze in SQUEEZES]
    + [{"affine": True}, {"affine": True, "residual": "x", "post_act": "tanh"}]
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_finite_differences_to_second_order(options):
    function, inputs = small(**options)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_third_order():
    x = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    w1, w2 = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)

    def third(function):
        out = function(x, w1, None, w2, None, act="tanh").sum()
        for _ in range(3):
            (out,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out

    torch.testing.assert_close(third(se_fused.squeeze_excite), third(reference.squeeze_excite))


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_alone(wanted):
    options = {"post_act": "silu", "pre_act": "relu", "squeeze": "mean_max"}
    case = Case(dtype=torch.float64, residual="map", affine=True, options=options)
    grads = []
    for function in (se_fused.squeeze_excite, reference.squeeze_excite):
        tensors = case.tensors()
        tensors[wanted].requires_grad_()
        grads.append(torch.autograd.grad(call(function, tensors, case.options).square().sum(), tensors[wanted])[0])
    torch.testing.assert_close(*grads)


@given(cases(affines=(True,)))
@settings(max_examples=60)
def test_training_applies_scale_and_shift_before_the_call(case):
    """Rounded once, as PyTorch's own batch norm does."""
    tensors = case.tensors()
    across = (-1, *(1,) * len(case.spatial))

    def in_two_steps(x, *weights, scale, shift, **more):
        wide = torch.promote_types(x.dtype, torch.float32)
        u = x.to(wide) * scale.to(wide).view(across) + shift.to(wide).view(across)
        return se_fused.squeeze_excite(u.to(x.dtype), *weights, **more)

    found = [
        gradients(f, tensors, case.options, torch.ones_like(tensors["x"]))
        for f in (se_fused.squeeze_excite, in_two_steps)
    ]
    for name, grad in found[0].items():
        assert grad.dtype == tensors[name].dtype
        torch.testing.assert_close(grad, found[1][name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_equal_maxima_share_the_gradient():
    x = torch.zeros(1, 1, 2, 3, requires_grad=True)
    ones = torch.ones(1, 1)
    y = se_fused.squeeze_excite(x, ones, None, ones, None, squeeze="max", act="identity", gate="identity", residual=x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected = reference.squeeze_excite(
        x, ones, None, ones, None, squeeze="max", act="identity", gate="identity", residual=x
    )
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


def test_x_changed_before_backward_is_noticed():
    tensors = Case().tensors()
    x = tensors["x"].requires_grad_()
    u = x * 1
    y = call(se_fused.squeeze_excite, {**tensors, "x": u}, {})
    u.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_result_may_be_changed_before_backward():
    tensors = Case(dtype=torch.float64).tensors()
    x = tensors["x"].requires_grad_()
    grads = []
    for function in (se_fused.squeeze_excite, reference.squeeze_excite):
        y = call(function, tensors, {})
        y += 1
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*grads)


def functional(function, options):
    """A function of x and w1 alone, for torch.func; shift is the first row of w1."""
    tensors = Case(n=2, c=3, r=2, spatial=(2, 2), dtype=torch.float64, affine=True).tensors()

    def f(x, w1):
        return call(function, {**tensors, "x": x, "w1": w1, "shift": w1[0]}, options)

    return f, tensors["x"], tensors["w1"]


TRANSFORMS = {
    "grad": lambda f, x, w: torch.func.grad(lambda a: f(a, w).square().sum())(x),
    "jacrev": lambda f, x, w: torch.func.jacrev(f, argnums=(0, 1))(x, w),
    "jacfwd": lambda f, x, w: torch.func.jacfwd(f, argnums=(0, 1))(x, w),
    "jvp": lambda f, x, w: torch.func.jvp(f, (x, w), (torch.ones_like(x), torch.ones_like(w))),
    "vjp": lambda f, x, w: torch.func.vjp(f, x, w)[1](torch.ones_like(x)),
    "hessian": lambda f, x, w: torch.func.hessian(lambda a: f(a, w).square().sum())(x),
    "vmap": lambda f, x, w: torch.vmap(f, in_dims=(0, None))(torch.stack([x, 2 * x, -x]), w),
    "vmap_weights": lambda f, x, w: torch.vmap(f, in_dims=(None, 0))(x, torch.stack([w, 2 * w])),
    "per_sample_grad": lambda f, x, w: torch.vmap(
        torch.func.grad(lambda b, a: f(a[None], b).square().sum()), in_dims=(None, 0)
    )(w, x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    "options", [{}, {"squeeze": "max", "act": "silu", "gate": "tanh", "post_act": "gelu"}], ids=str
)
def test_transforms_equal_the_reference(name, options):
    actual, expected = (TRANSFORMS[name](*functional(f.squeeze_excite, options)) for f in (se_fused, reference))
    torch.testing.assert_close(actual, expected)


def test_forward_mode_equals_the_reference():
    tangents = []
    for package in (se_fused, reference):
        f, x, w1 = functional(package.squeeze_excite, {})
        with forward_ad.dual_level():
            y = f(forward_ad.make_dual(x, torch.ones_like(x)), w1)
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)
