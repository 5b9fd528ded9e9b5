"""Layers that look like SE but differ in gradients, at some sizes, in some modes, or in what a call leaves behind."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from look_alikes import FALSE, IN_PART, KEPT, TOTAL, with_part
from se_layers import Convolutional
from torch import nn
from torch.utils.checkpoint import checkpoint

import se_fused
from se_fused.recognise import recognise
from se_fused.recognised import Recognised

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.mark.parametrize("name", FALSE)
def test_what_looks_like_se_and_is_not(name):
    make, reason = FALSE[name]
    layer = make()
    original = copy.deepcopy(layer)
    report = se_fused.replace(nn.Sequential(layer))
    assert KEPT == []
    assert TOTAL == [0]
    assert report.replaced == {}
    if name in IN_PART:
        assert list(report.inline) == ["0"]
    else:
        assert list(report.skipped) == ["0"]
        assert re.search(reason, report.skipped["0"]), report.skipped["0"]
    x = torch.randn(1, 24, 9, 7)
    x[0, 0, 0, 0] = torch.nan if name == "no NaN" else 0
    for training in (True, False):
        y, wanted = layer.train(training)(x), original.train(training)(x)
        assert y.stride() == wanted.stride()
        torch.testing.assert_close(y, wanted, equal_nan=True)
    KEPT.clear()
    TOTAL[:] = [0]


def test_checkpointing_inside_is_no_obstacle():
    class Checkpointed(Convolutional):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    assert isinstance(recognise(Checkpointed()), Recognised)


@given(side=st.integers(6, 1000), pool=st.sampled_from(["window", "maximum", "half"]))
@settings(max_examples=40)
def test_no_threshold_of_the_size_goes_unseen(side, pool):
    def squeeze(self, x):
        z = x.mean((2, 3), keepdim=True)
        if max(x.shape[2:]) <= side:
            return z
        return {
            "window": lambda: F.avg_pool2d(x, side // 2).mean((2, 3), keepdim=True),
            "maximum": lambda: x.amax((2, 3), keepdim=True),
            "half": lambda: x[:, :, : x.shape[2] // 2].mean((2, 3), keepdim=True),
        }[pool]()

    assert isinstance(recognise(with_part(squeeze=squeeze)()), str)
