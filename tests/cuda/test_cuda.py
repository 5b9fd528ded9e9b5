"""The CUDA backend on a GPU, if there is one: numbers, bits, streams, graphs, devices, memory."""

import re
import subprocess
import sys
import threading

import pytest
import torch
from cases import LAYOUTS, Case, assert_close, call, truth

import se_fused
from benchmarks.shapes import GPU
from se_fused import backends, verify
from se_fused.cases import PRECISIONS, TOLERANCE, grid

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture(autouse=True, params=["", "two_pass"])
def backend(request):
    """Every test runs with the plan that the planner chooses, and with the one that handles every call."""
    with se_fused.use_backend("cuda", request.param):
        assert (reason := backends.CUDA.why_not(CUDA)) is None, reason
        yield request.param


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_grid_against_float64(precision):
    for seed, case in enumerate(grid()):
        if case.precision == precision:
            error, worst = verify.error(case, "cuda", seed)
            assert error <= TOLERANCE[case.dtype], (str(case), worst)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset", "every_second", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [shape for shape in GPU if shape.n == 1], ids=str)
def test_real_shapes(shape, dtype, layout):
    spatial = (shape.h, shape.w)
    gpu = Case(n=2, c=shape.c, r=shape.r, spatial=spatial, dtype=dtype, layout=layout).tensors(CUDA)
    with torch.no_grad():
        y = call(se_fused.squeeze_excite, gpu, {})
    assert_close(y, truth(gpu, {}), dtype)


def test_the_same_bits_on_every_run():
    gpu = Case(n=8, c=256, r=64, spatial=(14, 14), dtype=torch.float16).tensors(CUDA)
    runs = []
    for _ in range(5):
        leaves = {name: t if t is None else t.detach().requires_grad_() for name, t in gpu.items()}
        y = call(se_fused.squeeze_excite, leaves, {})
        runs.append([y, *torch.autograd.grad(y.sum(), [t for t in leaves.values() if t is not None])])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_a_graph_replays_on_new_data():
    gpu = Case(n=4, c=64, r=16, spatial=(14, 14)).tensors(CUDA)
    with torch.no_grad():
        call(se_fused.squeeze_excite, gpu, {})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(se_fused.squeeze_excite, gpu, {})
        for _ in range(3):
            gpu["x"].normal_()
            graph.replay()
            assert_close(y, truth(gpu, {}), torch.float32)


