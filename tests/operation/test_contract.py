"""What the public call takes and refuses, and how it composes with the rest of PyTorch."""

import copy
import io

import numpy as np
import pytest
import torch
from cases import Case, assert_close, call, truth
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import se_fused
from se_fused import HardSigmoid, backends, reference
from se_fused.backends.choice import Choice
from se_fused.options import Options

pytestmark = pytest.mark.usefixtures("native")


def good():
    return Case(c=8, r=2, residual="map", affine=True).tensors()


def changed(**replacements):
    return {**good(), **replacements}


X = torch.randn(2, 8, 5, 7)
BAD_TENSORS = [
    ({"x": None}, TypeError, r"x is None; wanted a dense floating-point tensor"),
    ({"x": [[1.0]]}, TypeError, r"x is a list; wanted"),
    ({"x": X.numpy()}, TypeError, r"x is a ndarray; wanted"),
    ({"x": X.int()}, TypeError, r"x is a tensor of shape \[2, 8, 5, 7\], torch.int32, on cpu; wanted"),
    ({"x": X.to(torch.complex64)}, TypeError, r"x is .*complex64"),
    ({"x": X > 0}, TypeError, r"x is .*torch.bool"),
    ({"x": X.to_sparse()}, TypeError, r"x is a torch.sparse_coo tensor"),
    ({"x": X.to_mkldnn()}, TypeError, r"x is a torch._mkldnn tensor"),
    ({"x": torch.nested.nested_tensor([X[0], X[1]])}, TypeError, r"x is a nested tensor"),
    ({"x": torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)}, TypeError, r"x is .*qint8"),
    ({"x": X[0, 0]}, ValueError, r"x is a tensor of shape \[5, 7\].*1 to 3 spatial dimensions"),
    ({"x": X[..., None, None]}, ValueError, r"x is a tensor of shape \[2, 8, 5, 7, 1, 1\]"),
    ({"x": X[:, :0]}, ValueError, r"x is a tensor of shape \[2, 0, 5, 7\].*C >= 1"),
    ({"x": X[:, :4]}, ValueError, r"w1 is a tensor of shape \[2, 8\].*wanted shape \[2, 4\]"),
    ({"w1": torch.randn(2, 9)}, ValueError, r"w1 is .*wanted shape \[2, 8\]"),
    ({"w1": torch.randn(8, 2)}, ValueError, r"w1 is a tensor of shape \[8, 2\]"),
    ({"w1": torch.randn(0, 8)}, ValueError, r"w1 is .*R >= 1"),
    ({"w1": torch.tensor(1.0)}, ValueError, r"w1 is .*R >= 1"),
    ({"w1": torch.randn(2, 8, 3, 3)}, ValueError, r"w1 is .*1x1 convolution"),
    ({"w1": "relu"}, TypeError, r"w1 is 'relu'; wanted a tensor"),
    ({"w1": None}, ValueError, r"b1 is .*None, because w1 is None"),
    ({"w1": None, "b1": None}, ValueError, r"w2 is .*wanted shape \[8, 8\]"),
    ({"b1": torch.randn(3)}, ValueError, r"b1 is .*wanted shape \[2\]"),
    ({"b1": torch.randn(2, 1)}, ValueError, r"b1 is .*wanted shape \[2\]"),
    ({"b1": 0.0}, TypeError, r"b1 is 0.0; wanted a tensor of shape \[2\]"),
    ({"w2": None}, TypeError, r"w2 is None; wanted a tensor"),
    ({"w2": torch.randn(2, 8)}, ValueError, r"w2 is .*wanted shape \[8, 2\]"),
    (
        {"w2": torch.randn(8, 2).double()},
        TypeError,
        r"w2 is .*float64.*wanted a dense tensor of torch.float32, the dtype of x",
    ),
    ({"w2": torch.randn(8, 2).to_sparse()}, TypeError, r"w2 is a torch.sparse_coo tensor"),
    ({"w1": torch.randn(2, 8).half()}, TypeError, r"w1 is .*float16.*the dtype of w2"),
    ({"b2": torch.randn(8, dtype=torch.float64)}, TypeError, r"b2 is .*the dtype of w2"),
    ({"b2": torch.randn(7)}, ValueError, r"b2 is .*wanted shape \[8\]"),
    ({"w2": torch.randn(8, 2, device="meta")}, ValueError, r"w2 is on meta; wanted cpu, the device of x"),
    ({"w1": torch.randn(2, 8, device="meta")}, ValueError, r"w1 is on meta; wanted cpu"),
    ({"residual": X[:1]}, ValueError, r"residual is a tensor of shape \[1, 8, 5, 7\].*of x"),
    ({"residual": X.double()}, ValueError, r"residual is .*float64"),
    ({"residual": 1}, TypeError, r"residual is 1; wanted"),
    ({"scale": None}, TypeError, r"scale is None; wanted a tensor of shape \[8\]"),
    ({"shift": None}, TypeError, r"shift is None; wanted a tensor of shape \[8\]"),
    ({"scale": 2.0}, TypeError, r"scale is 2.0; wanted a tensor of shape \[8\]"),
    ({"scale": torch.randn(7)}, ValueError, r"scale is .*wanted shape \[8\]"),
    ({"shift": torch.randn(8, 1, 1)}, ValueError, r"shift is .*wanted shape \[8\]"),
    ({"scale": torch.randn(8).double()}, TypeError, r"scale is .*float64.*torch.float32, the dtype of x"),
    ({"shift": torch.randn(8).half()}, TypeError, r"shift is .*float16.*torch.float32, the dtype of x"),
    ({"shift": torch.randn(8).to_sparse()}, TypeError, r"shift is a torch.sparse_coo tensor"),
    ({"scale": torch.nested.nested_tensor([X[0], X[1]])}, TypeError, r"scale is a nested tensor"),
    ({"shift": torch.randn(8, device="meta")}, ValueError, r"shift is on meta; wanted cpu, the device of x"),
]


