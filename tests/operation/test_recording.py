"""Compilers, tracers and exporters get plain PyTorch that gives the same numbers and can be trained."""

import io
import logging
import subprocess
import sys

import pytest
import torch
from cases import Case, call
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import se_fused

X = torch.randn(2, 3, 8, 9)


def network(replaced: bool = True, **options) -> nn.Module:
    from se_layers import SqueezeExcitation

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), SqueezeExcitation(16, 4), se_fused.SqueezeExcite(16, **options)]
    model = nn.Sequential(*layers)
    if replaced:
        assert list(se_fused.replace(model).replaced) == ["1"]
    return model


def test_jit_trace_gives_plain_torchscript_that_runs_without_this_package(tmp_path):
    model = network().eval()
    torch.jit.trace(model, X).save(tmp_path / "model.pt")
    other = torch.randn(5, 3, 11, 7)
    torch.save(other, tmp_path / "x.pt")
    wanted = model(other).detach()
    program = f"""
import sys, torch
y = torch.jit.load({str(tmp_path / "model.pt")!r})(torch.load({str(tmp_path / "x.pt")!r}))
assert "se_fused" not in sys.modules
torch.save(y.detach(), {str(tmp_path / "y.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), wanted)


@pytest.mark.parametrize("options", [{}, {"squeeze": "mean_max", "gate": "hard_sigmoid", "post_act": "hardswish"}])
def test_a_trace_warns_of_nothing_and_checks_itself(options, recwarn):
    with torch.no_grad():
        torch.jit.trace(network(**options).eval(), X)
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_gives_plain_operators_and_the_same_numbers(dynamo):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, file = network().eval(), io.BytesIO()
    torch.onnx.export(model, (X,), file, dynamo=dynamo)
    graph = onnx.load_from_string(file.getvalue()).graph
    assert {node.domain for node in graph.node} == {""}
    session = onnxruntime.InferenceSession(file.getvalue())
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(X).detach(), rtol=1e-4, atol=1e-5)


def test_openvino_converts_by_example():
    openvino = pytest.importorskip("openvino")
    model = network().eval()
    in_float = {"INFERENCE_PRECISION_HINT": "f32"}  # a CPU with bfloat16 would use that
    compiled = openvino.compile_model(openvino.convert_model(model, example_input=X), "CPU", in_float)
    torch.testing.assert_close(torch.from_numpy(compiled(X.numpy())[0]), model(X).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_program_exported_without_gradients_is_trained(backend, native):
    """With "cpu" forced, the program has the inference operator; otherwise it is plain PyTorch."""
    grads = []
    for replaced in (False, True):
        model = network(replaced)
        with se_fused.use_backend(backend), torch.no_grad():
            program = torch.export.export(model, (X,))
        assert ("se_fused" in str(program.graph)) == (backend == "cpu")
        trained = program.module()
        trained(X).square().sum().backward()
        grads.append({name: p.grad for name, p in trained.named_parameters()})
    original = network(False)
    original(X).square().sum().backward()
    for found in grads:
        assert found.keys() == dict(original.named_parameters()).keys()
        for name, p in original.named_parameters():
            torch.testing.assert_close(found[name], p.grad, msg=name)


@given(
    options=st.fixed_dictionaries(
        {
            "act": st.sampled_from(["relu", "gelu"]),
            "gate": st.sampled_from(["sigmoid", "hard_sigmoid"]),
            "squeeze": st.sampled_from(["mean", "max", "mean_max"]),
            "pre_act": st.sampled_from([None, "silu"]),
            "post_act": st.sampled_from([None, "relu"]),
        }
    ),
    backend=st.sampled_from(["auto", "cpu"]),
    residual=st.sampled_from(["none", "x", "another"]),
    affine=st.booleans(),
    recorded=st.sampled_from(["export", "trace"]),
)
@settings(max_examples=40)
def test_what_is_recorded_without_gradients_has_them_whatever_the_options(options, backend, residual, affine, recorded):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.se = nn.Conv2d(3, 8, 1), se_fused.SqueezeExcite(8, 2)
            if affine:
                self.scale, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

        def forward(self, x):
            u, se = self.before(x), self.se
            more = {"residual": {"none": None, "x": u, "another": 2 * u}[residual], **options}
            if affine:
                more |= {"scale": self.scale, "shift": self.shift}
            return se_fused.squeeze_excite(u, se.w1, se.b1, se.w2, se.b2, **more)

    torch.manual_seed(0)
    net = Net().double()
    x, g = X.double(), torch.randn(2, 8, 8, 9, dtype=torch.float64)
    wanted = torch.autograd.grad(net(x), list(net.parameters()), g)
    with se_fused.use_backend(backend), torch.no_grad():
        program = torch.export.export(net, (x,)).module() if recorded == "export" else torch.jit.trace(net, x)
    names = dict(net.named_parameters())
    found = dict(program.named_parameters())
    got = torch.autograd.grad(program(x), [found[name] for name in names], g)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("affine", [False, True])
def test_the_inference_operator_differentiates_to_second_order(native, affine):
    case = Case(c=4, r=2, spatial=(2, 3), dtype=torch.float64, affine=affine)
    tensors = [t for t in case.tensors().values() if t is not None]
    options = (1, 9, 0.0, 0.0, 0, 0, 0)

    def operator(*inputs):
        weights, vectors = inputs[:5], inputs[5:] or (None, None)
        return torch.ops.se_fused.squeeze_excite.default(*weights, inputs[0], *vectors, *options)

    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(operator, leaves)
    assert torch.autograd.gradgradcheck(operator, leaves)


def test_a_program_that_writes_in_place_is_not_trained_silently(native):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), se_fused.SqueezeExcite(16, inplace=True))
    with torch.no_grad():
        program = torch.export.export(model, (X,))
    with pytest.raises(RuntimeError, match="squeeze_excite_ writes into an argument, so it has no gradient"):
        program.module()(X).sum().backward()


@pytest.mark.parametrize("grad", [False, True])
def test_compile_sees_the_original_layer_and_the_formula(grad):
    torch._dynamo.reset()
    model, graphs = network(), []

    def look(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=look)(X), model(X))
    (graph,) = graphs
    assert "se_fused" not in graph
    assert "mean" in graph


def test_compile_of_a_changed_layer_follows_the_change():
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(X)
    model[1].activation = nn.SiLU()
    torch.testing.assert_close(compiled(X), se_fused.restore(model)(X))


def test_symbolic_trace_of_a_replaced_layer_as_root_and_inside():
    model = network()[:2]
    for module, x in ((model[1], torch.randn(2, 16, 5, 4)), (model, X)):
        torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), module(x))


def test_a_forced_backend_keeps_the_operator_in_a_compiled_region(native):
    torch._dynamo.reset()
    tensors, graphs = Case().tensors(), []

    def look(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch.compile(lambda x: call(se_fused.squeeze_excite, {**tensors, "x": x}, {}), backend=look)(tensors["x"])
    assert "se_fused" in graphs[0]


def test_nothing_is_said_while_recording(caplog):
    with caplog.at_level(logging.WARNING, "se_fused"):
        torch.jit.trace(network().eval(), X)
        torch.export.export(network(), (X,))
    assert caplog.records == []
