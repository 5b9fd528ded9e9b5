"""Patches for Triton's interpreter, which runs kernels on CPU tensors: it converts as a GPU does, and is faster.

Unpatched, it rounds toward zero when it converts float32 to bfloat16; a GPU, like PyTorch, rounds to nearest. And each
time one function calls another, it replaces all of Triton's language by its own again, which took 2/5 of the time.
"""

import os

import numpy as np
import torch


def enable() -> None:
    """Must be called before anything imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _round_to_nearest(interpreter)
    _numbers_of_one_element(interpreter)
    _patch_once_per_launch(interpreter)


def _round_to_nearest(interpreter) -> None:
    import triton.language as tl

    convert = interpreter._convert_float

    def to_nearest(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(np.array(values)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = to_nearest


def _numbers_of_one_element(interpreter) -> None:
    """Does as Triton 3.7. Triton 3.6 converts an array of one element to int, which numpy refuses from 2.5 on."""
    patch = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_index


def _patch_once_per_launch(interpreter) -> None:
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()  # ids of the module globals that are patched for the present launch

    def patch_once(function):
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
