"""Layers that look like SE but differ in gradients, at some sizes, in some modes, or in what a call leaves behind.

FALSE: by name, what makes one, and the reason why it is kept. IN_PART: those of them that hold a part that is SE, for
all calls or in inference, and do the rest of what they do around it. KEPT, TOTAL: what some of them change outside.
"""

import random

import numpy
import torch
import torch.nn.functional as F
from se_layers import Convolutional
from torch import nn

KEPT, TOTAL = [], [0]
ONE, LEARNED = torch.ones(()), torch.ones((), requires_grad=True)


class Scaled(torch.autograd.Function):
    """The identity, with three times its gradient."""

    @staticmethod
    def forward(ctx, v):
        return v.view_as(v)

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Frozen(Convolutional):
    def forward(self, x):
        with torch.no_grad():
            s = self.gate(self.up(self.act(self.down(self.squeeze(x)))))
        return self.scale(x, s)


class OnlyInTraining(Convolutional):
    def squeeze(self, x):
        z = super().squeeze(x)
        return z.detach() if self.training else z


def with_part(**parts):
    return type("Varied", (Convolutional,), parts)


def gate_then(effect):
    def gate(self, p2):
        s = torch.sigmoid(p2)
        effect(self, s)
        return s

    return with_part(gate=gate)


def count(self, s):
    self.calls = getattr(self, "calls", 0) + 1


def count_on_class(self, s):
    type(self).calls = getattr(type(self), "calls", 0) + 1


def in_a_list(self, s):
    self.__dict__.setdefault("history", []).append(float(s.sum()))


def local_pooling(side):
    def squeeze(self, x):
        if max(x.shape[2:]) <= side:
            return x.mean((2, 3), keepdim=True)
        return F.adaptive_avg_pool2d(F.avg_pool2d(x, side, 1), 1)

    return with_part(squeeze=squeeze)


def detached_bias(self, p1):
    b = self.down.bias[:, None, None]
    return F.relu(p1 - b + b.detach())


def clamped_kernel(self, x):
    return F.avg_pool2d(x, [min(side, 200) for side in x.shape[2:]]).mean((2, 3), keepdim=True)


def maximum_of_squares(self, x):
    pool = torch.amax if x.shape[2] == x.shape[3] else torch.mean
    return pool(x, (2, 3), keepdim=True)


def detached_squeeze(self, x):
    return x.detach().mean((2, 3), keepdim=True)


def in_training(effect):
    return lambda self, s: effect(self, s) if self.training else None


def with_gradients(effect):
    return lambda self, s: effect(self, s) if s.requires_grad else None


def counting_by_default(self, p2, calls=[]):  # noqa: B006 (it is what is tested)
    calls.append(1)
    return torch.sigmoid(p2)


def dropping(drops):
    class Drops(Convolutional):
        def forward(self, x):
            return x if self.training and drops() else super().forward(x)

    return Drops


def with_listed(make):
    def build():
        layer = Convolutional()
        layer.listed = make()
        return layer

    return build


def float_for_half(self, x, s):
    return x.float() * s if x.dtype is torch.bfloat16 else x * s


def nothing_for_half(self, x, s):
    return x if x.dtype is torch.float16 else x * s


def windows_in_training(self, x):
    if self.training and max(x.shape[2:]) > 20:
        x = F.avg_pool2d(x, 20)
    return x.mean((2, 3), keepdim=True)


def scripted_child():
    layer = Convolutional()
    layer.extra = torch.jit.script(nn.ReLU())
    return layer


