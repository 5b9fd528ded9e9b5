"""Draws calls that nobody means to make: odd shapes, strides, values, dtypes, aliases and wrong arguments.

Each call must be refused in the name of an argument, with nothing changed, or give the result and the gradients of
`truth`. That is a second implementation in NumPy and float64, which shares no line with the package.
"""

import math
import os
import random
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from cases import DTYPES, GATE_CHOICES, assert_close
from gradients import ORDER_KEEPING

import se_fused
from se_fused import HardSigmoid

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


# The truth.


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def mish_gate(v):
    return np.tanh(np.log1p(np.exp(np.minimum(v, 700))))


def normal_cdf(v):
    return (1 + np.vectorize(math.erf, otypes=[float])(v / math.sqrt(2))) / 2


def gelu_tanh_gate(v):
    return np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))


def gelu_tanh_slope(v):
    t = gelu_tanh_gate(v)
    return (1 + t) / 2 + v / 2 * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * v * v)


# Each activation f(v) with its backward b(v, g).
ACTIVATIONS = {
    "identity": (lambda v: v, lambda v, g: g),
    "relu": (lambda v: np.where(v < 0, 0, v), lambda v, g: np.where(v <= 0, 0, g)),
    "relu6": (lambda v: np.clip(v, 0, 6), lambda v, g: np.where((v <= 0) | (v >= 6), 0, g)),
    "silu": (lambda v: v * sigmoid(v), lambda v, g: g * sigmoid(v) * (1 + v * (1 - sigmoid(v)))),
    "hardswish": (
        lambda v: v * np.clip(v + 3, 0, 6) / 6,
        lambda v, g: np.where(v <= -3, 0, np.where(v >= 3, g, g * (v / 3 + 0.5))),
    ),
    "gelu": (
        lambda v: v * normal_cdf(v),
        lambda v, g: g * (normal_cdf(v) + v * np.exp(-v * v / 2) / math.sqrt(2 * math.pi)),
    ),
    "gelu_tanh": (lambda v: v / 2 * (1 + gelu_tanh_gate(v)), lambda v, g: g * gelu_tanh_slope(v)),
    "leaky_relu": (lambda v: np.where(v > 0, v, 0.01 * v), lambda v, g: np.where(v > 0, g, 0.01 * g)),
    "mish": (
        lambda v: v * mish_gate(v),
        lambda v, g: g * (mish_gate(v) + v * sigmoid(v) * (1 - mish_gate(v) ** 2)),
    ),
    "sigmoid": (sigmoid, lambda v, g: g * (1 - sigmoid(v)) * sigmoid(v)),
    "tanh": (np.tanh, lambda v, g: g * (1 - np.tanh(v) ** 2)),
}


def activation(name):
    if name == "hard_sigmoid":
        name = HardSigmoid(1 / 6, 1 / 2)
    if not isinstance(name, HardSigmoid):
        return ACTIVATIONS[name or "identity"]
    slope, offset = name

    def backward(v, g):
        line = slope * v + offset
        return slope * np.where((line >= 0) & (line <= 1), g, 0)

    return lambda v: np.clip(slope * v + offset, 0, 1), backward


