"""Gradients of a case by the kernels, compared with the reference in float64."""

import torch
from cases import assert_close, call, in_float64

import se_fused
from se_fused import reference

NAMES = ("x", "w1", "b1", "w2", "b2", "residual", "scale", "shift")


def gradients(function, tensors, options, g):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None}
    if tensors["residual"] is tensors["x"]:
        leaves["residual"] = leaves["x"]
    y = call(function, {name: leaves.get(name) for name in NAMES}, options)
    wanted = {name: leaf for name, leaf in leaves.items() if name != "residual" or leaf is not leaves["x"]}
    unused_act = tensors["w1"] is None
    grads = torch.autograd.grad(y, list(wanted.values()), g.to(y.dtype), allow_unused=unused_act)
    return dict(zip(wanted, grads, strict=True))


def compare(case):
    tensors = case.tensors()
    g = torch.randn_like(tensors["x"])
    if case.seed % 3 == 0:
        g = g[..., :1].expand_as(g)  # as sum().backward() hands it over
    actual = gradients(se_fused.squeeze_excite, tensors, case.options, g)
    expected = gradients(reference.squeeze_excite, in_float64(tensors), case.options, g.double())
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert grad.dtype == tensors[name].dtype
        # A gradient is a sum of products of rounded results; for the weights the sum has N L terms.
        assert_close(grad, expected[name], grad.dtype, f"gradient of {name}", factor=4)


# If rounding u can change which element is the largest, float64 and float32 rightly have different gradients. These
# activations keep the order and the ties of x. With scale and shift rounding can change it too, which is why `cases` of
# other dtypes than float64 have neither where gradients are compared.
ORDER_KEEPING = (None, "identity", "relu", "leaky_relu")
