"""Threads, forks, the environment, the default device and other processes around the package."""

import os
import subprocess
import sys

import pytest
import torch
from cases import Case, assert_close, call, truth
from torch import nn

import se_fused
from se_fused import backends

# A model to replace, for a process of its own.
MODEL = """
import os, sys, threading, time
import torch
from torch import nn
import se_fused

class SE(nn.Module):
    def __init__(self, c=256):
        super().__init__()
        self.a, self.b = nn.Linear(c, c // 4), nn.Linear(c // 4, c)
    def forward(self, x):
        return x * torch.sigmoid(self.b(torch.relu(self.a(x.mean((2, 3))))))[:, :, None, None]
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_a_fork_after_replace_computes():
    """OpenMP's pool does not survive a fork: nothing that replace does may have started it."""
    done = run(MODEL + """
model = SE()
assert len(se_fused.replace(model).replaced) == 1
child = os.fork()
if child == 0:
    with torch.inference_mode():
        model(torch.ones(8, 256, 56, 56))
    os._exit(0)
for _ in range(1200):  # two minutes
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(status)
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the child hangs")
""")  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SE_FUSED_BACKEND", "", "cpu runs it"),
        ("SE_FUSED_CXXFLAGS", "'unbalanced", 'SE_FUSED_CXXFLAGS is "\'unbalanced": No closing quotation'),
    ],
)
def test_a_strange_environment_does_not_break_the_import(variable, value, said):
    done = run(
        "import torch, se_fused; w = torch.eye(3)\n"
        "print(se_fused.explain(torch.ones(1, 3, 2, 2), None, None, w, None).why_not.get('cpu', 'cpu runs it'))",
        **{variable: value},
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_an_unknown_backend_in_the_environment_is_named_and_no_call_is_served():
    code = "import torch, se_fused; print('imported'); se_fused.SqueezeExcite(8)(torch.ones(1, 8, 2, 2))"
    done = run(code, SE_FUSED_BACKEND="gpu")
    assert done.stdout == "imported\n"
    said = "SE_FUSED_BACKEND is 'gpu'; it must be one of auto, cuda, triton, cpu, reference"
    assert f"se_fused: {said}" in done.stderr.splitlines()
    assert f"BackendUnavailable: backend 'gpu' was asked for and cannot run this call: {said}" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_changes_neither_way_nor_result(device, native, monkeypatch):
    tensors, found = Case().tensors(), []
    expected = truth(tensors, {})
    if not backends.CPU.has_fast_path():
        pytest.skip("this torch has no DLPack exchange")
    fast_path = backends.CPU.fast_path
    monkeypatch.setattr(
        backends.CPU, "fast_path", lambda *args, **more: found.append(fast_path(*args, **more)) or found[-1]
    )
    with torch.device(device), torch.no_grad():
        y = call(se_fused.squeeze_excite, tensors, {})
    assert_close(y, expected, torch.float32)
    assert found[0] is y


@pytest.mark.parametrize("model", [nn.ReLU, None, "resnet50", [nn.ReLU()]])
def test_replace_names_what_is_no_model(model):
    with pytest.raises(TypeError, match=r"replace: model is (the class ReLU|a (NoneType|str|list)); wanted a torch.nn"):
        se_fused.replace(model)


@pytest.mark.parametrize("pattern", [3, [None], {"a": 1}])
def test_replace_names_what_is_no_pattern(pattern):
    with pytest.raises(TypeError, match=r"replace: include is .*; wanted a pattern"):
        se_fused.replace(nn.ReLU(), include=pattern)


def test_fully_sharded_linear_layers_inside_a_replaced_one():
    """FSDP2 on each Linear: the layer computes as the original does, whose hooks gather the weights."""
    done = run(MODEL + """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
torch.manual_seed(0)
model, x = SE(16), torch.randn(2, 16, 5, 4)
wanted = model(x)
wanted.sum().backward()
grad = model.a.weight.grad.clone()
model.zero_grad()
assert len(se_fused.replace(model).replaced) == 1
mesh = init_device_mesh("cpu", (1,))
for linear in (model.a, model.b):
    fully_shard(linear, mesh=mesh)
y = model(x)
assert torch.equal(y, wanted)
y.sum().backward()
assert torch.allclose(model.a.weight.grad.full_tensor(), grad)
dist.destroy_process_group()
""")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
