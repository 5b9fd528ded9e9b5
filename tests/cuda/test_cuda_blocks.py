"""`replace(model, level="block")` on a GPU, if there is one."""

import copy
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from norms import check_norm, counting_operators, norm_cases

import se_fused
from se_fused import backends
from se_fused.blocks.operators import operators_of

if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed, whose layers se_blocks has", allow_module_level=True)
from se_blocks import Deep, Inverted, Residual, assert_same, drawn, image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("exact_convolutions"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@given(norm_cases(channels=300, side=70))
@settings(max_examples=100, deadline=None)
def test_any_map(case):
    with se_fused.use_backend("cuda"):
        check_norm(operators_of(backends.CUDA), case, "cuda")


@pytest.mark.parametrize("plan", ["", "two_pass"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [Inverted, Deep, Residual])
def test_blocks(block, dtype, channels_last, plan):
    model = drawn(block()).cuda()
    exact, original = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
    se_fused.replace(model, level="block").model.to(dtype)
    x = image(5, dtype=dtype).cuda()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad(), se_fused.use_backend("cuda", plan), counting_operators() as counts:
        got = model(x)
        assert counts["forward"] == 1
        wanted, rounded = exact(x.double()), original(x)
    assert torch.equal(x, before)
    assert got.stride() == rounded.stride()
    if dtype is torch.float32:
        return assert_same(got.double(), wanted)
    error, of_original = (float((y - wanted).abs().max()) for y in (got, rounded))
    assert error <= 1.5 * of_original


def test_a_graph_replays_with_other_weights():
    model = drawn(Deep()).cuda()
    original = copy.deepcopy(model)
    se_fused.replace(model, level="block")
    x = image(3).cuda()
    with torch.no_grad():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.normal_()
        for either in (model, original):
            either.bn1.running_var.fill_(2)
            either.se.fc1.weight.mul_(-1)
        graph.replay()
        assert_same(y, original(x))
