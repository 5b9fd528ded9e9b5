"""The examples: SE stands where the paper puts it, both layers give equal networks, and the demo shows its numbers."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from rich.console import Console

from examples import demo_digits, demo_photographs
from examples.se_inception import SEInception, SEInceptionBlock
from examples.se_resnet import ReferenceSqueezeExcite, SEResidualBlock, SEResNet
from se_fused import SqueezeExcite

matplotlib.use("Agg")
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # for float64 after several training steps; its rounding steps are 2e-16


def excite(layer, u):
    s = torch.sigmoid(F.linear(F.relu(F.linear(u.mean((2, 3)), layer.w1, layer.b1)), layer.w2, layer.b2))
    return u * s[:, :, None, None]


def pair(network, **options):
    models = []
    for layer in (ReferenceSqueezeExcite, SqueezeExcite):
        torch.manual_seed(0)
        models.append(network(partial(layer, reduction=4), **options).double())
    return models


@pytest.mark.parametrize(("c_in", "stride"), [(8, 1), (4, 1), (8, 2)])
def test_se_resnet_excites_the_branch_before_the_addition(c_in, stride):
    block = SEResidualBlock(c_in, 8, stride, partial(SqueezeExcite, reduction=4)).double().eval()
    x = torch.randn(2, c_in, 6, 5, dtype=torch.float64)
    wanted = F.relu(excite(block.se, block.branch(x)) + block.shortcut(x))
    torch.testing.assert_close(block(x), wanted, **EXACT)


def test_se_inception_excites_the_whole_block():
    block = SEInceptionBlock(6, 4, partial(SqueezeExcite, reduction=4)).double().eval()
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    wanted = excite(block.se, torch.cat([F.relu(branch(x)) for branch in block.branches], dim=1))
    torch.testing.assert_close(block(x), wanted, **EXACT)


@pytest.mark.parametrize("network", [SEResNet, SEInception])
def test_both_layers_train_one_network(network):
    """Training in float32 magnifies rounding, so the networks are compared in float64."""
    images, labels, *_ = demo_digits.digits()
    losses = []
    for model in pair(network, widths=(8, 16)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for _ in range(5):
            loss = F.cross_entropy(model(images[:32].double()), labels[:32])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


def test_same_seed_gives_same_weights():
    reference, fused = (model.state_dict() for model in pair(SEResNet))
    assert list(reference) == list(fused)
    assert all(torch.equal(reference[key], fused[key]) for key in reference)


def test_digits_are_split_without_overlap():
    images, labels, test_images, test_labels = demo_digits.digits()
    assert (len(images), len(test_images)) == (1347, 450)
    assert (images.min(), images.max()) == (0, 1)
    every = torch.cat([images, test_images]).flatten(1).unique(dim=0)
    assert len(every) == 1797
    assert len(labels) + len(test_labels) == 1797


@pytest.mark.parametrize("pre_act", [None, "relu"])
@pytest.mark.parametrize("squeeze", ["mean", "max"])
def test_gate_is_the_layers_own(squeeze, pre_act):
    layer = SqueezeExcite(8, 4, squeeze=squeeze, pre_act=pre_act).double()
    x = torch.randn(3, 8, 5, 4, dtype=torch.float64)
    u = x if pre_act is None else F.relu(x)
    torch.testing.assert_close(layer(x), u * demo_digits.gate(layer, x)[:, :, None, None], **EXACT)


def test_a_digit_is_recognised_by_the_mean_gates_nearest_to_its_own():
    labels = torch.arange(10).repeat(3)
    s = F.one_hot(labels, 12) + 0.3 * torch.rand(30, 12, generator=torch.Generator().manual_seed(0))
    means = demo_digits.by_digit(s, labels)
    torch.testing.assert_close(means[4], (s[4] + s[14] + s[24]) / 3)
    assert demo_digits.recognised(s, labels, means) == 1
    assert demo_digits.recognised(s, labels, means.roll(1, 0)) == 0


def test_gates_are_those_of_every_layer_in_order():
    model = SEResNet(widths=(8, 16)).double().eval()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    first, second = demo_digits.gates(model, x)
    with torch.no_grad():
        u = model.stem(x)
        torch.testing.assert_close(first, demo_digits.gate(model.blocks[0].se, model.blocks[0].branch(u)), **EXACT)
    assert second.shape == (3, 16)


def test_digits_part(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_digits, "EXPERIMENTS", [("SE-ResNet", "max")])
    console = Console(file=io.StringIO(), width=100)
    runs = demo_digits.train(3, console)
    reference, fused, control = runs
    assert [run.layer for run in runs] == ["reference", "fused", "control"]
    assert {str(run) for run in runs} == {"SE-ResNet, squeeze = max"}
    # At the first step the weights are the same, so only the rounding of one forward pass differs.
    assert fused.losses[0] == pytest.approx(reference.losses[0], rel=1e-6)
    assert not torch.equal(control.model.classify.bias, reference.model.classify.bias)
    for run in runs:
        assert len(run.losses) == len(run.seconds) == 3 * 21
        assert run.accuracy > 0.5  # guessing gives 0.1, and three epochs give 0.98
    console.print(demo_digits.table(runs))
    assert f"{fused.accuracy:.2%}" in console.file.getvalue()
    demo_digits.plot_losses(runs, tmp_path / "losses.png")
    demo_digits.plot_gates(fused, tmp_path / "gates.png")
    for name in ("losses.png", "gates.png"):
        assert imread(tmp_path / name).std() > 0.05  # not a blank page


SE_RESNET = demo_photographs.MODELS["SE-ResNet-50"]


@pytest.fixture(scope="module")
def batch():
    """Small crops of the photographs."""
    return demo_photographs.batch_of_eight(demo_photographs.photographs(), 48)


def test_photographs_part(batch):
    found = demo_photographs.swap("SE-ResNet-50", SE_RESNET, batch, 1)
    assert (found.replaced, found.skipped) == (16, 0)
    assert found.magnitude > 0.1
    for side in ("fused", "fused in place"):
        # Rounding in float32 is 1e-7 in each of 50 layers; a wrong gate would move the output by its own size.
        assert 0 < found.differences[side] < 1e-4 * found.magnitude
    assert found.seconds.keys() == {1, 8}
    console = Console(file=io.StringIO(), width=100)
    console.print(demo_photographs.table([found]))
    assert f"{found.differences['fused']:.1e}" in console.file.getvalue()


def test_batch_norm_has_the_statistics_of_the_photographs(batch):
    model = demo_photographs.build(SE_RESNET, batch)
    assert not model.training
    with torch.inference_mode():
        u = model.bn1(model.conv1(batch))
    torch.testing.assert_close(u.mean((0, 2, 3)), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(u.std((0, 2, 3)), torch.ones(64), atol=1e-2, rtol=0)
    assert all(m.weight.any() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_the_eight_are_crops_and_their_mirror_images():
    batch = demo_photographs.batch_of_eight(demo_photographs.photographs(), 32)
    assert batch.shape == (8, 3, 32, 32)
    assert torch.equal(batch[4:], batch[:4].flip(-1))
    assert len(batch.flatten(1).unique(dim=0)) == 8


def torchrun(folder, program):
    """Run Python text in two processes, with the repository's root and its tests on the path."""
    script = folder / "program.py"
    script.write_text(program)
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(map(str, (tests.parent, tests)))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


