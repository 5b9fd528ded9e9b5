"""Which backend runs on a GPU, on a machine without one: a stand-in replaces the compiled library."""

import ctypes
import subprocess
import sys

import pytest
import torch
from cases import Case
from watching import Watching

import se_fused
from se_fused.backends import CPU, REFERENCE, Backend, Cuda, forcing
from se_fused.backends.choice import Choice
from se_fused.options import Options

GPU = torch.device("cuda:0")
LIMITS = [90, 132, 232448, 233472, 132, 66, 30, 15, 7, 4_250_000, 50 << 20]


class Library:
    """What backends/cuda.py calls of the compiled library. reason: why it does not run on the device, or None;
    for_good: whether that will stay so."""

    def __init__(self, reason=None, for_good=True):
        self.reason, self.for_good, self.asked, self.plans = reason, for_good, 0, []

    def se_fused_device_limits(self, index, limits):
        self.asked += 1
        answer = LIMITS if self.reason is None else [int(self.for_good)] + [0] * 10
        ctypes.memmove(limits, (ctypes.c_int64 * 11)(*answer), 88)
        return self.reason

    def se_fused_force_plan(self, text):
        self.plans.append(text)


class Triton(Backend):
    """Triton on a GPU, where it is there."""

    name = "triton"

    def __init__(self, reason="there is no triton"):
        self.reason = reason

    def why_not(self, device):
        return self.reason


def choice(library, triton="there is no triton"):
    return Choice((Cuda(library), Triton(triton), CPU, REFERENCE))


OLD_DRIVER = "CUDA driver version is insufficient for CUDA runtime version"


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("reason", [OLD_DRIVER, "no kernel image is available for execution on the device"])
def test_a_gpu_that_the_library_does_not_run_on_is_served_by_another(caplog, triton, reason):
    library = Library(reason.encode())
    among = choice(library, None if triton else "there is no triton")
    with se_fused.use_backend("auto"):
        assert [among.select(GPU).name for _ in range(3)] == ["triton" if triton else "reference"] * 3
        assert among.explain(GPU).why_not["cuda"] == f"it does not run on cuda:0: {reason}"
    assert library.asked == 1, "a GPU is asked once"
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]
    cuda = among.backends["cuda"]
    with pytest.raises(RuntimeError, match=reason):
        cuda.limits(0)
    with pytest.raises(se_fused.BackendUnavailable, match=reason), forcing.force(forcing.Forced("cuda", cuda)):
        among.select(GPU)


def test_a_gpu_that_failed_for_what_may_pass_is_asked_again():
    library = Library(b"out of memory", for_good=False)
    among = choice(library)
    with se_fused.use_backend("auto"):
        assert among.select(GPU).name == "reference"
        library.reason = None
        assert among.select(GPU).name == "cuda"


def test_a_gpu_that_it_runs_on_is_asked_once():
    library = Library()
    among = choice(library)
    with se_fused.use_backend("auto"):
        assert among.select(GPU).name == "cuda"
    cuda = among.backends["cuda"]
    assert cuda.limits(0) == LIMITS
    assert cuda.why_not(torch.device("cpu")) == "it runs on CUDA tensors; x is on cpu"
    assert library.asked == 1


def test_a_compiler_meets_the_first_call_that_falls_back():
    among = choice(Library(OLD_DRIVER.encode()))

    def which(x):
        return x + 1 if among.select(GPU).name == "reference" else x

    torch._dynamo.reset()
    with se_fused.use_backend("auto"):
        assert float(torch.compile(which, fullgraph=True, backend="eager")(torch.zeros(()))) == 1


def test_a_compiler_takes_the_answer_and_does_not_look_inside():
    among = choice(Library())

    def which(x):
        return x + 1 if among.select(GPU).name == "cuda" else x

    torch._dynamo.reset()
    compiled = torch.compile(which, fullgraph=True, backend="eager")
    with se_fused.use_backend("auto"):
        assert float(compiled(torch.zeros(()))) == 1