FALSE = {
    "a squeeze that is detached": (with_part(squeeze=detached_squeeze), "the gradient of x differs"),
    "a gate without gradients": (Frozen, "no gradient reaches|gradient of x differs"),
    "a custom backward": (with_part(gate=lambda self, p2: Scaled.apply(torch.sigmoid(p2))), "the gradient of"),
    "a custom backward of the map": (with_part(scale=lambda self, x, s: Scaled.apply(x) * s), "the gradient of x"),
    "a weight that is detached": (with_part(act=detached_bias), "gradient of down.bias|gradient reaches down.bias"),
    "detached in training only": (OnlyInTraining, "the gradient of x differs .* in train mode"),
    "windows from 24 on": (local_pooling(24), "map of shape"),
    "windows from 160 on": (local_pooling(160), "does not compute on a map"),
    "windows from 384 on": (local_pooling(384), "does not compute on a map"),
    "square maps pooled otherwise": (with_part(squeeze=maximum_of_squares), "does not compute on a map"),
    "a clamped kernel": (with_part(squeeze=clamped_kernel), "does not compute on a map"),
    "the gate as an attribute": (gate_then(lambda self, s: setattr(self, "attention", s)), "attention|keeps a tensor"),
    "the gate as a private attribute": (gate_then(lambda self, s: setattr(self, "_s", s)), "_s|keeps a tensor"),
    "the gate on the class": (gate_then(lambda self, s: setattr(type(self), "last", s)), "keeps a tensor|last"),
    "the gate in a global list": (gate_then(lambda self, s: KEPT.append(s)), "keeps a tensor"),
    "a counter": (gate_then(count), "calls"),
    "a counter on the class": (gate_then(count_on_class), "calls of Varied|Varied.calls"),
    "a list of numbers": (gate_then(in_a_list), "history|without data"),
    "the gate in a list, in training": (gate_then(in_training(lambda self, s: KEPT.append(s))), "keeps a tensor"),
    "the gate in a list, with gradients": (gate_then(with_gradients(lambda self, s: KEPT.append(s))), "keeps a tensor"),
    "a number in training": (gate_then(in_training(lambda self, s: TOTAL.append(s.mean().item()))), "without data"),
    "a global counter": (gate_then(lambda self, s: TOTAL.__setitem__(0, TOTAL[0] + 1)), "a call changes TOTAL"),
    "a counter in a default": (with_part(gate=counting_by_default), "a call changes a default of"),
    "layer drop": (dropping(lambda: random.random() < 0.001), "draws random numbers"),
    "layer drop by NumPy": (dropping(lambda: numpy.random.rand() < 0.001), "draws random numbers"),
    "layer drop by PyTorch": (dropping(lambda: torch.rand(1) < 0.001), "draws random numbers"),
    "a parameter in a list": (with_listed(lambda: [nn.Parameter(torch.ones(()))]), "a tensor that is no parameter"),
    "a tensor in a tuple": (with_listed(lambda: (torch.ones(()),)), "a tensor that is no parameter"),
    "a global tensor": (with_part(act=lambda self, p1: F.relu(p1) * ONE), "a tensor that is no parameter"),
    "a global parameter": (with_part(act=lambda self, p1: F.relu(p1) * LEARNED), "a tensor that is no parameter"),
    "a module in a list": (with_listed(lambda: [nn.Identity()]), "a module that is no child"),
    "a clamped map": (with_part(scale=lambda self, x, s: x.clamp(-1e3, 1e3) * s), "huge, tiny, 0 or NaN"),
    "a map without its small numbers": (with_part(scale=lambda self, x, s: F.hardshrink(x, 0.4) * s), "huge, tiny, 0"),
    "no NaN": (with_part(scale=lambda self, x, s: torch.nan_to_num(x * s)), "huge, tiny, 0 or NaN"),
    "half becomes float": (with_part(scale=float_for_half), "changes the dtype|does not compute on a map"),
    "half is left alone": (with_part(scale=nothing_for_half), "does not compute on a map"),
    "another memory format": (with_part(scale=lambda self, x, s: (x * s).contiguous()), "memory format"),
    "windows in training": (with_part(squeeze=windows_in_training), "does not compute on a map .* in train mode"),
    "a scripted child": (scripted_child, "its extra is scripted"),
    "its own copying": (with_part(__deepcopy__=lambda self, memo: self), "its own way of copying gives itself"),
}  # fmt: skip
IN_PART = (
    "layer drop",
    "layer drop by NumPy",
    "layer drop by PyTorch",
    "detached in training only",
    "a parameter in a list",
    "a tensor in a tuple",
    "no NaN",
    "another memory format",
    "windows in training",
)
