"""Checks the tensors of the public call; options.py checks its options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import memory
from .options import refuse

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_HALF = (torch.float16, torch.bfloat16)
_TENSORS = ("x", "w1", "b1", "w2", "b2", "residual", "scale", "shift")


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r}" if value is None or isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    layout = "" if value.layout == torch.strided else f"{value.layout} "
    return f"a {layout}tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"


def _check_map(name: str, t: Any) -> None:
    wanted = "a dense floating-point tensor [N, C, *spatial] with 1 to 3 spatial dimensions"
    if not isinstance(t, Tensor) or t.layout is not torch.strided or t.dtype not in _DTYPES:
        refuse(TypeError, name, _describe(t), f"{wanted}, of {', '.join(map(str, _DTYPES))}")
    if not 3 <= t.dim() <= 5 or t.shape[1] == 0:
        refuse(ValueError, name, _describe(t), f"{wanted}, and C >= 1")


def _check_parameter(name: str, t: Any, shape: tuple[int, ...], like: Tensor, *, kernel: bool = False) -> None:
    """Check a weight or bias. `like`: w2, whose dtype and device it must have. `kernel`: trailing sizes of 1, as in the
    weight of a 1x1 convolution, are allowed."""
    if not isinstance(t, Tensor):
        refuse(TypeError, name, _describe(t), f"a tensor of shape {list(shape)}")
    got = t.shape
    if got != shape and not (kernel and len(got) <= 5 and got == shape + (1,) * (len(got) - 2)):
        refuse(
            ValueError,
            name,
            _describe(t),
            f"shape {list(shape)}" + (", or that of a 1x1 convolution" if kernel else ""),
        )
    if t is like:
        return
    if not (t.is_cpu and like.is_cpu) and t.device != like.device:
        refuse(ValueError, name, f"on {t.device}", f"{like.device}, the device of w2")
    if t.dtype is not like.dtype or t.layout is not torch.strided:
        refuse(TypeError, name, _describe(t), f"a dense tensor of {like.dtype}, the dtype of w2")


def _check_beside_map(name: str, t: Tensor, x: Tensor) -> None:
    """Check that `t` is on the device of `x` and of its dtype, or float32 beside half precision."""
    if t.layout is not torch.strided or (
        t.dtype is not x.dtype and not (t.dtype is torch.float32 and x.dtype in _HALF)
    ):
        also = " or torch.float32" if x.dtype in _HALF else ""
        refuse(TypeError, name, _describe(t), f"a dense tensor of {x.dtype}, the dtype of x{also}")
    if not (t.is_cpu and x.is_cpu) and t.device != x.device:
        refuse(ValueError, name, f"on {t.device}", f"{x.device}, the device of x")


def _check_kinds(
    x: Any, w1: Any, b1: Any, w2: Any, b2: Any, residual: Any, scale: Any, shift: Any, squeeze: str
) -> None:
    _check_map("x", x)
    c = x.shape[1]
    if squeeze != "mean" and 0 in x.shape[2:]:
        refuse(ValueError, "x", _describe(x), f"at least one position, because squeeze is {squeeze!r}")
    if not isinstance(w2, Tensor) or w2.is_nested:  # first, because the others are compared with it
        refuse(TypeError, "w2", _describe(w2), "a tensor of shape [C, R]")
    _check_beside_map("w2", w2, x)
    r = c
    if w1 is not None:
        if not isinstance(w1, Tensor):
            refuse(TypeError, "w1", _describe(w1), f"a tensor of shape [R, {c}], or None for the one-FC form")
        r = w1.shape[0] if w1.dim() else 0
        if r == 0:
            refuse(ValueError, "w1", _describe(w1), f"shape [R, {c}] with R >= 1")
        _check_parameter("w1", w1, (r, c), w2, kernel=True)
        if b1 is not None:
            _check_parameter("b1", b1, (r,), w2)
    elif b1 is not None:
        refuse(ValueError, "b1", _describe(b1), "None, because w1 is None (the one-FC form)")
    _check_parameter("w2", w2, (c, r), w2, kernel=True)
    if b2 is not None:
        _check_parameter("b2", b2, (c,), w2)
    if residual is not None and residual is not x:
        _check_map("residual", residual)
        if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
            refuse(ValueError, "residual", _describe(residual), f"the shape, dtype and device of x: {_describe(x)}")
    for name, t, other in (("scale", scale, shift), ("shift", shift, scale)):
        if t is not None or other is not None:
            _check_parameter(name, t, (c,), t)
            _check_beside_map(name, t, x)


def check(
    x: Any, w1: Any, b1: Any, w2: Any, b2: Any, residual: Any, scale: Any, shift: Any, squeeze: str,
    inplace: Any = False, out: Any = None,
) -> None:  # fmt: skip
    """Check the tensors, `inplace` and `out` of a call of `se_fused.squeeze_excite`.

    Raises:
        TypeError, ValueError: for the first argument that the call does not take, naming it.
    """
    if not isinstance(inplace, bool):
        refuse(TypeError, "inplace", _describe(inplace), "True or False")
    tensors = (x, w1, b1, w2, b2, residual, scale, shift)
    try:
        _check_kinds(*tensors, squeeze)
    except RuntimeError:  # from a nested tensor, which has no shape; too rare for a check of each tensor beforehand
        for name, t in zip(_TENSORS, tensors, strict=True):
            if isinstance(t, Tensor) and t.is_nested:
                refuse(TypeError, name, _describe(t), "a dense tensor")
        raise
    has_addresses = memory.has_addresses()
    if has_addresses:
        for i, t in enumerate(tensors):
            if t is not None and type(t) in memory.PLAIN_TYPES and memory.is_freed(t):
                got = f"{_describe(t)}, whose storage was freed"
                refuse(ValueError, _TENSORS[i], got, "a tensor that has its memory")
    if inplace:
        if out is not None:
            refuse(TypeError, "out", _describe(out), "None, because inplace is True")
        if needs_grad(*tensors):
            refuse(ValueError, "inplace", "True", "False, because an input requires grad: backward needs x as it was")
        _check_written("x", x, tensors, has_addresses)
    elif out is not None:
        _check_out(out, tensors, has_addresses)


def _check_out(out: Any, tensors: tuple[Tensor | None, ...], has_addresses: bool) -> None:
    x = tensors[0]
    assert x is not None
    wanted = f"the shape, dtype and device of x: {_describe(x)}"
    if not isinstance(out, Tensor) or out.is_nested or out.layout is not torch.strided or out.dtype != x.dtype:
        refuse(TypeError, "out", _describe(out), wanted)
    if out.shape != x.shape or out.device != x.device:
        refuse(ValueError, "out", _describe(out), wanted)
    if needs_grad(*tensors, out):
        refuse(ValueError, "out", _describe(out), "None, because an input or out requires grad")
    if has_addresses and type(out) in memory.PLAIN_TYPES and memory.is_freed(out):
        refuse(ValueError, "out", f"{_describe(out)}, whose storage was freed", "a tensor that has its memory")
    _check_written("out", out, tensors, has_addresses)


def _check_written(written: str, y: Tensor, tensors: tuple[Tensor | None, ...], has_addresses: bool) -> None:
    """Refuse what PyTorch's `out=` refuses: writing y must not change a value that is read afterwards.

    written: the argument that is y. It may be x, and then also the residual, because both are read element by element
    before y is written there.
    """
    if has_addresses and is_locked_inference_tensor(y):
        refuse(ValueError, written, "an inference tensor outside inference mode", "a tensor that may be written to")
    if any(stride == 0 and size > 1 for stride, size in zip(y.stride(), y.shape, strict=True)) or (
        has_addresses and memory.overlaps_itself(y)
    ):
        refuse(ValueError, written, "a tensor that overlaps itself", "memory of its own for each element, to write to")
    if not has_addresses:
        return
    x = tensors[0]
    assert x is not None
    is_x = memory.same_elements(x, y)
    for name, t in zip(_TENSORS, tensors, strict=True):
        may_be_y = name == "x" or (name == "residual" and is_x)
        if t is not None and not (may_be_y and memory.same_elements(t, y)) and memory.overlap(t, y):
            wanted = f"memory apart from {written}, which is written" + (f", or {written} itself" if may_be_y else "")
            refuse(ValueError, name, f"in the memory of {written}", wanted)


def is_locked_inference_tensor(x: Tensor) -> bool:
    """Whether `x` was made in inference mode and inference mode is off: PyTorch then forbids writing to it."""
    return x.is_inference() and not torch.is_inference_mode_enabled()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call with these inputs."""
    if not torch.is_grad_enabled():
        return False
    for t in tensors:  # noqa: SIM110 (a generator costs a microsecond here)
        if t is not None and t.requires_grad:
            return True
    return False