def test_threads_with_a_stream_and_a_shape_each():
    failures = []

    def work(seed):
        gpu = Case(n=3, c=96, r=24, spatial=(9, 9 + 16 * seed), seed=seed).tensors(CUDA)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            outputs = [call(se_fused.squeeze_excite, gpu, {}) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        try:
            for y in outputs:
                assert_close(y, truth(gpu, {}), torch.float32)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_in_place_allocates_nothing_of_the_size_of_the_map():
    gpu = Case(n=8, c=64, r=16, spatial=(56, 56)).tensors(CUDA)
    x = gpu["x"]
    with torch.no_grad():
        call(se_fused.squeeze_excite, gpu, {}, inplace=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(se_fused.squeeze_excite, gpu, {}, inplace=True)
    assert torch.cuda.max_memory_allocated() - before < x.nbytes / 8


def test_it_never_waits_for_the_gpu():
    gpu = Case(n=2, c=64, r=16, spatial=(14, 14)).tensors(CUDA)
    leaves = {name: t if t is None else t.detach().requires_grad_() for name, t in gpu.items()}
    call(se_fused.squeeze_excite, leaves, {}).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(se_fused.squeeze_excite, leaves, {}).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_than_the_current_device():
    gpu = Case().tensors(CUDA)
    there = {name: t if t is None else t.to("cuda:1") for name, t in gpu.items()}
    with torch.no_grad():
        y = call(se_fused.squeeze_excite, there, {})
    assert torch.cuda.current_device() == 0
    assert_close(y.cpu(), truth(gpu, {}).cpu(), torch.float32)


def test_explain_prints_the_plan(backend):
    gpu = Case().tensors(CUDA)
    text = str(se_fused.explain(*[gpu[name] for name in ("x", "w1", "b1", "w2", "b2")]))
    one_block = backends.CUDA.limits(0)[4] > 0 and not backend
    assert text.startswith("cuda: cluster forward" if one_block else "cuda: two_pass forward")
    assert re.search(r"predicted: \S+ us: \S+ starting launches, \S+ moving bytes or \S+ of instructions", text)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("threads", [256, 512])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_clusters_of_every_size(size, threads, layout, dtype):
    if backends.CUDA.limits(0)[4 + size.bit_length() - 1] == 0:
        pytest.skip(f"no clusters of {size} here")
    gpu = Case(n=5, c=256, r=12, spatial=(7, 7), dtype=dtype, layout=layout).tensors(CUDA)
    with se_fused.use_backend("cuda", f"cluster size={size} threads={threads}"), torch.no_grad():
        y = call(se_fused.squeeze_excite, gpu, {})
    assert_close(y, truth(gpu, {}), dtype)


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("spatial", [(7, 7), (9, 11)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_through_shared_memory(rows, spatial, dtype):
    gpu = Case(n=5, c=100, r=12, spatial=spatial, dtype=dtype).tensors(CUDA)
    with se_fused.use_backend("cuda", f"rows={rows}"), torch.no_grad():
        y = call(se_fused.squeeze_excite, gpu, {})
    assert_close(y, truth(gpu, {}), dtype)


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("less than 12 GiB free")
    n, c, side = 33, 64, 1024  # 2.2e9 elements, 4.4 GB
    x = torch.zeros(n, c, side, side, dtype=torch.float16, device="cuda")
    x[-1] = 1
    w = torch.ones(1, c, dtype=torch.float16, device="cuda") / c
    with torch.no_grad():
        se_fused.squeeze_excite(x, w, None, w.t().contiguous() * c, None, inplace=True)
    expected = torch.sigmoid(torch.ones(()))
    assert torch.allclose(x[-1].float().aminmax().max.cpu(), expected, atol=1e-3)
    assert torch.allclose(x[-1].float().aminmax().min.cpu(), expected, atol=1e-3)
    assert not x[:-1].any()


def test_layouts_reach_the_device_as_they_are():
    """A copy to the GPU packs a strided tensor, so tensors must be laid out on the GPU."""
    tensors = {layout: Case(layout=layout).tensors(CUDA)["x"] for layout in LAYOUTS}
    assert tensors["offset"].data_ptr() % 16 == 4
    assert not any(tensors[name].is_contiguous() for name in LAYOUTS if name not in ("contiguous", "offset"))


FRESH = """
import os, torch, se_fused
from se_fused import backends
assert not torch.cuda.is_initialized()
"""
CALL = """
torch.manual_seed(0)
m, x = se_fused.SqueezeExcite(64, 4).cuda().requires_grad_(False), torch.randn(3, 64, 7, 7, device="cuda")
"""
CHECK = """
wanted = se_fused.reference.squeeze_excite(x.double(), *(w.double() for w in (m.w1, m.b1, m.w2, m.b2)))
torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
assert backends.CUDA.why_not(x.device) is None
"""


@pytest.mark.parametrize(
    "program",
    [
        f"{FRESH}child = os.fork()\nif child == 0:{{}}\n    os._exit(0)\nassert os.waitpid(child, 0)[1] == 0",
        f"{FRESH}{CALL}g = torch.cuda.CUDAGraph()\nwith torch.cuda.graph(g):\n    y = m(x)\ng.replay()\n{CHECK}",
        f"{FRESH}{CALL}with se_fused.use_backend('cuda'):  # else the formula is compiled\n"
        f"    y = torch.compile(m, fullgraph=True, backend='aot_eager')(x)\n{CHECK}",
        f"{FRESH}x = torch.nn.Sequential(m := se_fused.SqueezeExcite(64)); r = se_fused.replace(x.cuda()); print(r)",
    ],
    ids=["after a fork", "in a capture", "in a compiler", "in replace"],
)
def test_the_first_call_of_a_process(program, backend):
    if backend:
        pytest.skip("the plan is not what is asked")
    program = program.replace("{}", "\n    ".join(["", *f"{CALL}y = m(x)\n{CHECK}".splitlines()]))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
