"""The options of the operation: their names, functions, numbers in the kernels, and checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor


class HardSigmoid(NamedTuple):
    """The gate ``clamp(slope * v + offset, 0, 1)``.

    PyTorch uses (1/6, 1/2), Paddle (0.2, 0.5) and early mmcv (1/2, 1/2).
    """

    slope: float = 1 / 6
    offset: float = 1 / 2

    def __call__(self, v: Tensor) -> Tensor:
        return torch.clamp(self.slope * v + self.offset, 0, 1)


def _hardswish(v: Tensor) -> Tensor:
    # On CUDA, F.hardswish of float64 multiplies by a float32 1/6, an error of 3e-8. The gradients are the same.
    return v * F.relu6(v + 3) / 6 if v.dtype is torch.float64 else F.hardswish(v)


def _gelu_tanh(v: Tensor) -> Tensor:
    return F.gelu(v, approximate="tanh")


# The order is that of enum Activation in csrc/se.h. CONTRIBUTING.md lists the files that a new one concerns.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": _hardswish,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# "hard_sigmoid" names HardSigmoid() with PyTorch's slope and offset.
GATES = ("sigmoid", "hard_sigmoid", "tanh", "relu", "identity")
# The order is that of enum Squeeze in csrc/se.h.
SQUEEZES = ("mean", "max", "mean_max")

_NAMES = tuple(ACTIVATIONS)
FUNCTIONS = tuple(ACTIVATIONS.values())  # indexed by enum Activation
_ACT_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}
_MAP_ACT_CODE: dict[str | None, int] = dict(_ACT_CODE) | {None: 0}  # pre_act, post_act
_GATE_CODE = {name: _ACT_CODE[name] for name in GATES if name in _ACT_CODE}
_HARD_SIGMOID_CODE = len(ACTIVATIONS)
_SQUEEZE_CODE = {name: code for code, name in enumerate(SQUEEZES)}


def refuse(error: type[Exception], argument: str, got: str, wanted: str, caller: str = "squeeze_excite") -> NoReturn:
    raise error(f"{caller}: {argument} is {got}; wanted {wanted}")


class OptionNames(TypedDict, total=False):
    """The options as keyword arguments of `se_fused.squeeze_excite`."""

    act: str
    gate: str | HardSigmoid
    squeeze: str
    pre_act: str | None
    post_act: str | None


class Options(NamedTuple):
    """The options of a call as the operators take them, in the order of their schemas.

    act, gate, pre_act, post_act: enum Activation of csrc/se.h. squeeze: enum Squeeze. slope, offset: of a hard-sigmoid
    gate, else 0.
    """

    act: int
    gate: int
    slope: float
    offset: float
    squeeze: int
    pre_act: int
    post_act: int

    @classmethod
    def of(
        cls,
        act: str = "relu",
        gate: str | HardSigmoid = "sigmoid",
        squeeze: str = "mean",
        pre_act: str | None = None,
        post_act: str | None = None,
    ) -> Options:
        """Encode options given by name.

        Raises:
            ValueError: for a name that does not exist.
        """
        return cls(*encode("squeeze_excite", act, gate, squeeze, pre_act, post_act))

    def names(self) -> dict[str, Any]:
        """The options by name: keyword arguments of `Options.of` and of the public call."""
        hard = self.hard_sigmoid()
        return {
            "act": _NAMES[self.act],
            "gate": _NAMES[self.gate] if hard is None else "hard_sigmoid" if hard == HardSigmoid() else hard,
            "squeeze": SQUEEZES[self.squeeze],
            "pre_act": _NAMES[self.pre_act] if self.pre_act else None,
            "post_act": _NAMES[self.post_act] if self.post_act else None,
        }

    def apply_gate(self, v: Tensor) -> Tensor:
        hard = self.hard_sigmoid()
        return FUNCTIONS[self.gate](v) if hard is None else hard(v)

    def hard_sigmoid(self) -> HardSigmoid | None:
        return HardSigmoid(self.slope, self.offset) if self.gate == _HARD_SIGMOID_CODE else None


Codes = tuple[int, int, float, float, int, int, int]


def encode(caller: str, act: Any, gate: Any, squeeze: Any, pre_act: Any, post_act: Any) -> Codes:
    """`Options.of` as a plain tuple, which takes 0.3 us less to make: a tenth of a call on a small map.

    Raises:
        ValueError: for a name that does not exist; the message begins with `caller`.
    """
    slope = offset = 0.0
    try:
        if isinstance(gate, HardSigmoid) or gate == "hard_sigmoid":
            slope, offset = map(float, HardSigmoid() if isinstance(gate, str) else gate)
            gate_code = _HARD_SIGMOID_CODE
        else:
            gate_code = _GATE_CODE[gate]
        return (
            _ACT_CODE[act], gate_code, slope, offset, _SQUEEZE_CODE[squeeze], _MAP_ACT_CODE[pre_act],
            _MAP_ACT_CODE[post_act],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        _refuse_invalid(caller, act, gate, squeeze, pre_act, post_act)


def _refuse_invalid(caller: str, act: Any, gate: Any, squeeze: Any, pre_act: Any, post_act: Any) -> NoReturn:
    options: tuple[tuple[str, Any, Any, str], ...] = (
        ("act", act, _ACT_CODE, ""),
        ("squeeze", squeeze, _SQUEEZE_CODE, ""),
        ("pre_act", pre_act, _ACT_CODE, "None, or "),
        ("post_act", post_act, _ACT_CODE, "None, or "),
    )
    for name, value, known, also in options:
        if not (isinstance(value, str) and value in known) and not (also and value is None):
            refuse(ValueError, name, repr(value), f"{also}one of {', '.join(known)}", caller)
    refuse(ValueError, "gate", repr(gate), f"one of {', '.join(GATES)}, or a HardSigmoid of two numbers", caller)
