"""Runs an SE layer together with its neighbours, and a batch norm with what follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import PLAIN_TYPES
from ..options import ACTIVATIONS, FUNCTIONS, Options
from ..recognised import Recognised
from ..swap import compute
from ..weights import NormVectors, WeightReader, reader_of_norm
from .cost import decide, folds_norm
from .inline import Inline
from .neighbours import Neighbours, Norm
from .operators import Operators
from .program import Program

_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class How:
    """How joined calls are run.

    kernels: `CPU.unchecked`, whose functions csrc/fast_path.h describes, or the same functions for a GPU. weights: of
    each SE layer, by its path and formula. way: how to compute the convolutions (cost.py); None: the fastest.
    on_convolution: is told the path of each and how it is computed. inplace: whether inline SE layers may overwrite
    their maps.
    """

    kernels: Any
    weights: dict[tuple[str, Recognised], WeightReader]
    way: str | None = None
    on_convolution: Callable[[str, str], None] | None = None
    inplace: bool = False

    @classmethod
    def of(cls, program: Program, root: nn.Module, kernels: Any, way: str | None = None) -> How:
        """root: a module that fits `program`, whose parameters are as they were when it was traced."""
        calls = (call.target for call in program.calls)
        layers = [call for call in calls if isinstance(call, (Neighbours, Inline))]
        of_layers = {_key(call): WeightReader(root.get_submodule(_path(call)), call.recognised) for call in layers}
        return cls(kernels, of_layers, way)

    def choose(self, path: str, u: Tensor, weight: Tensor, usual: bool) -> str:
        """How to compute the convolution `path` of u. usual: whether its weight and bias are of u's shape and dtype."""
        if not usual:
            way, text = "convolution", "convolution: of an unusual weight"
        elif self.way is not None:
            return self.way
        else:
            decision = decide(u, weight, on_gpu=isinstance(self.kernels, Operators))
            way, text = decision.way, "" if self.on_convolution is None else decision.text(u, weight)
        if self.on_convolution is not None:
            self.on_convolution(path, text)
        return way


def _path(call: Neighbours | Inline) -> str:
    """The module below whose path the weights of an SE layer have their names."""
    return "" if isinstance(call, Inline) else call.layer


def _key(call: Neighbours | Inline) -> tuple[str, Recognised]:
    return _path(call), call.recognised


def bind(call: Neighbours | Norm | Inline, root: nn.Module, how: How) -> Callable[..., Tensor]:
    """The function of x, and of the residual if there is one, that computes `call` with the modules of `root`."""
    if isinstance(call, Inline):
        return _bind_inline(call, root, how)
    if isinstance(call, Neighbours):
        return _bind_layer(call, root, how)
    return _bind_norm(call, root, how) if call.conv is None else _bind_convolution(call.conv, call, root, how)


def _normalised(x: Tensor, norm: NormVectors) -> Tensor:
    weight, bias, mean, variance, eps = norm
    return F.batch_norm(x, mean, variance, weight, bias, training=mean is None and variance is None, eps=eps)


def _sum(y: Tensor, residual: Tensor, residual_first: bool) -> Tensor:
    return residual + y if residual_first else y + residual


def _bind_norm(call: Norm, root: nn.Module, how: How) -> Callable[..., Tensor]:
    kernels, read = how.kernels, reader_of_norm(root.get_submodule(call.norm))
    act, activate, owns_x = list(ACTIVATIONS).index(call.act), ACTIVATIONS[call.act], call.owns_x

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        norm = read()
        y = kernels.batch_norm(x, residual, owns_x, act, norm)
        if y is None:  # such as with a residual that is broadcast
            y = _normalised(x, norm)
            y = activate(y if residual is None else _sum(y, residual, call.residual_first))
        return y  # type: ignore[no-any-return]

    return run


# Computes u and s, the gates, or y = u * s and None if the gates are not wanted or cannot be had.
Gated = Callable[[Tensor, bool], tuple[Tensor, "Tensor | None"]]


