"""The contract: what the operation takes, what it returns, how it is differentiated.

    squeeze_excite (public)  -> plain inference on the CPU: the fast path (se_fused/backends/cpu.py); else checks, then
                                the reference or one of
      torch.ops.se_fused.squeeze_excite            inference: y
      torch.ops.se_fused.squeeze_excite_           inference in place: y is written over x
      torch.ops.se_fused.squeeze_excite_out        inference into `out`
      torch.ops.se_fused.squeeze_excite_train      y, and for backward z, p1 = W1 z + b1, p2 = W2 h + b2
      torch.ops.se_fused.squeeze_excite_backward   the gradients
        torch.ops.se_fused.forward_out, backward_out: kernels; they fill memory that was allocated here
      torch.ops.se_fused.batch_norm_out, scale_shift_out: kernels for `replace(model, level="block")` on GPUs

Only compiled backends (backends/backend.py) have the operators that fill memory, and no other operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import _C, Tensor
from torch.autograd import profiler

from . import backends, implementation, reference
from .arguments import autocast, check, needs_autocast, needs_grad
from .backends import forcing
from .observers import decomposes, recorded, under_transform, unobserved
from .options import SQUEEZES, Codes, HardSigmoid, OptionNames, Options, encode, refuse

if TYPE_CHECKING:
    from typing_extensions import Unpack

_INPUTS = "Tensor x, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual"
_FORWARD = f"{_INPUTS}, Tensor? scale, Tensor? shift"  # in inference; in training they are applied before the call
_OPTIONS = ", ".join(f"{'float' if name in ('slope', 'offset') else 'int'} {name}" for name in Options._fields)
_SAVED = "Tensor z, Tensor p1, Tensor p2"
_NORM = "Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, float eps"
_CPU = backends.CPU

_LIBRARY = torch.library.Library("se_fused", "DEF")
for _schema in (
    f"squeeze_excite({_FORWARD}, {_OPTIONS}) -> Tensor",
    f"squeeze_excite_({_FORWARD.replace('Tensor x', 'Tensor(a!) x')}, {_OPTIONS}) -> ()",
    f"squeeze_excite_out({_FORWARD}, {_OPTIONS}, Tensor(a!) out) -> ()",
    f"squeeze_excite_train({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    # needs: which of dx, dw1, db1, dw2, db2, dresidual are wanted; each of the others is returned with no elements.
    # residual_is_x: dresidual is added to dx.
    f"squeeze_excite_backward(Tensor g, {_INPUTS}, {_SAVED}, {_OPTIONS}, bool[6] needs, bool residual_is_x)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"forward_out({_FORWARD}, {_OPTIONS}, bool channels_last,"
    " Tensor(a!) y, Tensor(b!)? z, Tensor(c!)? p1, Tensor(d!)? p2) -> ()",
    f"backward_out(Tensor g, {_INPUTS}, {_SAVED}, {_OPTIONS}, bool channels_last, bool residual_is_x,"
    " Tensor(a!)? dx, Tensor(b!)? dw1, Tensor(c!)? db1, Tensor(d!)? dw2, Tensor(e!)? db2, Tensor(f!)? dresidual) -> ()",
    # y = act(norm(x) + residual), where norm is an eval-mode BatchNorm; and its scale and shift (csrc/se.h).
    f"batch_norm_out(Tensor x, Tensor? residual, {_NORM}, int act, bool channels_last, Tensor(a!) y) -> ()",
    f"scale_shift_out({_NORM}, Tensor(a!) scale, Tensor(b!) shift) -> ()",
):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)


def _with_backend(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pass `function` the backend for the device of its first tensor, chosen when the operator runs."""
    return lambda *args: function(backends.select(args[0].device), *args)


