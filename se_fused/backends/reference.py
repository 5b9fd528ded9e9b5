"""The formula in plain PyTorch (se_fused/reference.py), for every device.

A public call computes it under PyTorch's own autograd. What follows is for operators in programs that were recorded
elsewhere, such as an exported one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..options import FUNCTIONS, Options
from .backend import Backend

_NAMES = ("x", "w1", "b1", "w2", "b2")


class Reference(Backend):
    name = "reference"

    def why_not(self, device: torch.device) -> None:
        return None

    def forward_out(self, *args: Any) -> None:
        (x, w1, b1, w2, b2, residual, scale, shift), options = args[:8], Options(*args[8:15])
        _, y, *saved = args[15:]
        u = FUNCTIONS[options.pre_act](reference.affine(x, scale, shift))
        for out, found in zip(saved, reference.before_gate(u, w1, b1, w2, b2, options), strict=True):
            if out is not None and found is not None:
                out.copy_(found)
        y.copy_(reference.compute(x, w1, b1, w2, b2, residual, scale, shift, options=options))

    def backward_out(self, g: Tensor, *args: Any) -> None:
        inputs, options, residual_is_x, outs = list(args[:6]), Options(*args[9:16]), args[17], args[18:]
        for name, t, out in zip(_NAMES, inputs, outs, strict=False):
            if t is None and out is not None:
                raise RuntimeError(f"se_fused: d{name} was asked for without {name}")
        if inputs[5] is None:
            inputs[5] = torch.zeros_like(inputs[0])
        with torch.inference_mode(False):  # an operator runs below autograd
            # Each input by itself, also where the residual is x. An inference tensor cannot be recorded.
            leaves = [t if t is None else (t.clone() if t.is_inference() else t.detach()) for t in inputs]
            recorded = [t.requires_grad_() for t in leaves if t is not None]
            x, w1, b1, w2, b2, residual = leaves
            assert x is not None
            assert w2 is not None
            y = reference.compute(x, w1, b1, w2, b2, residual, options=options)
            found = iter(torch.autograd.grad(y, recorded, g.clone() if g.is_inference() else g))
        grads: list[Any] = [None if t is None else next(found) for t in leaves]
        if residual_is_x:
            grads[0] = grads[0] + grads[5]
        for out, grad in zip(outs, grads, strict=True):
            if out is not None:
                out.copy_(grad)