@pytest.mark.parametrize(
    ("replacements", "error", "message"), BAD_TENSORS, ids=[message for *_, message in BAD_TENSORS]
)
def test_bad_tensors_are_named(replacements, error, message):
    for grad in (torch.no_grad(), torch.enable_grad()):
        with grad, pytest.raises(error, match=message):
            call(se_fused.squeeze_excite, changed(**replacements), {})


BAD_OPTIONS = [
    ({"act": "swish"}, "act is 'swish'; wanted one of identity, relu"),
    ({"act": None}, "act is None"),
    ({"act": ["relu"]}, r"act is \['relu'\]"),
    ({"gate": "softmax"}, "gate is 'softmax'; wanted one of sigmoid, hard_sigmoid"),
    ({"gate": "silu"}, "gate is 'silu'"),
    ({"gate": HardSigmoid("a", 1)}, "gate is HardSigmoid"),
    ({"squeeze": "sum"}, "squeeze is 'sum'; wanted one of mean, max, mean_max"),
    ({"pre_act": torch.relu}, "pre_act is .*wanted None, or one of"),
    ({"post_act": "hard_sigmoid"}, "post_act is 'hard_sigmoid'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[message for _, message in BAD_OPTIONS])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match="squeeze_excite: " + message):
        call(se_fused.squeeze_excite, good(), options)
    with pytest.raises(ValueError, match="SqueezeExcite: " + message):
        se_fused.SqueezeExcite(8, **options)


BAD_SIZES = [
    ({"channels": 0}, ValueError, "channels is 0; wanted an int of 1 or more"),
    ({"reduction": 0}, ValueError, "reduction is 0; wanted"),
    ({"hidden": -1}, ValueError, "hidden is -1; wanted"),
    ({"channels": "16"}, TypeError, "channels is '16'; wanted an int of 1 or more"),
    ({"channels": 16.0}, TypeError, "channels is 16.0; wanted"),
    ({"channels": None}, TypeError, "channels is None; wanted"),
    ({"channels": True}, TypeError, "channels is True; wanted"),
    ({"reduction": None}, TypeError, "reduction is None; wanted"),
    ({"reduction": 0.25}, TypeError, "reduction is 0.25; wanted"),
    ({"hidden": [4]}, TypeError, r"hidden is \[4\]; wanted"),
    ({"hidden": np.ones(1)}, TypeError, "hidden is array"),
    ({"bias": "no"}, TypeError, "bias is 'no'; wanted True or False"),
    ({"bias": None}, TypeError, "bias is None; wanted"),
    ({"inplace": "yes"}, TypeError, "inplace is 'yes'; wanted True or False"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_SIZES, ids=[message for *_, message in BAD_SIZES])
def test_the_layer_names_what_is_no_size_and_no_switch(options, error, message):
    with pytest.raises(error, match="SqueezeExcite: " + message):
        se_fused.SqueezeExcite(**{"channels": 8, **options})


def test_the_layer_takes_numpys_integers():
    module = se_fused.SqueezeExcite(np.int64(8), reduction=np.int32(2))
    assert module(X).shape == X.shape
    assert module.w1.shape == (4, 8)


def test_in_place_is_refused_where_autograd_records():
    tensors = good()
    tensors["w2"].requires_grad_()
    with pytest.raises(ValueError, match="inplace is True; wanted False, because an input requires grad"):
        call(se_fused.squeeze_excite, tensors, {}, inplace=True)


def test_in_place_refuses_memory_that_overlaps_itself():
    tensors = changed(x=torch.randn(2, 8, 1, 1).expand(2, 8, 5, 7))
    with torch.no_grad(), pytest.raises(ValueError, match=r"x is .*overlaps itself"):
        call(se_fused.squeeze_excite, tensors, {}, inplace=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second", "transposed"])
@pytest.mark.parametrize("r", [3, None])
def test_opcheck(dtype, layout, r):
    case = Case(c=8, r=r, dtype=dtype, layout=layout, residual="map", affine=True)
    tensors = case.tensors()
    options = Options.of("silu", "hard_sigmoid", "mean_max", "relu", "tanh")
    ops = torch.ops.se_fused
    *training, scale, shift = tensors.values()
    for vectors in ((scale, shift), (None, None)):
        opcheck(ops.squeeze_excite.default, (*training, *vectors, *options))
        opcheck(ops.squeeze_excite_.default, (*training, *vectors, *options))
        opcheck(ops.squeeze_excite_out.default, (*training, *vectors, *options, torch.empty_like(tensors["x"])))
    for tensor in tensors.values():
        if tensor is not None:
            tensor.requires_grad_()
    opcheck(ops.squeeze_excite_train.default, (*training, *options))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile_sees_one_graph_forward_and_backward(layout):
    torch._dynamo.reset()
    case = Case(c=8, r=2, dtype=torch.float64, layout=layout, residual="map", affine=True)

    def step(x, w1, b1, w2, b2, residual, scale, shift):
        more = {"residual": residual, "scale": scale, "shift": shift}
        return se_fused.squeeze_excite(2 * x, w1, b1, w2, b2, **more, post_act="relu") + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        leaves = [t.requires_grad_() for t in case.tensors().values()]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert results[0][0].stride() == results[1][0].stride()
    torch.testing.assert_close(results[1], results[0])


def test_compile_with_dynamic_shapes_in_place_and_inference():
    torch._dynamo.reset()
    module = se_fused.SqueezeExcite(8, hidden=2, inplace=True).double()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for n in (2, 3, 5):
        x = torch.randn(n, 8, n + 1, 4, dtype=torch.float64)
        expected = module(x)
        with torch.no_grad():
            assert torch.equal(compiled(x.clone()), expected)


def test_compile_of_a_transform():
    torch._dynamo.reset()
    tensors = Case(c=4, r=2, dtype=torch.float64).tensors()

    def tangent(x):
        return torch.func.jvp(
            lambda v: call(se_fused.squeeze_excite, {**tensors, "x": v}, {}), (x,), (torch.ones_like(x),)
        )[1]

    torch.testing.assert_close(torch.compile(tangent, backend="eager")(tensors["x"]), tangent(tensors["x"]))


def test_export_keeps_one_operator():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.se = se_fused.SqueezeExcite(8)

        def forward(self, x):
            return self.se(x)

    net, x = Net().eval(), torch.randn(2, 8, 5, 7)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
        assert "se_fused.squeeze_excite.default" in str(program.graph)
        wide = torch.randn(5, 8, 5, 7)
        assert torch.equal(program.module()(wide), net(wide))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_eagers_dtype(dtype):
    module = se_fused.SqueezeExcite(8, hidden=2)
    for x_dtype in (torch.float32, dtype):
        x = torch.randn(2, 8, 5, 7).to(x_dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = module(x)
        assert y.dtype == x_dtype
        y.float().sum().backward()
        assert x.grad.dtype == x_dtype
        assert module.w1.grad.dtype == torch.float32


def test_autocast_brings_mixed_dtypes_together():
    tensors = changed(residual=torch.randn(2, 8, 5, 7), x=torch.randn(2, 8, 5, 7).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(se_fused.squeeze_excite, tensors, {})
    assert y.dtype == torch.float32  # as bfloat16 + float32 in eager
    assert_close(y, truth(tensors, {}), torch.float32)


def test_float_weights_beside_a_half_map_on_a_device_without_autocast():
    tensors = {name: t.to("meta") for name, t in changed(residual=None, x=X.half()).items() if t is not None}
    with se_fused.use_backend("auto"):
        y = call(se_fused.squeeze_excite, {**tensors, "residual": None}, {})
    assert (y.dtype, y.shape) == (torch.float16, X.shape)


def test_half_weights_beside_a_float_map_need_autocast():
    tensors = {name: t.bfloat16() if name.startswith(("w", "b", "s")) else t for name, t in good().items()}
    with pytest.raises(TypeError, match=r"w2 is .*bfloat16"):
        call(se_fused.squeeze_excite, tensors, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(call(se_fused.squeeze_excite, tensors, {}), truth(tensors, {}), torch.float32)


def test_checkpointing_gives_the_same_gradients():
    module = se_fused.SqueezeExcite(8).double()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(module(x).square().sum(), x)
    again = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain[0], again[0])


def test_the_layer_is_its_formula_and_survives_copies():
    module = se_fused.SqueezeExcite(8, 4, act="silu", gate="hard_sigmoid", squeeze="mean_max", post_act="relu").double()
    x, residual = torch.randn(2, 2, 8, 5, 7, dtype=torch.float64)
    weights = (module.w1, module.b1, module.w2, module.b2)
    options = {"act": "silu", "gate": "hard_sigmoid", "squeeze": "mean_max", "post_act": "relu", "residual": residual}
    expected = reference.squeeze_excite(x, *weights, **options)
    torch.testing.assert_close(module(x, residual), expected)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for other in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
        torch.testing.assert_close(other(x, residual), expected)
    assert list(module.state_dict()) == ["w1", "w2", "b1", "b2"]
    assert list(se_fused.SqueezeExcite(8, bias=False).state_dict()) == ["w1", "w2"]
    assert module.w1.shape == (2, 8)
    assert se_fused.SqueezeExcite(8, hidden=3).w1.shape == (3, 8)


def test_the_layer_is_in_place_only_without_autograd():
    module = se_fused.SqueezeExcite(8, inplace=True)
    x = torch.randn(2, 8, 5, 7)
    assert module(x) is not x
    with torch.no_grad():
        assert module(x) is x


def peak_bytes(function) -> int:
    """The most memory that PyTorch's CPU allocator hands out during a call, in bytes beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_inference_allocates_nothing_of_the_maps_size_where_it_is_told_where_to_write():
    tensors = Case(n=4, c=64, r=4, spatial=(56, 56)).tensors()
    bytes_of_map, out = tensors["x"].numel() * 4, torch.empty_like(tensors["x"])
    with torch.inference_mode():
        assert peak_bytes(lambda: call(se_fused.squeeze_excite, tensors, {})) >= bytes_of_map
        assert peak_bytes(lambda: call(se_fused.squeeze_excite, tensors, {}, inplace=True)) < bytes_of_map / 100
        assert peak_bytes(lambda: call(se_fused.squeeze_excite, tensors, {}, out=out)) < bytes_of_map / 100


def test_backends_explain_themselves():
    tensors = good()
    positional = [tensors[name] for name in ("x", "w1", "b1", "w2", "b2")]
    explanation = se_fused.explain(*positional)
    assert explanation.backend == "cpu"
    assert se_fused.explain(*positional, scale=tensors["scale"], shift=tensors["shift"]) == explanation
    with pytest.raises(TypeError, match="shift is None"):
        se_fused.explain(*positional, scale=tensors["scale"])
    assert set(explanation.why_not) == {"cuda", "triton", "reference"}
    assert all(explanation.why_not.values())
    with se_fused.use_backend("reference"):
        assert se_fused.explain(*positional).backend == "reference"
        assert torch.equal(se_fused.squeeze_excite(*positional), reference.squeeze_excite(*positional))
    with se_fused.use_backend("cuda"), pytest.raises(se_fused.BackendUnavailable, match="'cuda' was asked for"):
        se_fused.squeeze_excite(*positional)
    with pytest.raises(ValueError, match="name must be one of auto, cuda"), se_fused.use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="plan must be empty for 'cpu'"), se_fused.use_backend("cpu", "two_pass"):
        pass


def test_a_device_without_a_backend_falls_back_once_and_says_so(caplog, monkeypatch):
    choice = Choice(backends.ALL.values())
    monkeypatch.setattr(backends, "select", choice.select)
    tensors = {name: t.to("meta") for name, t in good().items()}
    with se_fused.use_backend("auto"):
        for _ in range(2):
            assert call(se_fused.squeeze_excite, tensors, {}).shape == tensors["x"].shape
    assert [record.message for record in caplog.records] == [
        "se_fused: meta tensors run on reference PyTorch: it runs on CPU tensors; x is on meta"
        " (python -m se_fused info)"
    ]
    with se_fused.use_backend("cpu"), pytest.raises(se_fused.BackendUnavailable, match="x is on meta"):
        call(se_fused.squeeze_excite, tensors, {})