def truth(tensors, options, g):
    """y and every gradient. Where residual is x, its gradient is part of that of x."""
    x, w1, b1, w2, b2, residual, scale, shift, g = (
        None if t is None else t.detach().double().resolve_neg().numpy() for t in (*tensors.values(), g)
    )
    n, c, *spatial = x.shape
    given, g, residual = (None if t is None else t.reshape(n, c, math.prod(spatial)) for t in (x, g, residual))
    x = given if scale is None else scale[:, None] * given + shift[:, None]
    w1, w2 = (None if w is None else w.reshape(w.shape[:2]) for w in (w1, w2))
    act, gate, pre_act, post_act = (activation(options[name]) for name in ("act", "gate", "pre_act", "post_act"))
    if w1 is None:
        act = activation("identity")
    squeeze, positions = options["squeeze"], x.shape[2]
    of_mean, of_max = {"mean": (1, 0), "max": (0, 1), "mean_max": (0.5, 0.5)}[squeeze]

    u = pre_act[0](x)
    z = np.zeros((n, c))
    if of_mean:
        z = z + of_mean * u.mean(2)
    if of_max:
        z = z + of_max * u.max(2)
    p1 = z if w1 is None else np.einsum("nc,rc->nr", z, w1) + (0 if b1 is None else b1)
    h = act[0](p1)
    p2 = np.einsum("nr,cr->nc", h, w2) + (0 if b2 is None else b2)
    s = gate[0](p2)
    v = u * s[..., None] + (0 if residual is None else residual)
    y = post_act[0](v)

    dv = post_act[1](v, g)
    dp2 = gate[1](p2, (dv * u).sum(2))
    dp1 = act[1](p1, np.einsum("nc,cr->nr", dp2, w2))
    dz = dp1 if w1 is None else np.einsum("nr,rc->nc", dp1, w1)
    du = dv * s[..., None]
    if of_mean:
        du = du + (of_mean * dz / positions)[..., None]
    if of_max:
        largest = u == u.max(2, keepdims=True)
        du = du + largest * (of_max * dz)[..., None] / largest.sum(2, keepdims=True)
    daffine = pre_act[1](x, du)
    dx = daffine if scale is None else daffine * scale[:, None]
    dx = dx + (dv if tensors["residual"] is tensors["x"] else 0)
    shape = (n, c, *spatial)
    return y.reshape(shape), {
        "x": dx.reshape(shape),
        "w1": None if w1 is None else np.einsum("nr,nc->rc", dp1, z),
        "b1": dp1.sum(0),
        "w2": np.einsum("nc,nr->cr", dp2, h),
        "b2": dp2.sum(0),
        "residual": dv.reshape(shape),
        "scale": (daffine * given).sum((0, 2)),
        "shift": daffine.sum((0, 2)),
    }


# The calls.


@dataclass
class Call:
    tensors: dict  # x, w1, b1, w2, b2, residual, scale, shift
    options: dict
    g: torch.Tensor
    inplace: object = False
    wanted: tuple = ()  # the names of the gradients
    blamed: tuple = ()  # arguments, one of which a refusal must name
    named: list = field(default_factory=list)  # the hostile parts of the call


def expanded(t):
    return t[..., :1].expand(t.shape) if t.shape[-1] > 1 else t


def every_second(t):
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def inner(t):
    wide = t.new_zeros(t.shape[0] + 1, t.shape[1] + 2, *t.shape[2:])
    wide[1:, 1:-1] = t
    return wide[1:, 1:-1]


def offset(t):
    flat = t.new_zeros(t.numel() + 1)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": expanded,
    "every_second": every_second,
    "inner": inner,
    "offset": offset,
    "negated": lambda t: torch._neg_view(-t),
}


