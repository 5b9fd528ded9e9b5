"""`factory`: new models are built with fused SE layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from .replace import replace


def factory(se_layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A function with the arguments of `se_layer` that makes the same layer and replaces it, as `replace` does.

    Parameters, their names and initial values are those of `se_layer`, so checkpoints fit.

    Args:
        se_layer: a class of SE layers, or a function that makes them: what a library calls `se_layer` or `attn_layer`.

    Raises (the function):
        ValueError: if the layer is not replaced; the message says why.
    """

    @functools.wraps(se_layer, updated=())
    def make(*args: object, **kwargs: object) -> nn.Module:
        layer = se_layer(*args, **kwargs)
        replace(layer).raise_if_none()
        return layer

    return make