def test_a_compiled_region_follows_the_backend_that_is_forced():
    seen = []
    compiled = torch.compile(
        se_fused.SqueezeExcite(8), fullgraph=True, backend=lambda graph, _: seen.append(str(graph.graph)) or graph
    )
    x = torch.ones(1, 8, 3, 3)
    torch._dynamo.reset()
    with torch.no_grad():
        for name in ("auto", "cpu", "auto", "cpu"):
            with se_fused.use_backend(name):
                compiled(x)
    assert ["se_fused.squeeze_excite" in graph for graph in seen] == [False, True]


def test_the_library_knows_the_forced_plan_during_each_call():
    library = Library()
    cuda = Cuda(library)
    tensors = [torch.ones(1, 2, 3), None, None, torch.ones(2, 2), *[None] * 4]
    y = torch.empty(1, 2, 3)

    def run():
        cuda.forward_out(*tensors, *Options.of(), False, y, None, None, None)  # the dispatcher takes the CPU's kernels

    with se_fused.use_backend("cuda", "two_pass"):
        run()
    run()
    assert library.plans == [b"two_pass", b""]


RECORDED = (
    Case(dtype=torch.float64, residual="x"),
    Case(dtype=torch.float64, residual="map", options={"squeeze": "mean_max", "post_act": "silu"}),
    Case(dtype=torch.float64, r=None, bias=False, layout="channels_last"),
    Case(dtype=torch.float16, float_weights=True, residual="map"),
)


def recorded(case, backend):
    """y, what is saved for backward, and every gradient, by the operators of a program that was recorded elsewhere."""
    tensors = {key: t if t is None else t.requires_grad_() for key, t in case.tensors().items()}
    inputs = [tensors[key] for key in ("x", "w1", "b1", "w2", "b2", "residual")]
    vectors = torch.rand(2, case.c)
    options, watching = Options.of(**case.options), Watching(backend)
    with forcing.force(forcing.Forced("watching", watching)):
        y, *saved = torch.ops.se_fused.squeeze_excite_train(*inputs, *options)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        with torch.no_grad():
            inference = torch.ops.se_fused.squeeze_excite(*inputs, *vectors, *options)
            inputs[0] = inputs[0].detach().clone()
            torch.ops.se_fused.squeeze_excite_(*inputs, *vectors, *options)
    asked = ["why_not", "forward_out", "why_not", "backward_out"] + ["why_not", "forward_out"] * 2
    assert watching.asked == asked
    return [y, *saved, inference, inputs[0], *(t.grad for t in tensors.values() if t is not None)]


@pytest.mark.parametrize("case", RECORDED, ids=str)
def test_recorded_operators_run_on_the_reference(case):
    for ours, theirs in zip(recorded(case, REFERENCE), recorded(case, CPU), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("residual_is_x", [False, True])
@pytest.mark.parametrize("wanted", range(6))
def test_the_reference_gives_each_gradient_that_a_recorded_backward_asks_for(wanted, residual_is_x):
    case = Case(dtype=torch.float64, residual="x" if residual_is_x else "none")
    inputs, options = list(case.tensors().values()), Options.of()
    y, *saved = torch.ops.se_fused.squeeze_excite_train(*inputs, *options)
    needs = [i == wanted for i in range(6)]
    found = []
    for name in ("reference", "cpu"):
        with se_fused.use_backend(name), torch.inference_mode():
            args = (torch.ones_like(y), *inputs, *saved, *options, needs, residual_is_x)
            found.append(torch.ops.se_fused.squeeze_excite_backward(*args)[wanted])
    torch.testing.assert_close(*found)


def test_the_reference_runs_recorded_operators_under_saved_tensor_hooks():
    case = Case(dtype=torch.float64)
    with torch.autograd.graph.save_on_cpu():
        assert len(recorded(case, REFERENCE)) == len(recorded(case, CPU))


def test_importing_the_package_imports_no_compiler():
    code = "import sys, se_fused; print({'torch._dynamo', 'triton', 'rich', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
