"""Compiles every Triton kernel that a list of calls would launch, for one GPU, on a machine without that GPU.

    python tests/triton_targets.py sm_90

prints one line of JSON per kernel: its name, the call, registers, spills, and the number of 16-byte loads and stores.
The arguments of each launch are recorded and compiled, so these are the kernels that would run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from se_fused.options import Options
from se_fused.triton import backward, batch_norm, forward, launch, weights

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64"}
PLAIN = {"act": "relu", "gate": "sigmoid", "squeeze": "mean", "pre_act": None, "post_act": None}
RICH = {"act": "silu", "gate": "hard_sigmoid", "squeeze": "mean_max", "pre_act": "silu", "post_act": "gelu"}
# n, c, r, spatial, dtype, channels_last, options, with_residual
CALLS = [
    (32, 256, 16, (56, 56), torch.float16, False, PLAIN, True),
    (32, 256, 16, (56, 56), torch.bfloat16, True, RICH, True),
    (32, 512, 32, (8, 8), torch.float16, False, PLAIN, False),
    (32, 512, 32, (8, 8), torch.float32, True, RICH, True),
    (64, 1152, 48, (7, 7), torch.float16, False, PLAIN, False),
    (256, 3024, 308, (7, 7), torch.float16, True, PLAIN, False),
    (2, 96, None, (28, 28), torch.float32, False, RICH, True),
    (4, 64, 16, (16, 16), torch.float64, False, RICH, True),
]
# All calls are compiled for one GPU of each maker, and half of them for the others, because a call takes seconds. Each
# half has every kernel.
HALVES = {"sm_75": CALLS[1::2], "sm_80": CALLS[::2], "sm_100": CALLS[1::2], "gfx90a": CALLS[::2]}


class Recorder:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@contextmanager
def recording(launches, *modules):
    """Adds the launches of the modules' kernels to `launches` instead of running them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recorder(getattr(module, name), launches))
        yield


def record(n, c, r, spatial, dtype, channels_last, options, with_residual, affine):
    """Returns the launches of one forward and one backward pass that computes every gradient. affine: with scale and
    shift."""
    launches = []

    def new(*shape, of=dtype):
        return torch.empty(shape, dtype=of)

    x = new(n, *spatial, c).movedim(-1, 1) if channels_last else new(n, c, *spatial)
    one_layer = r is None
    inputs = [x, None if one_layer else new(r, c), None if one_layer else new(r), new(c, c if one_layer else r), new(c)]
    inputs.append(torch.empty_like(x) if with_residual else None)
    wide = torch.promote_types(dtype, torch.float32)
    kept = [new(n, c, of=wide), new(n, r or 0, of=wide), new(n, c, of=wide)]
    encoded = Options.of(**options)
    vectors = [new(c, of=wide) if affine else None for _ in ("scale", "shift")]
    grads = [None if t is None else torch.empty_like(t) for t in inputs]
    with recording(launches, forward, backward, weights):
        launch.forward_out(*inputs, *vectors, *encoded, channels_last, torch.empty_like(x), *kept)
        launch.backward_out(torch.empty_like(x), *inputs, *kept, *encoded, channels_last, False, *grads)
    return launches


def record_batch_norm(n, c, r, spatial, dtype, channels_last, options, with_residual):
    """Returns the launches of a batch norm with the post_act of `options`, and of its scale and shift."""
    launches = []
    shape = (n, *spatial, c) if channels_last else (n, c, *spatial)
    x = torch.empty(shape, dtype=dtype)
    x = x.movedim(-1, 1) if channels_last else x
    residual = torch.empty_like(x) if with_residual else None
    *norm, scale, shift = (torch.empty(c, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(6))
    act = Options.of(**options).post_act
    with recording(launches, batch_norm):
        launch.batch_norm_out(x, residual, *norm, 1e-5, act, channels_last, torch.empty_like(x))
        launch.scale_shift_out(*norm, 1e-5, scale, shift)
    return launches


def source(kernel, args, kwargs):
    """Specializes a kernel as Triton's launcher would: for arguments that are 1, and for multiples of 16."""
    names = kernel.arg_names
    values = {**dict(zip(names, args, strict=False)), **{k: v for k, v in kwargs.items() if k in names}}
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif name in constants or value is None or value == 1:
            signature[name], constexprs[(i,)] = "constexpr", value
            continue
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in kwargs.items() if k not in names}
    return ASTSource(kernel, signature, constexprs, attributes), options


def nvidia(compiled):
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], **TEXT).stdout
    registers, stack, local = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))

    def wide(what):  # counted in PTX, because disassembling a cubin takes as long as compiling it
        return len(re.findall(rf"\b{what}\.global\S*\.(?:v4\.b32|v2\.b64)\b", compiled.asm["ptx"]))

    return {"registers": registers, "spills": stack + local, "loads": wide("ld"), "stores": wide("st")}


def amd(compiled):
    text = compiled.asm["amdgcn"]

    def count(what):
        return sum(map(int, re.findall(rf"\.{what}:\s*(\d+)", text)))

    return {
        "registers": count("vgpr_count"),
        # Without sgpr_spill_count: spilled SGPRs move to lanes of vector registers or show in the private segment.
        "spills": count("vgpr_spill_count") + count("private_segment_fixed_size"),
        "loads": len(re.findall(r"_load_dwordx4", text)),
        "stores": len(re.findall(r"_store_dwordx4", text)),
    }


TEXT = {"capture_output": True, "text": True, "check": True}


def main(name: str) -> None:
    on_amd = name.startswith("gfx")
    target = GPUTarget("hip", name, 64) if on_amd else GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    if on_amd:  # as launch.py sets them with PyTorch for ROCm
        launch.ORDERED, launch.REGISTERS = False, {}
    for call in HALVES.get(name, CALLS):
        for kernel, args, kwargs in record(*call, affine=RICH in call) + record_batch_norm(*call):
            what, options = source(kernel, args, kwargs)
            # The first step of Triton's launcher, which otherwise runs only with a GPU. It makes a Python function with
            # the kernel's parameters and its own, so a kernel parameter called `options` was a SyntaxError.
            bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
            assert set(bind(*args, **kwargs)[2]) == set(options)
            compiled = triton.compile(what, target=target, options=options)
            found = amd(compiled) if on_amd else nvidia(compiled)
            line = {
                "kernel": kernel.__name__,
                "call": str(call[:6]),
                "extent": call[1] if call[5] else call[3][0] * call[3][1],
            }
            print(json.dumps({**line, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
