"""Classes of replaced modules: subclasses, made at run time, of the classes that the modules had."""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .inside import SWAP
from .observers import recorded
from .swap import Swap


class Replaced(nn.Module):
    """The first base of a replaced module's class. The second is the original class, whose `forward` runs the calls
    that were not checked."""

    # None: the module computes as the original does, for example if it was made by `type(module)(...)`.
    _se_fused_swap: Swap | None = None

    def _fused_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, or None if the check does not cover it."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("TorchScript cannot compile a fused SE layer: call se_fused.restore on the model first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle and deepcopy cannot find the class by name, because it is made at run time.
        original, swap = original_class(self), self._se_fused_swap
        state = {name: value for name, value in vars(self).items() if name != SWAP}
        if swap is None or swap.change(self) is not None:
            return copyreg.__newobj__, (original,), state  # type: ignore[attr-defined]
        return _blank, (type(self).__bases__[0], original, type(swap), swap.facts), state

    def __setstate__(self, state: Any) -> None:
        swap, facts = self.__dict__.pop(SWAP)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        with contextlib.suppress(AttributeError):  # from a child that refers to this module, and is not complete yet
            swap.attach(self, original_class(self), *facts)


_classes: dict[tuple[type[Any], type[Any]], type[Replaced]] = {}


def _forward_of(original: type[Any]) -> Callable[..., Any]:
    # functools.wraps keeps the signature of the original, which torch.fx, transformers and others read.
    @functools.wraps(original.forward)
    def forward(self: Replaced, *args: Any, **kwargs: Any) -> Any:
        # Compilers and tracers see the module as it was written: Inductor fuses it with the operators around it, and
        # TorchScript and ONNX know its operators.
        if self._se_fused_swap is not None and not recorded():
            y = self._fused_forward(args, kwargs)
            if y is not None:
                return y
        return original.forward(self, *args, **kwargs)

    return forward


def replaced_class(base: type[Replaced], original: type[Any]) -> type[Replaced]:
    """The subclass of `base` and `original`."""
    if (base, original) not in _classes:
        members = {"__module__": original.__module__, "forward": _forward_of(original)}
        _classes[base, original] = type(f"Fused{original.__name__}", (base, original), members)
    return _classes[base, original]


def original_class(module: nn.Module) -> type[Any]:
    """The class that a replaced module had.

    Raises:
        RuntimeError: if its class was changed again afterwards, as `fully_shard` does.
    """
    base, original = type(module).__bases__[0], type(module).__bases__[-1]
    if type(module) is not _classes.get((base, original)):
        raise RuntimeError(
            f"the class of a replaced layer was changed afterwards, to {type(module).__name__}: undo that first"
        )
    return original


def change_classes(base: type[Replaced], swap: type[Swap], modules: dict[Any, tuple[Any, ...]]) -> dict[nn.Module, str]:
    """Give each of `modules` a class below `base`, and a `swap` of the facts that it is mapped to. Returns the modules
    for which that fails, with the reason."""
    failed: dict[nn.Module, str] = {}
    changed: list[tuple[nn.Module, type[Any]]] = []
    for module in modules:
        original = type(module)
        try:
            module.__class__ = replaced_class(base, original)
        except Exception as error:  # for example from the class's own __init_subclass__
            failed[module] = f"its class cannot be changed: {error}"
        else:
            changed.append((module, original))
    for module, original in changed:  # after the loop above, because a Swap records the classes of the modules inside
        swap.attach(module, original, *modules[module])
    return failed


def _blank(base: type[Replaced], original: type[Any], swap: type[Swap], facts: tuple[Any, ...]) -> Replaced:
    """An empty module, to be filled by its __setstate__."""
    cls = replaced_class(base, original)
    module = cls.__new__(cls)
    module.__dict__[SWAP] = swap, facts
    return module
