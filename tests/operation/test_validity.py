"""se_fused/arguments.py and csrc/arguments.h each define a valid call: they agree.

The first is for the public call, with tensors of any strides. The second is for dense tensors, behind the operators and
on the fast path, where nothing else checks a call.
"""

import pytest
import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from se_fused import arguments, native
from se_fused.options import SQUEEZES, Options

NAMES = ("x", "w1", "b1", "w2", "b2", "residual", "scale", "shift")


def strided(t):
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def turned(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t


# What may be done to a tensor with at least one dimension.
CHANGES = {
    "one dimension more": lambda t: t.unsqueeze(-1),
    "three dimensions more": lambda t: t[..., None, None, None],
    "one dimension less": lambda t: t[..., 0],
    "one more in the first dimension": lambda t: torch.cat([t, t[:1]]),
    "one less in the first dimension": lambda t: t[1:],
    "one less in the last dimension": lambda t: t[..., 1:].clone(),
    "empty": lambda t: t[:0],
    "no columns": lambda t: t[:, :0] if t.dim() > 1 else t[:0],
    "every second": strided,
    "turned": turned,
    "channels_last": channels_last,
    "expanded": lambda t: t[:1].expand(t.shape),
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "float64": torch.Tensor.double,
    "float32": torch.Tensor.float,
    "float16": torch.Tensor.half,
    "bfloat16": torch.Tensor.bfloat16,
    "int64": torch.Tensor.long,
    "none": lambda t: None,
    "as the transposed": lambda t: t.transpose(0, 1) if t.dim() > 1 else t,
}


@st.composite
def calls(draw):
    """The tensors NAMES of a valid call, of which up to two are changed; its options; and `out`."""
    case = Case(
        n=draw(st.integers(1, 2)), c=draw(st.integers(1, 4)), r=draw(st.sampled_from([None, 1, 3])),
        spatial=draw(st.sampled_from([(1,), (3,), (2, 2), (1, 3), (2, 1, 2)])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])),
        bias=draw(st.booleans()), residual=draw(st.sampled_from(["none", "x", "map"])),
        affine=draw(st.booleans()),
    )  # fmt: skip
    tensors = [case.tensors().get(name) for name in NAMES]
    for _ in range(draw(st.integers(0, 2))):
        i, change = draw(st.integers(0, 7)), draw(st.sampled_from(sorted(CHANGES)))
        if tensors[i] is not None and tensors[i].dim() > 0 and 0 not in tensors[i].shape:
            tensors[i] = CHANGES[change](tensors[i])
    if draw(st.integers(0, 9)) == 0 and tensors[0] is not None:
        i, flat = draw(st.sampled_from([3, 6, 7])), tensors[0].flatten()
        if tensors[i] is not None and 0 < tensors[i].numel() <= flat.numel():  # the weight lies in x
            tensors[i] = flat[: tensors[i].numel()].view(tensors[i].shape)
    options = Options.of(squeeze=draw(st.sampled_from(SQUEEZES)))
    return tensors, options, draw(outputs(tensors))


@st.composite
def outputs(draw, tensors):
    """None, x, or another tensor to write to, which may be changed or lie in the memory of an input."""
    x = tensors[0]
    kind = draw(st.sampled_from(["none", "x", "new", "changed", "in an input"]))
    if x is None or kind == "none":
        return None
    if kind == "x":
        return x
    t = draw(st.sampled_from(tensors)) if kind == "in an input" else None
    if t is None:
        out = torch.empty_like(x)
        return CHANGES[draw(st.sampled_from(sorted(CHANGES)))](out) if kind == "changed" and x.numel() > 0 else out
    steps = draw(st.sampled_from([x.stride(), torch.empty_like(x).stride()]))
    flat = t.flatten()
    room = flat.numel() - 1 - sum((size - 1) * step for size, step in zip(x.shape, steps, strict=True))
    return flat.as_strided(x.shape, steps, draw(st.integers(0, room))) if x.numel() > 0 and room >= 0 else None


def is_checked(tensors, options, out):
    """Whether se_fused/arguments.py takes the call."""
    try:
        arguments.check(*tensors, SQUEEZES[options.squeeze], False, out)
    except (TypeError, ValueError):
        return False
    return True


def is_dense(tensors, out=None):
    """Whether the tensors of a valid call are as backends read them."""
    x, *weights, residual, scale, shift = tensors
    wide = torch.promote_types(x.dtype, torch.float32)
    if any(t is not None and t.dtype is not wide for t in (scale, shift)):
        return False
    maps, last = [t for t in (x, residual, out) if t is not None], not x.is_contiguous()
    if last:
        maps = [t.movedim(1, -1) for t in maps]
    return x.numel() > 0 and all(t.is_contiguous() for t in (*maps, *weights, scale, shift) if t is not None)


def operator_takes(tensors, options):
    x = tensors[0]
    y = torch.empty_like(x)
    last = x.dim() > 1 and not x.is_contiguous()
    try:
        torch.ops.se_fused.forward_out(*tensors, *options, last, y, None, None, None)
    except RuntimeError:
        return False
    return True


@pytest.mark.usefixtures("native")
@given(calls())
@settings(max_examples=1000)
def test_both_languages_take_the_same_calls(call):
    tensors, options, out = call
    takes = is_checked(*call) and is_dense(tensors, out)
    *plain, scale, shift = tensors
    y = native.load_extension().forward(*plain, out, *options, scale, shift, None, None)
    assert (y is not None) == takes
    if tensors[0] is not None and tensors[3] is not None and out is None:
        assert operator_takes(tensors, options) == takes


@pytest.mark.parametrize("change", ["none", "every second", "turned", "float64", "one less in the first dimension"])
def test_the_changes_make_a_call_invalid_or_not_dense(change):
    tensors = [Case().tensors().get(name) for name in NAMES]
    assert is_checked(tensors, Options.of(), None)
    tensors[3] = CHANGES[change](tensors[3])
    assert not (is_checked(tensors, Options.of(), None) and is_dense(tensors))
