"""Inference engines of other projects, on modules exported to ONNX."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def export(module: nn.Module, x: Tensor) -> bytes:
    """The ONNX model y = module(x), for the shape of `x`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            module.eval(), (x,), input_names=["x"], output_names=["y"], dynamo=True, verbose=False
        )
    assert program is not None
    model: bytes = program.model_proto.SerializeToString()
    return model


def onnxruntime(model: bytes, x: Tensor, y: Tensor, threads: int) -> Callable[[], Any]:
    """A call that reads x and fills y."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for bind, name, t in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
        bind(name, "cpu", 0, t.numpy().dtype, list(t.shape), t.data_ptr())
    return functools.partial(session.run_with_iobinding, binding)


def openvino(model: bytes, x: Tensor, y: Tensor, threads: int) -> Callable[[], Any]:
    """A call that reads x and fills y."""
    import openvino

    core = openvino.Core()
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        # Threads that are not pinned are mostly faster: 0.51 to 1.05 of the time of a layer, in the geometric mean
        # 0.80, over two runs at four shapes. Both runs were on a busy machine, which may favour them.
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(core.read_model(model), "CPU", config).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(y.numpy(), shared_memory=True))
    # Without share_outputs the Python binding would copy y once more.
    return functools.partial(request.infer, share_inputs=True, share_outputs=True)


ENGINES = {"onnxruntime": onnxruntime, "openvino": openvino}