TRAIN = """
import torch
from examples import train_digits
{fault}
train_digits.main(train_digits.Strategy.{strategy}, epochs=1)
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(strategy, tmp_path):
    run = torchrun(tmp_path, TRAIN.format(strategy=strategy, fault=""))
    assert run.returncode == 0, run.stderr
    assert f"{strategy}, 2 processes on cpu" in run.stdout
    assert float(re.search(r"(.*)% of 450 test digits", run.stdout)[1]) > 50  # guessing gives 10, one epoch 84


@pytest.mark.parametrize(
    ("strategy", "fault"),
    [
        ("fsdp2", "train_digits.share = lambda batch, rank, world: batch[: len(batch) // world]"),
        ("ddp", "train_digits.NORM = torch.nn.BatchNorm2d"),
    ],
    ids=["same images", "batch norms"],
)
def test_processes_that_train_another_network_fail(strategy, fault, tmp_path):
    fault += "\nbatches = train_digits.batches\ntrain_digits.batches = lambda *given: list(batches(*given))[:3]"
    run = torchrun(tmp_path, TRAIN.format(strategy=strategy, fault=fault))
    assert run.returncode != 0
    assert "largest difference" in run.stdout, run.stderr


REPLACED = """
import copy
import itertools
import os

import torch
import torch.distributed as dist
from se_layers import Classic
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import se_fused

def sharded(model):
    fully_shard(model[1])
    return fully_shard(model)

dist.init_process_group("gloo")
torch.manual_seed(0)
original = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Sequential(Classic(32), nn.Conv2d(32, 4, 3))).double()
x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
original(x).square().mean().backward()
for wrap, replaced_first in itertools.product((DistributedDataParallel, sharded), (False, True)):
    model = copy.deepcopy(original)
    model.zero_grad()
    if replaced_first:
        model = wrap(se_fused.replace(model).raise_if_none().model)
    else:
        model = se_fused.replace(wrap(model)).raise_if_none().model
    with torch.profiler.profile() as profile:
        model(x[dist.get_rank() :: 2]).square().mean().backward()
    calls = {event.key for event in profile.key_averages()}
    assert {"se_fused::forward_out", "se_fused::backward_out"} <= calls, (wrap, replaced_first)
    for p, wanted in zip(model.parameters(), original.parameters(), strict=True):
        grad = p.grad.full_tensor() if wrap is sharded else p.grad
        torch.testing.assert_close(grad, wanted.grad, rtol=1e-10, atol=1e-12)
os._exit(0)  # a usual exit aborts now and then, where a thread of gloo still holds the last tensors
"""


def test_replaced_layers_run_fused_under_ddp_and_fsdp2(tmp_path):
    run = torchrun(tmp_path, REPLACED)
    assert run.returncode == 0, run.stderr
