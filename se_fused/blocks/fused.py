"""Runs an SE layer together with its neighbours, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backends import CPU
from ..options import FUNCTIONS, Options
from ..swap import parameters_of
from .cost import folds_gate, folds_norm
from .neighbours import Neighbours


def affine(norm: dict[str, Any], bias: Tensor | None, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale and shift [C], of `dtype`, with BatchNorm(x + bias) = scale * x + shift in eval mode.

    norm: the attributes of the module. bias: that of the convolution before it.
    """
    parameters, buffers = norm["_parameters"], norm["_buffers"]
    given = [parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"], bias]
    out = torch.empty((2, c), dtype=dtype, device="cpu")
    if not CPU.batch_norm(*given, norm["eps"], out):
        converted = [t if t is None else t.detach().to(dtype).contiguous() for t in given]
        if not CPU.batch_norm(*converted, norm["eps"], out):
            raise ValueError(f"se_fused: a batch norm has statistics or parameters of another shape than [{c}]")
    scale, shift = out.unbind()
    return scale, shift


def bind(neighbours: Neighbours, root: nn.Module, folds: bool | None = None) -> Callable[..., Tensor]:
    """The function of x, and of the residual if there is one, that computes `neighbours` with the modules of `root`.

    folds: whether to fold the gate into the convolution; None: as `cost` says.
    """
    recognised, has_conv = neighbours.recognised, neighbours.conv is not None
    layer = root.get_submodule(neighbours.layer)
    parameters = parameters_of(layer, recognised)
    options = Options.of(
        recognised.act or "identity", recognised.gate, recognised.squeeze, neighbours.pre_act, neighbours.post_act
    )
    norm, conv_norm = (
        None if name is None else vars(root.get_submodule(name)) for name in (neighbours.norm, neighbours.conv_norm)
    )
    conv: Any = root.get_submodule(neighbours.conv) if neighbours.conv else None
    normalise: Any = root.get_submodule(neighbours.conv_norm) if neighbours.conv_norm else lambda y: y
    convolve: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
    owns_x = neighbours.owns_x

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = [get(layer) for get, _ in parameters]
        scale, shift = (None, None) if norm is None else affine(norm, None, x.shape[1], dtype)
        # A weight that was assigned later may be of another shape.
        pointwise = has_conv and conv.weight.numel() == conv.weight.shape[0] * x.shape[1]
        if pointwise and (folds_gate(x, conv) if folds is None else folds):
            s = x.new_empty(x.shape[:2], dtype=dtype)
            u = CPU.fast_path(x, *weights, None, *options, inplace=owns_x, scale=scale, shift=shift, s=s)
            if u is not None:
                return _product(u, s, *_folded(conv, conv_norm, dtype))
        y = CPU.fast_path(x, *weights, residual, *options, inplace=owns_x, scale=scale, shift=shift)
        if y is None:
            y = _in_steps(x, weights, residual, options, scale, shift)
        if not has_conv:
            return y
        if conv_norm is not None and pointwise and folds_norm(y, conv):
            weight, bias = _folded(conv, conv_norm, dtype)
            return convolve[y.dim()](y, weight.view_as(conv.weight).to(y.dtype), bias.to(y.dtype))
        return normalise(conv(y))  # type: ignore[no-any-return]

    return run


def _in_steps(
    x: Tensor, weights: Any, residual: Tensor | None, options: Options, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """What the kernels compute in one pass, for the calls that they do not take, such as one with a residual that is
    broadcast."""
    if scale is not None:
        assert shift is not None
        across = (-1, *(1,) * (x.dim() - 2))
        x = torch.addcmul(shift.view(across), x, scale.view(across)).to(x.dtype)
    u = FUNCTIONS[options.pre_act](x)
    w1, b1, w2, b2 = weights
    y = ops.call(u, w1, b1, w2, b2, None, options._replace(pre_act=0, post_act=0))
    return FUNCTIONS[options.post_act](y if residual is None else y + residual)


def _folded(conv: Any, conv_norm: dict[str, Any] | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight [Cout, Cin] and bias [Cout] of a 1x1 convolution and the batch norm after it, as one product."""
    weight, bias = conv.weight.flatten(1), conv.bias
    if conv_norm is None:
        return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias
    scale, shift = affine(conv_norm, bias, weight.shape[0], dtype)
    return weight * scale.unsqueeze(1), shift


def _product(u: Tensor, s: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W (u * s) + b as one matrix product per sample, (W diag(s)) u + b, which neither reads nor writes u again.

    u: [N, Cin, *spatial]. s: [N, Cin]. weight: [Cout, Cin]. bias: [Cout].
    """
    n, c, *spatial = u.shape
    of_sample = (weight * s.unsqueeze(1)).to(u.dtype)  # [N, Cout, Cin]
    bias = bias.to(u.dtype)
    if u.is_contiguous():
        y = torch.baddbmm(bias.unsqueeze(1), of_sample, u.view(n, c, -1))
        return y.view(n, -1, *spatial)
    rows = u.movedim(1, -1).reshape(n, -1, c)
    y = torch.baddbmm(bias, rows, of_sample.mT)
    return y.view(n, *spatial, -1).movedim(-1, 1)
