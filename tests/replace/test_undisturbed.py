"""Examination leaves the model, its classes and the process as they were."""

import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from look_alikes import FALSE, KEPT, TOTAL, with_part
from se_candidates import ACCEPTED, REFUSED, UNMENTIONED
from se_layers import Convolutional, Plus
from torch import nn
from torch.nn.utils import parametrizations

import se_fused

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


def world(model: nn.Module) -> dict:
    """Everything reachable that an examination could change, by value or by identity."""
    seen = {}
    for name, module in model.named_modules():
        seen[name] = (module, type(module), {key: _value(value) for key, value in vars(module).items()})
        for cls in type(module).__mro__:
            seen[cls] = dict(vars(cls))
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    modes = torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.get_default_dtype, torch.is_autocast_enabled
    return seen | {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(numpy.random.get_state()),
        "threads": torch.get_num_threads(),
        "modes": [mode() for mode in modes],
        "hooks": [dict(each) for each in hooks],
    }


def _value(value):
    if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):
        return id(value)
    if isinstance(value, torch.Tensor):
        return (
            id(value),
            value._version,
            value.requires_grad,
            None if value.is_meta else value.detach().clone().tolist(),
            id(value.grad),
        )
    if isinstance(value, dict):
        return {key: _value(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, (list, set)) else value


def drawing(self, p2):
    random.random(), numpy.random.rand(), torch.rand(1)
    torch.set_num_threads(torch.get_num_threads())
    return torch.sigmoid(p2)


def parametrized(which):
    layer = nn.Sequential(nn.Linear(8, 8))
    getattr(parametrizations, which)(layer[0])
    return Plus(layer)


MODELS = {
    **{f"accepted: {name}": make for name, (make, _) in ACCEPTED.items()},
    **{f"refused: {name}": make for name, (make, _) in (REFUSED | FALSE).items()},
    **{f"unmentioned: {name}": make for name, make in UNMENTIONED.items()},
    **{which: lambda which=which: parametrized(which) for which in ("weight_norm", "spectral_norm", "orthogonal")},
    "draws random numbers": with_part(gate=drawing),
}


@pytest.mark.parametrize("name", MODELS)
def test_examination_changes_nothing(name):
    model = MODELS[name]()
    if "scripted" in name:
        pytest.skip("TorchScript makes its attributes anew at each look")
    before = world(model)
    se_fused.replace(model, dry_run=True)
    assert KEPT == []
    assert TOTAL == [0]
    after = world(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert str(after[key]) == str(value) if isinstance(value, tuple) else after[key] == value, key


@given(
    which=st.sampled_from(["weight_norm", "spectral_norm", "orthogonal"]),
    at=st.sampled_from([0, 2]),
    convolution=st.booleans(),
    dry_run=st.booleans(),
)
@settings(max_examples=40)
def test_parametrized_layers_run_as_before(which, at, convolution, dry_run):
    def layer(c, r):
        return nn.Conv2d(c, r, 1) if convolution else nn.Linear(c, r)

    parts = nn.Sequential(layer(8, 4), nn.ReLU(), layer(4, 8), nn.Sigmoid())
    getattr(parametrizations, which)(parts[at])

    class SE(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = parts

        def forward(self, x):
            z = x.mean((2, 3), keepdim=convolution)
            return x * self.parts(z).reshape(*x.shape[:2], 1, 1)

    model, x = nn.Sequential(SE()).eval(), torch.randn(2, 8, 3, 5)
    wanted = model(x)
    report = se_fused.replace(model, dry_run=dry_run)
    assert "reparametrised" in report.skipped["0"]
    assert torch.equal(model(x), wanted)


def test_encodec_of_transformers_runs_as_before():
    transformers = pytest.importorskip("transformers")
    config = transformers.EncodecConfig(num_filters=4, hidden_size=8, codebook_size=16, num_lstm_layers=1)
    model = transformers.EncodecModel(config).eval()
    x = torch.randn(1, 1, 640)
    with torch.no_grad():
        wanted = model(x).audio_values
        se_fused.replace(model, dry_run=True)
        assert torch.equal(model(x).audio_values, wanted)


def test_hooks_for_all_modules_do_not_see_the_examination():
    seen = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: seen.append(1))
    try:
        report = se_fused.replace(Convolutional(), dry_run=True)
    finally:
        handle.remove()
    assert list(report.replaced) == [""]
    assert seen == []


def test_near_misses_leave_nothing_behind_either():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

        def forward(self, x):
            x = self.conv(x)
            s = torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))
            KEPT.append(s.mean())
            return x * s

    report = se_fused.replace(nn.Sequential(Block(), nn.ReLU()), dry_run=True)
    assert list(report.near) == ["0"]
    assert KEPT == []


def test_any_generator_of_numpy() -> None:
    before = numpy.random.get_bit_generator()
    try:
        numpy.random.set_bit_generator(numpy.random.PCG64(1))
        state = numpy.random.get_bit_generator().state
        assert len(se_fused.replace(Plus(Convolutional())).replaced) == 1
        assert numpy.random.get_bit_generator().state == state
    finally:
        numpy.random.set_bit_generator(before)