class Draw:
    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.named = []

    def chance(self, p):
        return self.rng.random() < p

    def one(self, *choices):
        return self.rng.choice(choices)

    def hostile(self, name, p):
        """Whether the call gets the hostile part of this name."""
        drawn = self.chance(p)
        if drawn:
            self.named.append(name)
        return drawn

    def tensor(self, shape, dtype, scale=1.0):
        t = (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(dtype)
        tiny = torch.finfo(dtype).tiny
        specials = (math.nan, math.inf, -math.inf, 0.0, -0.0, 3.0, -3.0, 6.0, tiny, tiny / 4)
        while t.numel() and self.chance(0.08):
            t[tuple(self.rng.randrange(size) for size in shape)] = self.one(*specials)
        return t

    def laid_out(self, t, *layouts):
        name = self.one("contiguous", *layouts)
        if name != "contiguous":
            self.named.append(name)
        return LAYOUTS[name](t)


def draw(seed):
    d = Draw(seed)
    n = d.one(0, 1, 1, 2, 3)
    c = d.one(1, 1, 2, 3, 8, d.rng.randint(1, 40))
    r = d.one(None, 1, 2, d.rng.randint(1, 20))
    spatial = d.one((1,), (1, 1), (7,), (3, 5), (2, 1, 4), (0, 3), (d.rng.randint(1, 70),))
    dtype = d.one(*DTYPES)
    weight_dtype = torch.float32 if dtype.itemsize == 2 and d.chance(0.5) else dtype
    layouts = tuple(name for name in LAYOUTS if name != "contiguous")
    columns = c if r is None else r

    def weight(rows, columns):
        w = d.tensor((rows, columns, *(1,) * d.rng.randint(0, 3)), weight_dtype, columns**-0.5)
        if d.hostile("a weight stored transposed", 0.2):
            return w.transpose(0, 1).contiguous().transpose(0, 1)
        return d.laid_out(w, "every_second", "inner", "offset", "negated")

    def bias(length):
        return d.laid_out(d.tensor((length,), weight_dtype), "every_second", "offset") if d.chance(0.7) else None

    x = d.laid_out(d.tensor((n, c, *spatial), dtype), *layouts)
    own = d.laid_out(d.tensor((n, c, *spatial), dtype), *layouts)
    tensors = {
        "x": x,
        "w1": None if r is None else weight(r, c),
        "b1": None if r is None else bias(r),
        "w2": weight(c, columns),
        "b2": bias(c),
        "residual": d.one(None, None, x, own),
        "scale": None,
        "shift": None,
    }
    squeeze = d.one("mean", "max", "mean_max")
    empty = 0 in spatial
    # PyTorch computes an empty map, and its backward of these at NaN depends on their position in a row.
    names = [name for name in ACTIVATIONS if not (empty and name in ("relu6", "hardswish"))]
    # If u is rounded, another element may be the largest. These activations keep the order of x.
    pre_acts = (None, *names) if squeeze == "mean" or dtype is torch.float64 else ORDER_KEEPING
    options = {
        "act": d.one(*names),
        "gate": d.one(*GATE_CHOICES),
        "squeeze": squeeze,
        "pre_act": d.one(None, *pre_acts),
        "post_act": d.one(None, None, *names),
    }
    g = d.laid_out(d.tensor((n, c, *spatial), dtype), *layouts)
    call = Call(tensors, options, g, named=d.named)
    if empty and squeeze != "mean":
        if d.hostile("the maximum of no positions", 1):
            call.blamed = ("squeeze", "x")
        else:
            options["squeeze"] = "mean"
    present = [name for name, t in tensors.items() if t is not None]
    if d.chance(0.6):
        call.wanted = tuple(name for name in present if d.chance(0.6))
    # Training rounds scale * x + shift to the dtype of x, which can change a maximum and the side of a kink.
    if (dtype is torch.float64 or not call.wanted) and d.chance(0.3):
        for name in ("scale", "shift"):
            vector = d.tensor((c,), d.one(dtype, weight_dtype))
            tensors[name] = d.laid_out(vector, "every_second", "offset", "negated")
            present.append(name)
            call.wanted += (name,) * (bool(call.wanted) and d.chance(0.6))
    kind = d.one("plain", "plain", "in place", "wrong")
    if kind == "in place":
        in_place(d, call)
    elif kind == "wrong":
        wrong(d, call, present)
    return call


def in_place(d, call):
    x = call.tensors["x"]
    call.inplace = True
    if call.wanted and d.chance(0.8):
        call.wanted = ()
    if "expanded" in d.named and any(
        stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)
    ):
        call.blamed += ("x",)
    if call.wanted:
        call.blamed += ("inplace",)
    if call.blamed or x.numel() == 0:
        return
    if x.numel() > 1 and d.hostile("in place, residual overlaps x", 0.2):
        flat = torch.cat([x.flatten(), x.flatten()[:1]])
        call.tensors["x"] = flat[:-1].view(x.shape)
        call.tensors["residual"] = flat[1:].view(x.shape)
        call.blamed = ("residual",)
    elif call.tensors["b2"] is not None and x.dtype is call.tensors["b2"].dtype and x.numel() >= x.shape[1]:
        if d.hostile("in place, b2 lies in x", 0.2):
            call.tensors["x"] = x.clone(memory_format=torch.contiguous_format)
            if call.tensors["residual"] is x:
                call.tensors["residual"] = call.tensors["x"]
            call.tensors["b2"] = call.tensors["x"].flatten()[: x.shape[1]]
            call.blamed = ("b2",)
    elif sum(size > 1 for size in x.shape) > 1 and d.hostile("in place, x overlaps itself", 0.2):
        call.tensors["x"] = x.flatten().as_strided(x.shape, (1,) * x.dim())
        call.tensors["residual"] = None
        call.blamed = ("x",)
    elif d.hostile("in place, an inference tensor outside inference mode", 0.2):
        with torch.inference_mode():
            call.tensors["x"] = x.clone()
        call.tensors["residual"] = None
        call.blamed = ("x", "inplace")


