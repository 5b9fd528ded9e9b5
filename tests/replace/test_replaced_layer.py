"""Operations of users on a layer or model after `replace`."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from se_layers import Plus, SqueezeExcitation
from timm.layers import SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from examples import zoo
from se_fused.replace import FusedSE, replace, restore

pytestmark = pytest.mark.usefixtures("one_thread", "known_layers")


def se_model(**options) -> nn.Module:
    return zoo.build("timm:mobilenetv3_small_100", **options).eval()


def test_attributes_methods_and_mode() -> None:
    layer = SqueezeExcitation(16, 4)
    x = torch.randn(2, 16, 5, 4)
    scale = layer._scale(x)
    layer.note = "kept"
    replace(layer)
    assert isinstance(layer, SqueezeExcitation)
    assert torch.equal(layer._scale(x), scale)
    assert layer.note == "kept"
    assert layer.fc1.weight is layer.get_parameter("fc1.weight")
    layer.eval()
    layer.note = "new"
    restore(layer)
    assert (layer.training, layer.fc1.training, layer.note) == (False, False, "new")
    assert not any(name.startswith("_se_") for name in vars(layer))


def test_hooks_on_the_layer_itself_stay() -> None:
    layer, x, seen = SEModule(16), torch.randn(2, 16, 5, 4), []
    layer.register_forward_hook(lambda module, args, y: seen.append(y))
    assert list(replace(layer).replaced) == [""]
    assert seen == []
    y = layer(x)
    assert len(seen) == 1
    assert seen[0] is y


class Masked(SEModule):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


def test_other_calls_than_the_checked_one_compute_as_before() -> None:
    torch.manual_seed(0)
    layer = Masked(16)
    x, mask = torch.randn(2, 16, 5, 4), torch.rand(2, 1, 5, 4)
    wanted = layer(x, mask), layer(x, mask=mask), layer(x=x)
    replace(layer)
    assert all(
        torch.equal(a, b) for a, b in zip((layer(x, mask), layer(x, mask=mask), layer(x=x)), wanted, strict=True)
    )
    # An unbatched [C, H, W] with H = C would pass for [N, C, L], a batch of 1-D maps.
    unbatched = SqueezeExcitation(16, 4)
    x = torch.randn(16, 16, 5)
    wanted = unbatched(x)
    replace(unbatched)
    assert torch.equal(unbatched(x), wanted)


def test_weights_are_followed() -> None:
    """Weights change in place, by assignment or conversion, by a new module or by a parametrisation."""
    x = torch.randn(2, 3, 64, 48)
    torch.manual_seed(1)
    other = se_model().state_dict()

    def double_fc(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, SqueezeExcite):
                module.conv_expand = nn.Conv2d(*module.conv_expand.weight.shape[1::-1], 1)
                nn.init.constant_(module.conv_expand.weight, 0.1)
                nn.init.constant_(module.conv_expand.bias, 0.2)

    def parametrise(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, SqueezeExcite):
                nn.utils.parametrize.register_parametrization(module.conv_reduce, "weight", nn.Tanh())

    for change in (
        lambda m: m.load_state_dict(other),
        lambda m: m.load_state_dict(other, assign=True),
        lambda m: m.double().float(),
        double_fc,
        parametrise,
    ):
        torch.manual_seed(0)
        plain = se_model()
        fused = copy.deepcopy(plain)
        replace(fused)
        change(plain)
        change(fused)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


def test_meta_model_can_be_replaced_and_filled() -> None:
    with torch.device("meta"):
        model = se_model()
    assert len(replace(model).replaced) == 9
    plain = se_model()
    model.load_state_dict(plain.state_dict(), assign=True)
    x = torch.randn(2, 3, 64, 48)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_copies_are_fused_and_independent(duplicate) -> None:
    if duplicate == "torch.save":

        def duplicate(model: nn.Module) -> nn.Module:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            return torch.load(file, weights_only=False)

    model, x = se_model(), torch.randn(2, 3, 64, 48)
    replace(model)
    other = duplicate(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    y = model(x)
    assert torch.equal(other(x), y)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(model(x), y)
    restore(other)
    assert not any(isinstance(m, FusedSE) for m in other.modules())
    assert sum(isinstance(m, FusedSE) for m in model.modules()) == 9


def test_optimizer_and_functional_call() -> None:
    model, x = se_model(), torch.randn(2, 3, 64, 48)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace(model)
    before = model.blocks[0][0].se.conv_reduce.bias.clone()
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0][0].se.conv_reduce.bias, before)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert torch.count_nonzero(torch.func.functional_call(model, zeros, (x,))) == 0


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_into_one_graph(grad: bool) -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), SEModule(16), Plus(SEModule(16))), torch.randn(2, 3, 8, 7)
    replace(model)
    with torch.set_grad_enabled(grad):
        wanted = model(x)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, wanted)
    if grad:
        (got_grad,) = torch.autograd.grad(got.square().sum(), [model[0].weight])
        (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), [model[0].weight])
        torch.testing.assert_close(got_grad, wanted_grad)


def test_autocast_keeps_the_dtype_of_the_output() -> None:
    torch.manual_seed(0)
    plain = SEModule(16)
    fused = copy.deepcopy(plain)
    replace(fused)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 16, 5, 4, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, wanted = fused(x), plain(x)
        assert got.dtype == wanted.dtype == dtype
        # The original rounds z, h and s to bfloat16, which has 8 significant bits: some 4 roundings of 2**-9.
        torch.testing.assert_close(got, wanted, rtol=2**-6, atol=2**-6)


def test_inplace_only_without_grad_mode() -> None:
    model = nn.Sequential(SEModule(16))
    x = torch.randn(2, 16, 5, 4)
    wanted, original = model(x).detach(), x.clone()
    replace(model, inplace=True)
    y = model(x)
    assert torch.equal(x, original)
    y.sum().backward()
    for context in (torch.no_grad, torch.inference_mode):
        given = original.clone()
        with context():
            y = model(given)
        assert y.data_ptr() == given.data_ptr()
        torch.testing.assert_close(given, wanted)
    restore(model)
    replace(model)
    with torch.no_grad():
        model(x)
    assert torch.equal(x, original)


def test_restore_refuses_a_class_changed_since() -> None:
    layer = SEModule(16)
    replace(layer)
    layer.__class__ = type("Other", (type(layer),), {})
    with pytest.raises(RuntimeError, match="class of a replaced layer was changed afterwards, to Other"):
        restore(layer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_asks_for_the_original() -> None:
    model, x = nn.Sequential(SEModule(16)), torch.randn(2, 16, 5, 4)
    replace(model)
    with pytest.raises(RuntimeError, match=r"call se_fused\.restore on the model first"):
        torch.jit.script(model)
    assert torch.equal(torch.jit.script(restore(model))(x), model(x))


class Named(nn.Module):
    """A layer whose child has the name that the package once used for itself."""

    def __init__(self) -> None:
        super().__init__()
        self._se, self.swap = SEModule(16), 3

    def forward(self, x: Tensor) -> Tensor:
        return x + self._se(x)


def test_names_of_the_layer_are_its_own() -> None:
    model, x = nn.Sequential(Named(), nn.ReLU()), torch.randn(2, 16, 5, 4)
    wanted = model(x)
    assert list(replace(model).replaced) == ["0"]
    torch.testing.assert_close(model(x), wanted)
    assert restore(model)[0].swap == 3
    assert torch.equal(model(x), wanted)


def test_a_layer_that_cannot_be_changed_leaves_the_others_whole() -> None:
    class Closed(SEModule):
        def __init_subclass__(cls, **_: object) -> None:
            raise ValueError("no subclass of this")

    class Strict(SEModule):
        def __setattr__(self, name: str, value: object) -> None:
            if name.startswith("_se_"):
                raise AttributeError(name)
            super().__setattr__(name, value)

    model, x = nn.Sequential(SEModule(16), Closed(16), Strict(16), SEModule(16)), torch.randn(2, 16, 5, 4)
    wanted = model(x)
    report = replace(model)
    assert list(report.replaced) == ["0", "2", "3"]
    assert report.skipped == {"1": "its class cannot be changed: no subclass of this"}
    torch.testing.assert_close(model(x), wanted)
    assert torch.equal(restore(model)(x), wanted)


def test_objects_made_from_the_class_of_a_replaced_layer_are_originals() -> None:
    model, x = nn.Sequential(SEModule(16)), torch.randn(2, 16, 5, 4)
    replace(model)
    model.append(type(model[0])(16))
    assert "fused" not in repr(model[1])
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    assert type(restore(model)[1]) is SEModule


def test_a_child_that_refers_to_its_layer_can_be_copied() -> None:
    layer = SEModule(16)
    layer.fc1.owner = [layer]
    x, plain = torch.randn(2, 16, 5, 4), copy.deepcopy(layer)
    replace(layer)
    assert torch.equal(copy.deepcopy(layer.fc1).owner[0](x), copy.deepcopy(plain.fc1).owner[0](x))


@pytest.mark.parametrize("how", ["expanded", "inference", "a weight in x", "requires grad", "vmap"])
def test_in_place_is_given_up_where_it_cannot_be(how: str) -> None:
    plain = SEModule(16)
    layer = copy.deepcopy(plain)
    replace(layer, inplace=True)
    x = torch.randn(2, 16, 5, 4)
    if how == "expanded":
        x = x[:1].expand(2, 16, 5, 4)
    elif how == "inference":
        with torch.inference_mode():
            x = x.clone()
    elif how == "a weight in x":
        layer.fc1.bias.data = plain.fc1.bias.data = x.view(-1)[:8]
    elif how == "requires grad":
        x.requires_grad_()
    with torch.no_grad():
        if how == "vmap":
            weights = {name: torch.stack([p, 2 * p]) for name, p in plain.named_parameters()}
            got, wanted = (
                torch.vmap(lambda w, m=m: torch.func.functional_call(m, w, (x,)))(weights) for m in (layer, plain)
            )
        else:
            before = x.clone()
            wanted, got = plain(x), layer(x)
            assert torch.equal(x, before)
            assert got.requires_grad is False
    torch.testing.assert_close(got, wanted)


def test_a_layer_inside_another_that_stands_elsewhere_too() -> None:
    inner = SEModule(16)
    for model in (nn.Sequential(Plus(inner), inner), nn.Sequential(inner, Plus(inner))):
        x = torch.randn(2, 16, 5, 4)
        wanted = model(x)
        replace(model)
        torch.testing.assert_close(model(x), wanted)
        restore(model)


def test_a_partial_forward() -> None:
    class Partial(SEModule):
        def scaled(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return SEModule.forward(self, x) if factor == 1.0 else x * factor

        forward = functools.partialmethod(scaled, factor=1.0)

    layer, x = Partial(16), torch.randn(2, 16, 5, 4)
    wanted = layer(x)
    replace(layer)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x, factor=3.0), x * 3.0)
