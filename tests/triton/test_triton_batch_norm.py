"""The Triton kernels for batch norms: on a GPU if there is one, else in Triton's interpreter."""

import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from norms import check_norm, counting_operators, norm_cases
from se_blocks import Deep, Inverted, Residual, assert_same, drawn, image

import se_fused
from se_fused import backends
from se_fused.blocks.operators import operators_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytest.importorskip("se_fused.triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, about intended infinities
    pytest.mark.usefixtures("exact_convolutions"),
]


@pytest.fixture(autouse=True)
def forced():
    with se_fused.use_backend("triton"):
        assert (reason := backends.ALL["triton"].why_not(torch.device(DEVICE))) is None, reason
        yield


@given(norm_cases(channels=40, side=9))
@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_any_map(case):
    check_norm(operators_of(backends.ALL["triton"]), case, DEVICE)


@pytest.mark.parametrize("block", [Inverted, Deep, Residual])
@pytest.mark.parametrize("channels_last", [False, True])
def test_blocks(block, channels_last):
    model = drawn(block()).to(DEVICE)
    original = copy.deepcopy(model)
    se_fused.replace(model, level="block")
    x = image(2).to(DEVICE)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad(), counting_operators() as counts:
        assert_same(model(x), original(x))
    assert counts["forward"] == 1
    assert torch.equal(x, before)