_LIBRARY.impl("squeeze_excite", _with_backend(implementation.forward), "CompositeExplicitAutograd")
_LIBRARY.impl("squeeze_excite_", _with_backend(implementation.forward_inplace), "CompositeExplicitAutograd")
_LIBRARY.impl("squeeze_excite_out", _with_backend(implementation.forward_out), "CompositeExplicitAutograd")
_LIBRARY.impl("squeeze_excite_train", _with_backend(implementation.forward_train), "CompositeExplicitAutograd")
_LIBRARY.impl("squeeze_excite_backward", _with_backend(implementation.backward), "CompositeExplicitAutograd")


@torch.library.register_fake("se_fused::squeeze_excite", lib=_LIBRARY)
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


for _name in ("squeeze_excite_", "squeeze_excite_out"):

    @torch.library.register_fake(f"se_fused::{_name}", lib=_LIBRARY)
    def _(x: Tensor, *_: Any) -> None:
        return None


@torch.library.register_fake("se_fused::squeeze_excite_train", lib=_LIBRARY)
def _(x: Tensor, w1: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *implementation.empty_saved(x, w1)


@torch.library.register_fake("se_fused::squeeze_excite_backward", lib=_LIBRARY)
def _(g: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(implementation.empty_grads(args[:6], args[-2]))


# Autograd. Besides the inputs, only z, p1 and p2 are saved; backward recomputes u, u * s and y from x.


def _save(ctx: Any, arguments: tuple[Any, ...], saved: tuple[Tensor, ...]) -> None:
    ctx.count = len(arguments) - len(Options._fields)  # of the tensors: scale and shift are there only in inference
    inputs, ctx.options = arguments[: ctx.count], Options(*arguments[ctx.count :])
    ctx.residual_is_x = inputs[5] is inputs[0]
    ctx.forced = forcing.current()
    ctx.save_for_backward(*inputs, *saved)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.options)
    if g is None:
        return (*(None,) * ctx.count, *nothing)
    with forcing.resume(ctx.forced):
        return _gradients(ctx, g) + nothing


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dw1, db1, dw2, db2, dresidual, in inference dscale and dshift; None for an input that needs none."""
    tensors = ctx.saved_tensors  # read once, as checkpointing demands
    inputs, saved, needs = tensors[: ctx.count], tensors[ctx.count :], list(ctx.needs_input_grad[: ctx.count])
    has_scale = any(t is not None for t in inputs[6:])
    if torch.is_grad_enabled() or _is_batched(g) or has_scale:
        return _reference_gradients(g, inputs, needs, ctx.options)
    inputs = inputs[:6]
    add_to_dx = ctx.residual_is_x and needs[0]  # dresidual is added to dx
    g_is_dresidual = ctx.options.post_act == 0 and not add_to_dx
    computed = [*needs[:5], needs[5] and not (add_to_dx or g_is_dresidual)]
    if not saved:  # in the training of a program that was exported without gradients
        _, *saved = torch.ops.se_fused.squeeze_excite_train.default(*inputs, *ctx.options)
    args = (g, *inputs, *saved, *ctx.options, computed, add_to_dx)
    if unobserved(g, *inputs):
        found = implementation.backward(backends.select(g.device), *args)
    else:
        found = torch.ops.se_fused.squeeze_excite_backward.default(*args)
    grads: list[Tensor | None] = [grad if wanted else None for grad, wanted in zip(found, computed, strict=True)]
    if needs[5] and g_is_dresidual:
        grads[5] = g
    return (*grads, *(None,) * (ctx.count - 6))


def _is_batched(g: Tensor) -> bool:
    """Whether `g` is a batch of gradients, from `torch.autograd.grad(is_grads_batched=True)` by either form of vmap."""
    return _C._functorch.is_batchedtensor(g) or _C._functorch.is_legacy_batchedtensor(g)


def _reference_gradients(
    g: Tensor, inputs: tuple[Tensor | None, ...], needs: list[bool], options: Options
) -> tuple[Tensor | None, ...]:
    """Compute the gradients with PyTorch's operators, which `create_graph=True` can differentiate to any order."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One input may be computed from another (w2 = w1.t(), residual = x). autograd.grad would then count the
        # gradient that flows through it twice, so each input gets its own alias.
        aliases = [t if t is None else t.view_as(t) for t in inputs]
        y = reference.compute(*aliases, options=options)  # type: ignore[arg-type]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, wanted, g, create_graph=create_graph))
    return tuple(next(found) if need else None for need in needs)


def _setup_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _setup_inference(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, ())


for _name, _setup in (("squeeze_excite_train", _setup_train), ("squeeze_excite", _setup_inference)):
    torch.library.register_autograd(f"se_fused::{_name}", _backward, setup_context=_setup, lib=_LIBRARY)


def _without_gradients(name: str) -> Callable[..., None]:
    """The autograd kernel of an operator that writes into an argument."""

    def run(*args: Any) -> None:
        if needs_grad(*(t for t in args if isinstance(t, Tensor))):
            raise RuntimeError(f"se_fused: {name} writes into an argument, so it has no gradient; call squeeze_excite")
        with _C._AutoDispatchBelowAutograd():
            getattr(torch.ops.se_fused, name).default(*args)

    return run


for _name in ("squeeze_excite_", "squeeze_excite_out"):
    _LIBRARY.impl(_name, _without_gradients(_name), "Autograd")


class _Train(torch.autograd.Function):
    """squeeze_excite_train and its gradient without the dispatcher, which takes longer than the work on a small map."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, backend = args
        y, *saved = implementation.forward_train(backend, *inputs)
        _save(ctx, tuple(inputs), tuple(saved))
        return y

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, *g), None)


def _check(*arguments: Any) -> None:
    """`check`, hidden from torch.jit.trace."""
    state = _C._get_tracing_state()
    if state is None:
        return check(*arguments)
    set_state = _C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        check(*arguments)
    finally:
        set_state(state)


def squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    act: str = "relu",
    gate: str | HardSigmoid = "sigmoid",
    squeeze: str = "mean",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_act: str | None = None,
    residual: Tensor | None = None,
    post_act: str | None = None,
    inplace: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Squeeze-and-Excitation as one operation: `post_act(u * s + residual)` with `u = pre_act(scale * x + shift)` and
    the gate `s = gate(w2 @ act(w1 @ squeeze(u) + b1) + b2)`.

    Source: Hu et al., "Squeeze-and-Excitation Networks", equations 2 to 4. The interior is computed in float32 (float64
    for float64 `x`), and sums are taken in a fixed order. Derivatives are right in every order and mode.

    Args:
        x: [N, C, *spatial] with 1 to 3 spatial dimensions, any strides; float32, float64, float16 or bfloat16.
        w1: [R, C], or [R, C, 1, ...] of a 1x1 convolution; None for the one-FC form (eSE), where `act` is not used.
        b1: [R] or None.
        w2: [C, R] or [C, R, 1, ...]; [C, C] in the one-FC form.
        b2: [C] or None. The weights share one dtype: that of `x`, or float32 beside a half-precision `x`.
        act: "identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "leaky_relu" (slope 0.01), "mish",
            "sigmoid" or "tanh".
        gate: "sigmoid", "hard_sigmoid", "tanh", "relu", "identity" or a `HardSigmoid(slope, offset)`.
        squeeze: "mean", "max", or "mean_max" for half their sum, over all spatial positions.
        scale, shift: [C], both or neither: an eval-mode BatchNorm of `x` as one product and one sum,
            `scale = weight / sqrt(variance + eps)` and `shift = bias - mean * scale`. Each is of the dtype of `x`, or
            float32 beside a half-precision `x`.
        pre_act: an activation of `scale * x + shift`, or of `x`, with the names of `act`, or None.
        residual: of the shape, dtype and device of `x`, added before `post_act`, or None. `residual=x`
            gives x * (1 + s).
        post_act: an activation of the sum, with the names of `act`, or None.
        inplace: write the result over `x` and return `x`. Allowed only while autograd does not record the call.
        out: write the result into this tensor, and return it: of the shape, dtype and device of `x`, any strides; those
            of `x` are fastest. It is `x`, which is the same as `inplace=True`, or has no memory in common with any
            input (a compiler cannot check this). Allowed only while autograd does not record the call.

    Returns:
        y, with the shape, dtype and memory format of `x`.

    Raises:
        TypeError, ValueError: for an argument of a wrong kind, shape, dtype, device or name, before any computation.
        BackendUnavailable: if a backend is forced that cannot run the call.
    """
    codes = encode("squeeze_excite", act, gate, squeeze, pre_act, post_act)
    return call(x, w1, b1, w2, b2, residual, codes, inplace, scale, shift, out)


def call(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None,
    codes: Codes, inplace: bool = False, scale: Tensor | None = None, shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`squeeze_excite` with encoded options: `Options`, which a layer makes once, or a plain tuple."""
    fast_path = _CPU.fast_path if _C._len_torch_function_stack() == 0 else _CPU.fast_path_under_mode
    y = fast_path(x, w1, b1, w2, b2, residual, scale, shift, inplace, out, *codes)
    if y is not None:
        return y
    options = Options(*codes)
    tensors: Any = (x, w1, b1, w2, b2, residual, scale, shift)
    if needs_autocast(x, w2, residual, scale, shift):
        tensors = autocast(*tensors)
        if inplace and tensors[0] is not x:
            refuse(ValueError, "inplace", "True", f"False, because autocast makes the result {tensors[0].dtype}")
        x = tensors[0]
    _check(*tensors, SQUEEZES[options.squeeze], inplace, out)
    target = x if inplace else out
    if recorded() and decomposes(x.device, forcing.current().name != "auto"):
        return reference.compute(*tensors, options=options, out=target)
    backend = backends.select(x.device)
    # An empty map needs no speed, and the reference defines its mean and maximum.
    if backend is backends.REFERENCE or under_transform() or x.numel() == 0:
        return reference.compute(*tensors, options=options, out=target)
    bypass = unobserved(*tensors, target)  # the dispatcher
    if needs_grad(*tensors):
        *tensors, scale, shift = tensors
        if scale is not None:
            tensors[0] = reference.affine(x, scale, shift).to(x.dtype)  # rounded once, as by PyTorch's batch norm
        if bypass:
            return _Train.apply(*tensors, *options, backend)  # type: ignore[no-any-return, no-untyped-call]
        return torch.ops.se_fused.squeeze_excite_train.default(*tensors, *options)[0]  # type: ignore[no-any-return]
    # A profiler or a torch function mode must see the operator.
    bypass = bypass and not (profiler._is_profiler_enabled or _C._len_torch_function_stack() > 0)
    if target is None:
        if bypass:
            return implementation.forward(backend, *tensors, *options)
        return torch.ops.se_fused.squeeze_excite.default(*tensors, *options)  # type: ignore[no-any-return]
    if target is x:
        if bypass:
            implementation.forward_inplace(backend, *tensors, *options)
        else:
            torch.ops.se_fused.squeeze_excite_.default(*tensors, *options)
    elif bypass:
        implementation.forward_out(backend, *tensors, *options, target)
    else:
        torch.ops.se_fused.squeeze_excite_out.default(*tensors, *options, target)
    torch.autograd.graph.increment_version(target)
    return target


def explain(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    *, scale: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None, inplace: bool = False,
    out: Tensor | None = None, **options: Unpack[OptionNames],
) -> backends.Explanation:  # fmt: skip
    """Which backend would run `squeeze_excite` with these arguments, and why each of the others would not.

    Empty maps, forward-mode AD, torch.func transforms and double backward run on the reference whatever this says.

    Raises:
        TypeError, ValueError, BackendUnavailable: as the call itself would.
    """
    chosen = Options.of(**options)
    check(x, w1, b1, w2, b2, residual, scale, shift, SQUEEZES[chosen.squeeze], inplace, out)

    def plan(backend: backends.Backend) -> str | None:
        r = 0 if w1 is None else w1.shape[0]
        return backend.plan(x, r, chosen, residual is not None and residual is not x, scale is not None)

    return backends.explain(x.device, plan if x.numel() > 0 else None)
