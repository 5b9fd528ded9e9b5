"""NaN, infinities, zeros, denormals and the kinks of activations.

Every backend has NaN, infinity and 0 where eager PyTorch has them in the same dtype, forward and backward.
"""

import math
import os
import random

import pytest
import torch
from cases import GATE_CHOICES, Case, call
from gradients import NAMES, gradients

import se_fused
from dev import emulator
from se_fused import HardSigmoid, reference
from se_fused.options import ACTIVATIONS, SQUEEZES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from NumPy, in Triton's interpreter

NAN, INF = math.nan, math.inf
VALUES = (NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 20.0, -20.0, 200.0, -200.0, 1e30, -1e30, 1e-40)
UPSTREAM = (1.0, 0.0, -2.0, NAN, INF, -INF, 1e30)
BACKENDS = ("cpu", "T4", "H200", "triton")  # T4, H200: the emulated CUDA kernels, in two passes and in clusters


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param in ("cpu", "triton"):
        if request.param == "triton":
            pytest.importorskip("se_fused.triton")
        with se_fused.use_backend(request.param):
            yield request.param
        return
    cuda = emulator.Library(emulator.library())
    with cuda.forced():
        cuda.setup(request.param)
        yield request.param


def pairs(name, dtype):
    """Every value with every incoming gradient, except where PyTorch contradicts itself."""

    def sure(v, g):
        if name == "hardswish" and dtype is torch.float64:
            # The reference composes it there and multiplies the incoming gradient by 0; PyTorch's own kernel selects.
            return math.isfinite(v) and math.isfinite(g)
        # In a vector, NaN makes the gradient of relu6 0 and that of hardswish NaN; at a row's end both pass g on.
        return not (name in ("relu6", "hardswish") and math.isnan(v))

    kept = [(v, g) for v in VALUES for g in UPSTREAM if sure(v, g)]
    return torch.tensor(kept, dtype=dtype).unbind(1)


def assert_same(actual, expected, what):
    assert actual.dtype == expected.dtype
    rtol = 1e-2 if actual.dtype is torch.float32 else 1e-10
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-36, equal_nan=True, msg=lambda m: f"{what}: {m}")


def both(tensors, options, g, wanted):
    """The result and the gradient of one input, by the backend and by eager PyTorch."""
    for function in (se_fused.squeeze_excite, reference.squeeze_excite):
        with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
            y = call(function, tensors, options)
        yield y, gradients(function, tensors, options, g)[wanted]


def elementwise(place, name, dtype, every=1):
    """A call in which the gradient of `wanted` is just g activation'(v), for one of `every` pairs of g and v."""
    v, g = (t[::every] for t in pairs(name, dtype))
    k, ones = len(v), torch.ones
    tensors = dict.fromkeys(NAMES)
    options = {place: name, "gate": "identity"} if place != "gate" else {place: name}
    if place == "act":
        tensors |= {"w1": torch.zeros(k, 1), "b1": v, "w2": g[None], "x": ones(1, 1, 1)}
        return tensors, options, ones(1, 1, 1), "b1"
    if place == "gate":
        tensors |= {"w2": torch.zeros(k, k), "b2": v, "x": ones(1, k, 1)}
        return tensors, options, g[None, :, None], "b2"
    if place == "post_act":
        tensors |= {"w2": torch.zeros(1, 1), "x": torch.zeros(1, 1, k), "residual": v[None, None]}
        return tensors, options, g[None, None], "residual"
    # The gate is saturated, so no gradient comes back through it.
    tensors |= {"w2": ones(1, 1), "b2": torch.tensor([1000.0]), "x": v[:, None, None]}
    return tensors, options | {"gate": HardSigmoid(1, 0)}, g[:, None, None], "x"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("place", "name"),
    [(place, name) for place in ("act", "pre_act", "post_act") for name in ACTIVATIONS]
    + [("gate", gate) for gate in (*GATE_CHOICES, HardSigmoid(0, 0.5), HardSigmoid(-1, 1))],
    ids=str,
)
def test_every_activation(backend, place, name, dtype):
    if dtype is torch.float64 and backend not in ("cpu", "T4"):
        pytest.skip("H200: float64 goes in two passes; Triton: the code is the same, and the interpreter slow")
    # Each pair is a sample there, which takes the interpreter 30 ms. A third has every value and every gradient; all of
    # them go through the same code at the other places.
    every = 3 if (backend, place) == ("triton", "pre_act") else 1
    tensors, options, g, wanted = elementwise(place, name, dtype, every)
    tensors = {key: t if t is None else t.to(dtype) for key, t in tensors.items()}
    (y, grad), (expected_y, expected_grad) = both(tensors, options, g.to(dtype), wanted)
    assert_same(y, expected_y, "y")
    assert_same(grad, expected_grad, f"gradient of {wanted}")
    assert torch.equal(grad == 0, expected_grad == 0)


def draw(seed):
    """A small call with up to four special values somewhere in it: the case, its tensors, g."""
    rng = random.Random(seed)
    sure = [name for name in ACTIVATIONS if name not in ("relu6", "hardswish")]  # at NaN: `pairs`
    case = Case(
        n=rng.randint(1, 3),
        c=rng.randint(1, 9),
        r=rng.choice([None, 1, 2, 5]),
        spatial=(rng.randint(1, 20),),
        bias=rng.random() < 0.8,
        layout=rng.choice(["contiguous", "channels_last"]),
        residual=rng.choice(["none", "map", "x"]),
        seed=seed,
        affine=rng.random() < 0.3,
        options={
            "act": rng.choice(sure),
            "gate": rng.choice(GATE_CHOICES),
            "squeeze": rng.choice(SQUEEZES),
            "pre_act": rng.choice([None, None, *sure]),
            "post_act": rng.choice([None, None, *sure]),
        },
    )
    tensors = case.tensors()
    g = torch.randn_like(tensors["x"])
    for _ in range(rng.randint(1, 4)):
        t = rng.choice([*(t for t in tensors.values() if t is not None), g])
        t[tuple(rng.randrange(size) for size in t.shape)] = rng.choice(VALUES)
    return case, tensors, g


# The seeds of `draw`; SE_FUSED_SEEDS=0,100000 chooses a range.
SEEDS = {"cpu": 400, "T4": 150, "H200": 150, "triton": 30}


def test_special_values_anywhere(backend):
    first, last = map(int, os.environ.get("SE_FUSED_SEEDS", f"0,{SEEDS[backend]}").split(","))
    for seed in range(first, last):
        case, tensors, g = draw(seed)
        results = []
        for function in (se_fused.squeeze_excite, reference.squeeze_excite):
            with torch.backends.mkldnn.flags(enabled=False):
                y = call(function, tensors, case.options)
                results.append({"y": y, **gradients(function, tensors, case.options, g)})
        actual, expected = results
        for name, t in actual.items():
            # The bound is wide because other tests check values: here a large one hides the rounding of others.
            finite = expected[name][expected[name].isfinite()]
            atol = 1e-2 * (1 + finite.abs().amax().item()) if finite.numel() else 0
            torch.testing.assert_close(
                t, expected[name], rtol=0, atol=atol, equal_nan=True,
                msg=f"{name}: SE_FUSED_SEEDS={seed},{seed + 1}: {t}, wanted {expected[name]}, of {case}",
            )  # fmt: skip