def wrong(d, call, present):
    """Make one argument invalid. The refusal must name it, or an argument that it then contradicts."""
    tensors, x = call.tensors, call.tensors["x"]
    others = tuple(name for name, t in tensors.items() if name != "x" and t is not None)
    kind = d.one("type", "shape", "dtype", "device", "layout", "option", "form")
    name = d.one(*present)
    t = tensors[name]
    call.wanted = ()
    call.named.append(f"wrong {kind} of {name}")
    alone = (name,) if name != "x" else ("x", *others)
    if kind == "option":
        option = d.one("act", "gate", "squeeze", "pre_act", "post_act")
        right = call.options[option]
        call.options[option] = d.one("swish", 7, ["relu"], torch.relu, "RELU", b"relu", HardSigmoid("a", None))
        call.named[-1] = f"{option}={call.options[option]!r}"
        if d.hostile("inplace is no bool", 0.3):
            call.options[option] = right
            call.inplace = d.one("yes", 1, None, [])
            call.blamed = (*call.blamed, "inplace", "x")
        else:
            call.blamed += (option,)
        return
    if kind == "form":  # the one-FC and two-FC forms are mixed up
        if tensors["w1"] is None:
            tensors["b1"] = torch.zeros(2, dtype=tensors["w2"].dtype)
            call.blamed += ("b1",)
        else:
            tensors["w2"] = None
            call.blamed += ("w2",)
        return
    if t is x and tensors["residual"] is x:
        tensors["residual"], others = None, tuple(o for o in others if o != "residual")
        name, alone = "x", ("x", *others)
    if kind == "type":
        replaced = d.one(0.0, "x", [1.0], np.zeros(3), *([None] if name in ("x", "w2") else []))
    elif kind == "shape":
        replaced = d.one(
            t[None, None, None, None], t[:, None] if t.dim() == 1 else torch.cat([t, t], 1), t.flatten()[:0]
        )
        if name == "x":
            alone = ("x", *others)
    elif kind == "dtype":
        replaced = d.one(t.to(torch.int32), t.to(torch.complex64), t > 0)
        alone = (name, "w1", "b1", "b2") if name == "w2" else alone
    elif kind == "device":
        replaced = t.to("meta")
        alone = (name, "w1", "b1", "b2") if name == "w2" else alone
    elif d.hostile("storage freed", 0.2):
        replaced = t.clone()
        replaced.untyped_storage().resize_(0)
        if t.numel() == 0:
            return
    elif d.hostile("nested", 0.3):
        layout = d.one(torch.strided, torch.jagged)
        replaced = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(2, 3)], layout=layout)
    else:
        replaced = t.to_sparse()
    tensors[name] = replaced
    call.blamed += alone