def needs_autocast(x: Any, w2: Any, *others: Any) -> bool:
    """Whether these have different dtypes and autocast is on, so that `autocast` must convert them."""
    try:
        for t in (w2, *others):
            if t is not None and t.dtype is not x.dtype:
                break
        else:
            return False
    except AttributeError:
        return False  # not a tensor
    if not isinstance(x, Tensor):
        return False
    device = x.device.type  # "meta" has no autocast, and is_autocast_enabled raises for it
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Convert `x`, w1, b1, w2, b2, residual, scale and shift, of dtypes that eager PyTorch mixes under autocast, to
    dtypes that `check` takes.

    As in eager, y has the wider dtype of x and residual; the interior is float32 whatever the autocast dtype.
    """
    if not all(t is None or (isinstance(t, Tensor) and t.is_floating_point()) for t in (x, *others)):
        return [x, *others]
    *weights, residual, _, _ = others
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    weight_dtype = dtype
    if dtype in _HALF and any(w is not None and w.dtype != dtype for w in weights):
        weight_dtype = torch.float32
    dtypes = [*[weight_dtype] * 4, dtype, *[torch.promote_types(dtype, torch.float32)] * 2]
    return [x.to(dtype), *(t if t is None else t.to(to) for t, to in zip(others, dtypes, strict=True))]
