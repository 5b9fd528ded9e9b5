"""The options: their names and numbers, and the objects that hold them."""

import copy
import pickle

import pytest
import torch
from cases import Case, call

import se_fused
from se_fused import HardSigmoid, reference
from se_fused.options import GATES, Options


@pytest.mark.parametrize("gate", [*GATES, HardSigmoid(0.2, 0.5)])
@pytest.mark.parametrize("pre_act", [None, "silu"])
def test_options_give_back_their_names(gate, pre_act):
    options = {"act": "mish", "gate": gate, "squeeze": "max", "pre_act": pre_act, "post_act": "tanh"}
    assert Options(*Options.of(**options)).names() == options
    layer = se_fused.SqueezeExcite(8, **options)
    assert {name: getattr(layer, name) for name in options} == options


def test_names_that_mean_the_same_are_the_same_options():
    assert Options.of(gate=HardSigmoid(), pre_act="identity") == Options.of(gate="hard_sigmoid", pre_act=None)


def test_the_options_of_a_layer_are_fixed():
    layer = se_fused.SqueezeExcite(8)
    for name in Options.of().names():
        with pytest.raises(AttributeError, match=name):
            setattr(layer, name, "silu")
    x = torch.randn(2, 8, 3, 3)
    again = pickle.loads(pickle.dumps(se_fused.SqueezeExcite(8, act="silu", gate=HardSigmoid(0.2, 0.5))))
    assert again.options == Options.of(act="silu", gate=HardSigmoid(0.2, 0.5))
    torch.testing.assert_close(copy.deepcopy(again)(x), again(x), rtol=0, atol=0)


@pytest.mark.parametrize("function", [se_fused.squeeze_excite, se_fused.explain, reference.squeeze_excite])
def test_an_option_that_does_not_exist_is_refused(function):
    tensors = Case().tensors()
    with pytest.raises(TypeError, match="unexpected keyword argument 'gat'"):
        call(function, tensors, {"gat": "tanh"})
    with pytest.raises(ValueError, match="squeeze_excite: gate is 'tan'; wanted one of sigmoid"):
        call(function, tensors, {"gate": "tan"})