# The check.


def memory(t):
    """A copy of the bytes of a tensor's storage."""
    if not isinstance(t, torch.Tensor) or t.layout is not torch.strided or t.is_nested or not t.is_cpu:
        return None
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


def same_storage(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def check(call):
    tensors = call.tensors
    before = {name: memory(t) for name, t in (*tensors.items(), ("g", call.g))}
    if not call.blamed:
        expected, gradients = truth(tensors, call.options, call.g)
    leaves = {
        name: t.requires_grad_() if name in call.wanted and isinstance(t, torch.Tensor) else t
        for name, t in tensors.items()
    }
    positional = [leaves[name] for name in ("x", "w1", "b1", "w2", "b2")]
    try:
        named = {name: leaves[name] for name in ("residual", "scale", "shift")}
        y = se_fused.squeeze_excite(*positional, **named, inplace=call.inplace, **call.options)
    except (TypeError, ValueError) as error:
        if not re.match(rf"squeeze_excite: ({'|'.join(call.blamed) or 'nothing'}) is ", str(error)):
            raise
        for name, t in tensors.items():
            if before[name] is not None:
                assert torch.equal(memory(t), before[name]), f"{name} changed, although the call was refused"
        return
    assert not call.blamed, f"not refused, although {call.blamed} is wrong"
    x = tensors["x"]
    assert y.shape == x.shape
    assert y.dtype is x.dtype
    assert_close(y.detach(), torch.from_numpy(expected), x.dtype)
    if call.inplace:
        assert y is x
        written = torch.empty(0, dtype=x.dtype).set_(before["x"].untyped_storage())
        written = written.as_strided(x.shape, x.stride(), x.storage_offset())
        written.copy_(-x if x.is_neg() else x)
        assert torch.equal(memory(x), before["x"]), "something beside x was written"
    wanted = [name for name in call.wanted if not (name == "residual" and tensors["residual"] is x)]
    if wanted:
        found = torch.autograd.grad(y, [leaves[name] for name in wanted], call.g, allow_unused=True)
        for name, grad in zip(wanted, found, strict=True):
            assert grad is not None, f"no gradient of {name}"
            assert grad.dtype is tensors[name].dtype
            assert grad.shape == tensors[name].shape
            right = torch.from_numpy(gradients[name]).reshape(grad.shape)
            assert_close(grad, right, grad.dtype, f"gradient of {name}", factor=4)
    for name, t in (*tensors.items(), ("g", call.g)):
        if before[name] is not None and not (call.inplace and same_storage(t, x)):
            assert torch.equal(memory(t), before[name]), f"{name} changed"


def describe(call):
    def text(t):
        if not isinstance(t, torch.Tensor):
            return repr(t)
        if t.is_nested or t.layout is not torch.strided:
            return f"{t.layout}, nested: {t.is_nested}"
        return f"{list(t.shape)} {t.dtype} strides {t.stride()}"

    tensors = ", ".join(f"{name} {text(t)}" for name, t in call.tensors.items())
    return f"{tensors}; {call.options}; inplace={call.inplace!r}, wanted={call.wanted}; hostile: {call.named}"


def test_hostile_calls(one_thread):
    """SE_FUSED_SEEDS=0,100000 chooses a range of seeds."""
    first, last = map(int, os.environ.get("SE_FUSED_SEEDS", "0,6000").split(","))
    failures = []
    for seed in range(first, last):
        call = draw(seed)
        try:
            check(call)
        except Exception as error:
            failures.append(f"SE_FUSED_SEEDS={seed},{seed + 1}: {type(error).__name__}: {error}\n    {describe(call)}")
    assert not failures, f"{len(failures)} of {last - first} calls, of which\n" + "\n".join(failures[:5])