def _bind_convolution(
    path: str, norm: Norm | None, root: nn.Module, how: How, gated: Gated | None = None
) -> Callable[..., Tensor]:
    """The function that computes the 1x1 convolution `path` of x, or of the result of `gated`, and `norm` of that."""
    conv = cast(Any, root.get_submodule(path))
    normalise = None if norm is None else _bind_norm(norm, root, how)
    read_norm = None
    # What follows the batch norm would need a pass over y, which the two can share.
    if norm is not None and not norm.residual and norm.act == "identity":
        read_norm = reader_of_norm(root.get_submodule(norm.norm))

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        parameters = vars(conv)["_parameters"]
        weight, bias = parameters["weight"], parameters["bias"]
        # Others may have been assigned.
        usual = type(weight) in PLAIN_TYPES and weight.dtype is x.dtype
        usual = usual and weight.shape == (len(weight), x.shape[1], *(1,) * (x.dim() - 2))
        usual = usual and (bias is None or (type(bias) in PLAIN_TYPES and bias.shape == weight.shape[:1]))
        way = how.choose(path, x, weight, usual)
        folded = None
        if read_norm is not None and usual and (way == "folded" or folds_norm(x, weight)):
            folded = how.kernels.fold(weight, bias, read_norm())
        u, s = (x, None) if gated is None else gated(x, way == "folded")
        weight, bias = folded or (weight, bias)
        if way != "convolution":
            y = _product(u, s, weight, bias)
        elif folded is not None:
            y = _CONVOLVE[u.dim()](u, weight, bias)
        else:
            y = conv(u)
        return y if normalise is None or folded is not None else normalise(y, *residual)

    return run


def _bind_inline(call: Inline, root: nn.Module, how: How) -> Callable[[Tensor], Tensor]:
    recognised, read, attributes = call.recognised, how.weights[_key(call)], vars(root)
    options, original = recognised.options(), call.program.bind(root, partial(bind, root=root, how=how))

    def run(u: Tensor) -> Tensor:
        if type(u) in PLAIN_TYPES and u.dim() in recognised.dims:
            weights = read(attributes)
            if weights is not None:
                weights = read.fold(weights, u.numel()) if read.accepts(u, weights) else None
            if weights is not None:
                return compute(u, weights, recognised, options, how.inplace)
        return original(u)  # type: ignore[no-any-return]

    return run


def _bind_layer(call: Neighbours, root: nn.Module, how: How) -> Callable[..., Tensor]:
    kernels, owns_x = how.kernels, call.owns_x
    recognised, read = call.recognised, how.weights[_key(call)]
    attributes = vars(root.get_submodule(call.layer))  # not root itself, which would be a cycle
    if call.inline is None:
        layer: Callable[..., Any] = root.get_submodule(call.layer)
    else:
        layer = call.inline.bind(root, partial(bind, root=root, how=how))
    options = Options.of(
        recognised.act or "identity", recognised.gate, recognised.squeeze, call.pre_act,
        call.post_act if call.conv is None else "identity",
    )  # fmt: skip
    pre_act, post_act = FUNCTIONS[options.pre_act], FUNCTIONS[options.post_act]
    read_norm = None if call.norm is None else reader_of_norm(root.get_submodule(call.norm))

    def forward(x: Tensor, residual: Tensor | None, s: Tensor | None) -> Tensor | None:
        """What the kernel returns."""
        weights = read(attributes)
        if weights is not None:
            weights = read.fold(weights, x.numel()) if weights[2].dtype is x.dtype else None
        if weights is None:
            return None
        norm = None if read_norm is None else read_norm()
        return kernels.forward(x, *weights, residual, x if owns_x else None, *options, None, None, norm, s)  # type: ignore[no-any-return]

    def scaled(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = forward(x, residual, None)
        if y is None:
            y = layer(pre_act(x if read_norm is None else _normalised(x, read_norm())))
            y = post_act(y if residual is None else _sum(y, residual, call.residual_first))
        return y

    def gated(x: Tensor, wants_s: bool) -> tuple[Tensor, Tensor | None]:
        if wants_s:
            s = x.new_empty(x.shape[:2])
            u = forward(x, None, s)
            if u is not None:
                return u, s
        return scaled(x), None

    if call.conv is None:
        return scaled
    norm = None
    if call.conv_norm is not None:
        norm = Norm(None, call.conv_norm, True, call.residual, call.residual_first, call.post_act)
    return _bind_convolution(call.conv, norm, root, how, gated)


def _product(u: Tensor, s: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W (u * s) + b as one matrix product per sample, (W diag(s)) u + b, which neither reads nor writes u again.

    u: [N, Cin, *spatial]. s: [N, Cin], or None for 1. weight: [Cout, Cin, 1, ...]. bias: [Cout] or None.
    """
    n, c, *spatial = u.shape
    matrix = weight.flatten(1)
    of_sample = matrix.expand(n, -1, -1) if s is None else matrix * s.unsqueeze(1)  # [N, Cout, Cin]
    maps = u.reshape(n, c, -1)
    y = torch.bmm(of_sample, maps) if bias is None else torch.baddbmm(bias.unsqueeze(1), of_sample, maps)
    return y.view(n, -1, *spatial)
