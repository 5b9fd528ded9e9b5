"""Runs an SE layer together with its neighbours, and a batch norm with what follows it, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import CPU
from ..memory import PLAIN_TYPES
from ..options import ACTIVATIONS, FUNCTIONS, Options
from ..swap import parameters_of
from .cost import folds_gate, folds_norm
from .neighbours import Neighbours, Norm

_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def bind(call: Neighbours | Norm, root: nn.Module, folds: bool | None = None) -> Callable[..., Tensor]:
    """The function of x, and of the residual if there is one, that computes `call` with the modules of `root`.

    folds: whether to fold the gate into the convolution; None: as `cost` says.
    """
    return _bind_norm(call, root) if isinstance(call, Norm) else _bind_layer(call, root, folds)


def _reader_of(norm: nn.Module) -> Callable[[], tuple[Any, ...]]:
    """The function that reads `norm` as csrc/fast_path.h takes it."""
    attributes, parameters, buffers = vars(norm), norm._parameters, norm._buffers
    return lambda: (
        *(parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]),
        attributes["eps"],
    )


def _normalised(x: Tensor, norm: tuple[Any, ...]) -> Tensor:
    weight, bias, mean, variance, eps = norm
    return F.batch_norm(x, mean, variance, weight, bias, training=mean is None and variance is None, eps=eps)


def _bind_norm(call: Norm, root: nn.Module) -> Callable[..., Tensor]:
    kernels, read = CPU.unchecked, _reader_of(root.get_submodule(call.norm))
    act, activate, owns_x = list(ACTIVATIONS).index(call.act), ACTIVATIONS[call.act], call.owns_x

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        norm = read()
        y = kernels.batch_norm(x, residual, owns_x, act, norm)
        if y is None:
            y = _normalised(x, norm)
            y = activate(y if residual is None else y + residual)
        return y  # type: ignore[no-any-return]

    return run


def _bind_layer(call: Neighbours, root: nn.Module, folds: bool | None) -> Callable[..., Tensor]:
    kernels, owns_x = CPU.unchecked, call.owns_x
    recognised, layer = call.recognised, root.get_submodule(call.layer)
    parameters = [get for get, _ in parameters_of(layer, recognised)]
    options = Options.of(
        recognised.act or "identity", recognised.gate, recognised.squeeze, call.pre_act,
        call.post_act if call.conv is None else "identity",
    )  # fmt: skip
    pre_act, post_act = FUNCTIONS[options.pre_act], FUNCTIONS[options.post_act]
    read = None if call.norm is None else _reader_of(root.get_submodule(call.norm))

    def forward(x: Tensor, residual: Tensor | None, s: Tensor | None) -> Tensor | None:
        """What the kernel returns."""
        w1, b1, w2, b2 = (get(layer) for get in parameters)
        if w2.dtype is not x.dtype:  # the kernel takes some that the layer does not
            return None
        norm = None if read is None else read()
        return kernels.forward(x, w1, b1, w2, b2, residual, owns_x, *options, norm, s)  # type: ignore[no-any-return]

    def scaled(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = forward(x, residual, None)
        if y is None:  # such as with a residual that is broadcast
            y = layer(pre_act(x if read is None else _normalised(x, read())))
            y = post_act(y if residual is None else y + residual)
        return y

    if call.conv is None:
        return scaled
    conv: Any = root.get_submodule(call.conv)
    of_conv = conv._parameters
    read_conv_norm = normalise = None
    if call.conv_norm is not None:
        normalise = _bind_norm(Norm(call.conv_norm, True, call.residual, call.post_act), root)
        # What follows the batch norm would need a pass over y, which the two can share.
        if not call.residual and call.post_act == "identity":
            read_conv_norm = _reader_of(root.get_submodule(call.conv_norm))

    def convolved(x: Tensor, *residual: Tensor) -> Tensor:
        weight, bias = of_conv["weight"], of_conv["bias"]
        # Another one may have been assigned.
        pointwise = type(weight) in PLAIN_TYPES and weight.numel() == weight.shape[0] * x.shape[1]
        pointwise = pointwise and weight.dtype is x.dtype
        folds_s = pointwise and (folds_gate(x, weight) if folds is None else folds)
        folded = None
        if read_conv_norm is not None and (folds_s or (pointwise and folds_norm(x, weight))):
            folded = kernels.fold(weight, bias, read_conv_norm())
        y = None
        if folds_s:
            s = x.new_empty(x.shape[:2])
            u = forward(x, None, s)
            if u is not None:
                y = _product(u, s, *(folded or (weight, bias)))
        if y is None:
            u = scaled(x)
            y = conv(u) if folded is None else _CONVOLVE[u.dim()](u, *folded)
        return y if normalise is None or folded is not None else normalise(y, *residual)

    return convolved


def _product(u: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W (u * s) + b as one matrix product per sample, (W diag(s)) u + b, which neither reads nor writes u again.

    u: [N, Cin, *spatial]. s: [N, Cin]. weight: [Cout, Cin, 1, ...]. bias: [Cout] or None.
    """
    n, c, *spatial = u.shape
    of_sample = weight.flatten(1) * s.unsqueeze(1)  # [N, Cout, Cin]
    if u.is_contiguous():
        y = _products(of_sample, u.view(n, c, -1), None if bias is None else bias.unsqueeze(1))
        return y.view(n, -1, *spatial)
    rows = u.movedim(1, -1).reshape(n, -1, c)
    return _products(rows, of_sample.mT, bias).view(n, *spatial, -1).movedim(-1, 1)


def _products(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias, a, b)
