"""The weights of an SE layer as the operation takes them, read anew in each call.

What a layer has beside them is folded into them. With the symbols of reference.py and a batch norm v -> D v + c, where
D = diag(gamma / sqrt(variance + eps)) and c = beta - D mean:

    a norm of z or h       W (D v + c) + b = (W D) v + (W c + b)
    a norm of p1 or p2     D (W v + b) + c = (D W) v + (D b + c)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backends import CPU
from .memory import PLAIN_TYPES
from .observers import observed, under_transform

if TYPE_CHECKING:
    from .recognised import Recognised

# Folding copies a weight. With 8 of its numbers for each of the map (C = 1536, R = 384, 7 x 7, a CPU) the folded call
# took 2.1 times as long as the original, with 2.6 (C = 2048, R = 128) 0.7 times.
_MOST_PER_NUMBER = 4
# Where batch norms can stand, in the order of computation: p1 = W1 z + b1, h = act(p1), p2 = W2 h + b2.
PLACES = ("z", "p1", "h", "p2")
# A getter, which takes the attributes of the layer, and the types that it may return.
_Parameter = tuple[Callable[[dict[str, Any]], Any], tuple[type, ...]]
# Weight, bias, mean, variance and epsilon of an eval-mode batch norm; weight and bias may be None.
NormVectors = tuple["Tensor | None", "Tensor | None", Tensor, Tensor, float]


class WeightReader:
    """Reads w1, b1, w2, b2 of a layer that is `recognised`. It holds no reference to the layer itself."""

    def __init__(self, layer: nn.Module, recognised: Recognised) -> None:
        names = (recognised.w1, recognised.b1, recognised.w2, recognised.b2)
        self._parameters = [_parameter(layer, name) for name in names]
        self._norms = [layer.get_submodule(path) for _, path in recognised.norms]
        self._folds: list[tuple[int, int, Callable[[], NormVectors]]] = []  # which weight, along which axis, of what
        for (place, _), norm in zip(recognised.norms, self._norms, strict=True):
            i = 0 if place in ("z", "p1") and recognised.w1 is not None else 2
            self._folds.append((i, 0 if place in ("p1", "p2") else 1, reader_of_norm(norm)))
        self._channels, self._axis = recognised.channels, -1 if recognised.channels_last else 1
        # A bias that is added apart could be one of another shape, which a sum broadcasts.
        self._apart = [(names.index(name), layer.get_parameter(name).shape) for name in recognised.apart]

    def __call__(self, attributes: dict[str, Any]) -> list[Any] | None:
        """[w1, b1, w2, b2] as they are. attributes: those of the layer. None if one of them is not plain any more."""
        weights = [get(attributes) for get, _ in self._parameters]
        if not all(type(w) in types for w, (_, types) in zip(weights, self._parameters)):  # noqa: B905
            return None
        for i, shape in self._apart:
            if weights[i] is None or weights[i].shape != shape:
                return None
        return weights

    def accepts(self, x: Tensor, weights: list[Any]) -> bool:
        """Whether x has the channels of the layer, and a dtype in which casts of the original, which a check in one
        dtype cannot detect, would change nothing."""
        if x.shape[self._axis] != self._channels:
            return False
        dtypes = {w.dtype for w in weights if w is not None}
        if dtypes == {x.dtype}:
            return True
        device = x.device.type
        return (
            len(dtypes) == 1
            and not self._apart  # a sum would have the wider dtype
            and torch.amp.is_autocast_available(device)
            and torch.is_autocast_enabled(device)
            and x.dtype is torch.get_autocast_dtype(device)
        )

    def fold(self, weights: list[Any], numbers: int) -> list[Any] | None:
        """`weights` as the operation takes them. numbers: of the map.

        None if a batch norm cannot be folded into them, as one in training mode, which uses the statistics of its
        input; also if that would take longer than the layer itself.
        """
        if not self._norms and not self._apart:
            return weights
        weights = list(weights)
        for i, _ in self._apart:
            weights[i] = weights[i].flatten()
        if any(vars(norm)["training"] for norm in self._norms):
            return None
        if sum(weights[i].numel() for i, _, _ in self._folds) > _MOST_PER_NUMBER * numbers:
            return None
        dtype = weights[2].dtype
        for i, axis, read in self._folds:
            norm = read()
            if not _fits(norm, weights[i].shape[axis], dtype):
                return None
            weights[i : i + 2] = (_fold_after, _fold_before)[axis](weights[i], weights[i + 1], norm)
        if dtype in (torch.float16, torch.bfloat16) and self._norms:
            # Where terms cancel, half precision would lose more than the layer does; the operation takes float32 too.
            weights = [None if w is None else w.float() for w in weights]
        return weights


def _parameter(layer: nn.Module, name: str | None) -> _Parameter:
    """One parameter. A bias may become None."""
    if name is None:
        return (lambda attributes: None), (type(None),)
    path, _, leaf = name.rpartition(".")
    types = PLAIN_TYPES if layer.get_parameter(name).dim() > 1 else (*PLAIN_TYPES, type(None))
    if not path:
        return (lambda attributes: attributes["_parameters"][leaf]), types
    module = layer.get_submodule(path)
    return (lambda attributes: vars(module)["_parameters"][leaf]), types


def reader_of_norm(norm: nn.Module) -> Callable[[], NormVectors]:
    """The function that reads the batch norm `norm`."""

    def read() -> NormVectors:
        attributes = vars(norm)  # this dict, and the two in it, may be replaced
        parameters, buffers = attributes["_parameters"], attributes["_buffers"]
        return (
            *(parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]),
            attributes["eps"],
        )

    return read


def _fits(norm: NormVectors, width: int, dtype: torch.dtype) -> bool:
    """Whether `norm` has statistics and is one of `width` channels with tensors of `dtype`."""
    *affine, mean, variance, _ = norm
    return all(
        type(t) in PLAIN_TYPES and t.shape == (width,) and t.dtype is dtype
        for t in (mean, variance, *(each for each in affine if each is not None))
    )


def _affine(norm: NormVectors) -> tuple[Tensor, Tensor]:
    """D and c of `norm`, in float32 at least."""
    *vectors, eps = norm
    wide = torch.promote_types(norm[2].dtype, torch.float32)
    weight, bias, mean, variance = (None if t is None else t.to(wide) for t in vectors)
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


def _fold_after(w: Tensor, b: Tensor | None, norm: NormVectors) -> tuple[Tensor, Tensor]:
    if w.is_cpu and CPU.has_fast_path() and not (torch.is_grad_enabled() or observed() or under_transform()):
        folded: tuple[Tensor, Tensor] | None = CPU.unchecked.fold(w, b, norm)
        if folded is not None:
            return folded
    scale, shift = _affine(norm)
    moved = shift if b is None else torch.addcmul(shift, b.to(shift.dtype), scale)
    return w * scale.view(-1, *(1,) * (w.dim() - 1)), moved


def _fold_before(w: Tensor, b: Tensor | None, norm: NormVectors) -> tuple[Tensor, Tensor]:
    scale, shift = _affine(norm)
    moved = (w.flatten(1) * shift).sum(1)  # not @, which autocast would round
    moved = moved if b is None else moved + b
    return w * scale.view(1, -1, *(1,) * (w.dim() - 2)), moved
