"""The formula in plain PyTorch (se_fused/reference.py), for every device.

A public call computes the formula under PyTorch's own autograd, without this class. The class runs the operators of
programs that were recorded elsewhere, such as exported ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..options import FUNCTIONS, Options
from .backend import Backend


class Reference(Backend):
    name = "reference"

    def why_not(self, device: torch.device) -> None:
        return None

    def forward_out(self, *args: Any) -> None:
        (x, w1, b1, w2, b2, residual), options = args[:6], Options(*args[6:13])
        _, y, *saved = args[13:]
        u = FUNCTIONS[options.pre_act](x.to(torch.promote_types(x.dtype, torch.float32)))
        for out, found in zip(saved, reference.before_gate(u, w1, b1, w2, b2, options), strict=True):
            if out is not None and found is not None:
                out.copy_(found)
        y.copy_(reference.compute(x, w1, b1, w2, b2, residual, options))

    def backward_out(self, g: Tensor, *args: Any) -> None:
        inputs, options = args[:6], Options(*args[9:16])
        (_, residual_is_x), grads = args[16:18], args[18:]
        given = [i for i, t in enumerate(inputs) if t is not None and not (i == 5 and residual_is_x)]

        def function(*tensors: Tensor) -> Tensor:
            found: list[Any] = [None] * 6
            for i, t in zip(given, tensors, strict=True):
                found[i] = t
            if residual_is_x:
                found[5] = found[0]
            x, w1, b1, w2, b2, residual = found
            return reference.compute(x, w1, b1, w2, b2, residual, options)

        # An operator runs below autograd, where torch.autograd.grad records nothing; torch.func still works there.
        vjp: Any = torch.func.vjp(function, *(inputs[i] for i in given))[1]
        for i, grad in zip(given, vjp(g), strict=True):
            if grads[i] is not None:
                grads[i].copy_(grad)
