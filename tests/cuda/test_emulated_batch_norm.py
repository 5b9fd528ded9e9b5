"""The CUDA kernels for batch norms, run thread by thread on the CPU, alone and in the blocks of networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from norms import check_norm, counting_operators, norm_cases, norm_of
from se_blocks import C, Deep, Inverted, Residual, assert_same, drawn, image
from torch import nn

from dev import emulator
from se_fused import replace, restore, use_backend
from se_fused.blocks.operators import operators_of
from se_fused.options import Options


@pytest.fixture(scope="module")
def cuda():
    return emulator.Library(emulator.library())


@given(norm_cases(channels=70, side=24), st.sampled_from(["T4", "H200"]), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_any_map(cuda, case, gpu, seed):
    kernels = operators_of(cuda)
    cuda.setup(gpu, seed=seed)
    y = check_norm(kernels, case)
    cuda.setup(gpu, seed=seed + 1)
    assert torch.equal(y.nan_to_num(), check_norm(kernels, case).nan_to_num()), "another schedule gives other bits"


@pytest.mark.parametrize("block", [Inverted, Deep, Residual])
@pytest.mark.parametrize("channels_last", [False, True])
def test_blocks(cuda, block, channels_last):
    model = drawn(block())
    original = copy.deepcopy(model)
    replace(model, level="block")
    x = image(2)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad(), cuda.forced(), counting_operators() as counts:
        got = model(x)
    # Inverted and Deep have a batch norm after the convolution, Deep three more elsewhere.
    assert counts == {"forward": 1} | ({} if block is Residual else {"batch_norm": 4 if block is Deep else 1})
    with torch.no_grad():
        wanted = original(x)
        assert_same(got, wanted)
    assert got.stride() == wanted.stride()
    assert torch.equal(x, before)


class NormFirst(Residual):
    def forward(self, x):
        return self.se(F.relu(self.bn(x)))


class Plain(Residual):
    def forward(self, x):
        return x + self.se(self.bn(self.conv(x)))


@pytest.mark.parametrize("block", [Inverted, Deep, Residual, NormFirst, Plain])
def test_strides_are_those_of_the_original(cuda, block):
    model = drawn(block())
    original = copy.deepcopy(model)
    replace(model, level="block")
    x = image(2)
    for strided in (x.mT, image(C)[:, :2].transpose(0, 1), x[:, :, ::2], x[:1].to(memory_format=torch.channels_last)):
        with torch.no_grad(), cuda.forced():
            got = model(strided)
        with torch.no_grad():
            wanted = original(strided)
        assert_same(got, wanted)
        assert got.stride() == wanted.stride()


def test_parameters_that_are_plain_tensors_or_gone(cuda):
    """They are looked up when the block is replaced, not at the first call on a device."""
    model = drawn(Inverted())
    replace(model, level="block")
    original, x = restore(copy.deepcopy(model)), image(2)
    tensors = {name: t.detach() * 2 for name, t in model.named_parameters()}
    with torch.no_grad(), cuda.forced():
        got = torch.func.functional_call(model, tensors, (x,))
    with torch.no_grad():
        assert_same(got, torch.func.functional_call(original, tensors, (x,)))
        model.se.fc1.bias = original.se.fc1.bias = None
        with cuda.forced():
            got = model(x)
        assert_same(got, original(x))


def test_a_changed_block_asks_no_backend():
    model = drawn(Inverted())
    replace(model, level="block")
    model.se = nn.Identity()
    x = image(2)
    with torch.no_grad(), use_backend("cuda"):
        assert model(x).shape == x.shape


def test_what_is_refused(cuda):
    """Vectors of another length, dtype or device, or with gaps; missing statistics; maps and residuals that are not
    dense in one order."""
    kernels, x, one = operators_of(cuda), torch.randn(2, 8, 3, 3), torch.ones(8)
    norms = [
        (one[:7], one, one, one, 1e-5), (one, one.double(), one, one, 1e-5), (one, one, None, None, 1e-5),
        (one, one, one, None, 1e-5), (*(one.double() for _ in range(4)), 1e-5), (*(one.half() for _ in range(4)), 1e-5),
        (one, one, torch.ones(16)[::2], one, 1e-5), (one, one, one, one.to("meta"), 1e-5),
        (one.as_subclass(type("Other", (torch.Tensor,), {})), one, one, one, 1e-5),
    ]  # fmt: skip
    w1, w2 = torch.randn(4, 8), torch.randn(8, 4)
    with torch.no_grad(), cuda.forced():
        for norm in norms:
            assert kernels.batch_norm(x, None, False, 0, norm) is None
            assert kernels.forward(x, w1, None, w2, None, None, False, *Options.of(), None, None, norm, None) is None
        norm = norm_of(8, torch.float32)
        assert kernels.batch_norm(x, None, False, 0, norm) is not None
        for other in (x[..., ::2], x.flatten(2)[:, :, 0], x[:0], x.mT):
            assert kernels.batch_norm(other, None, False, 0, norm) is None
        for residual in (x[:1], x.double(), x.mT, x.to(memory_format=torch.channels_last), x.to("meta")):
            assert kernels.batch_norm(x, residual, False, 0, norm) is None
        for weights in ((w1[:, :7], w2), (w1, w2.double()), (None, w2)):
            call = (x, weights[0], None, weights[1], None, None, False, *Options.of(), None, None, norm, None)
            assert kernels.forward(*call) is None
        s = torch.empty(2, 8)
        assert kernels.forward(x, w1, None, w2, None, None, False, *Options.of(), None, None, None, s) is None
        assert kernels.fold(torch.randn(8, 8, 1, 1), None, norm) is None
