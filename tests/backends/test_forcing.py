"""Which backend is forced where: blocks, threads, tasks, generators, backward, torch.compile."""

import asyncio
import contextvars
import os
import subprocess
import sys
import threading

import pytest
import torch
from cases import Case, call
from torch.utils.checkpoint import checkpoint
from watching import Watching

import se_fused
from se_fused import backends
from se_fused.backends import forcing


def name_here():
    return forcing.current().name


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_overlapping_blocks_of_use_backend_leave_nothing_behind(order):
    """Blocks that begin in one order and end in any: the latest that is open holds."""
    names = ("reference", "cpu", "auto")
    before = forcing.current().name
    blocks = [se_fused.use_backend(name) for name in names]
    for block, name in zip(blocks, names, strict=True):
        block.__enter__()
        assert forcing.current().name == name
    for k, i in enumerate(order):
        blocks[i].__exit__(None, None, None)
        still = [names[j] for j in range(3) if j not in order[: k + 1]]
        assert forcing.current().name == (still[-1] if still else before)


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start(), thread.join()
    return found[0]


def test_a_block_is_for_its_own_thread():
    here, there = Case().tensors(), forcing.current().name
    with se_fused.use_backend("reference"):
        assert se_fused.explain(**here).backend == "reference"
        assert in_a_thread(lambda: forcing.current().name) == there

        def overlapping():
            with se_fused.use_backend("cpu"):
                return se_fused.explain(**here).backend

        assert in_a_thread(overlapping) == "cpu"
        assert se_fused.explain(**here).backend == "reference"
    assert forcing.current().name == there


def test_a_block_is_for_its_own_task():
    async def ask(name, mine, other):
        with se_fused.use_backend(name):
            mine.set()
            await other.wait()
            return se_fused.explain(**Case().tensors()).backend

    async def both():
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(ask("reference", first, second), ask("cpu", second, first))

    assert asyncio.run(both()) == ["reference", "cpu"]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_call_asks_once_which_backend_serves_it(inplace):
    watching = Watching(backends.CPU)
    with forcing.force(forcing.Forced("watching", watching)), torch.no_grad():
        call(se_fused.squeeze_excite, Case().tensors(), {}, inplace=inplace)
    assert watching.asked == ["why_not", "forward_out"]


@pytest.mark.parametrize("thread", [False, True])
def test_backward_runs_on_the_backend_of_its_forward(thread):
    """Autograd runs the backward of CUDA tensors in threads of its own."""
    watching, tensors = Watching(backends.CPU), Case().tensors()
    tensors["x"].requires_grad_()
    with forcing.force(forcing.Forced("watching", watching)):
        y = call(se_fused.squeeze_excite, tensors, {})
    assert watching.asked == ["why_not", "forward_out"]
    in_a_thread(lambda: y.sum().backward()) if thread else y.sum().backward()
    assert watching.asked[2:] == ["why_not", "backward_out"]
    assert tensors["x"].grad.count_nonzero() > 0


def test_a_block_may_be_closed_in_another_thread():
    def opens():
        with se_fused.use_backend("reference"):
            yield

    before, generator = name_here(), opens()
    next(generator)
    assert name_here() == "reference"
    in_a_thread(generator.close)
    assert name_here() == before


def test_what_copies_the_context_takes_part_until_the_block_ends():
    async def late(release):
        await release.wait()
        return name_here()

    async def run():
        before, release = name_here(), asyncio.Event()
        with se_fused.use_backend("reference"):
            inside, child = await asyncio.to_thread(name_here), asyncio.create_task(late(release))
            await asyncio.sleep(0)
        release.set()
        return before, inside, await child

    before, inside, after = asyncio.run(run())
    assert inside == "reference"
    assert after == before


def test_a_backward_in_a_thread_of_autograd_finds_the_block():
    """For CUDA tensors autograd has threads of its own, whose context is empty."""
    found = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda g: found.append(contextvars.Context().run(name_here)))
    before = name_here()
    with se_fused.use_backend("reference"):
        x.sum().backward()
    x.sum().backward()
    assert found == ["reference", before]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_checkpoint_runs_forward_again_on_the_forced_backend(name):
    watching, layer = Watching(backends.ALL[name]), se_fused.SqueezeExcite(8)
    x = torch.ones(1, 8, 3, 3, requires_grad=True)
    with forcing.force(forcing.Forced("watching", watching)):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert [step for step in watching.asked if step != "why_not"] == ["forward_out", "forward_out", "backward_out"]


def test_a_compiled_region_trains_on_the_forced_backend():
    torch._dynamo.reset()
    watching, layer = Watching(backends.CPU), se_fused.SqueezeExcite(8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with forcing.force(forcing.Forced("watching", watching)):
        compiled(torch.ones(1, 8, 3, 3, requires_grad=True)).sum().backward()
    assert [step for step in watching.asked if step != "why_not"] == ["forward_out", "backward_out"]


def test_a_region_that_another_thread_compiles_does_not_see_the_block():
    torch._dynamo.reset()
    seen = []
    compiled = torch.compile(
        se_fused.SqueezeExcite(8), fullgraph=True, backend=lambda graph, _: seen.append(str(graph.graph)) or graph
    )

    def run():
        with torch.no_grad(), se_fused.use_backend("auto"):
            compiled(torch.ones(1, 8, 3, 3))
        return "se_fused.squeeze_excite" in seen[-1]

    with se_fused.use_backend("cuda"):  # which cannot run it
        assert not in_a_thread(run)


def test_triton_is_imported_by_the_first_call_that_is_compiled():
    pytest.importorskip("triton")
    code = (
        "import torch, se_fused; f = torch.compile(se_fused.SqueezeExcite(8), fullgraph=True, backend='eager')\n"
        "with torch.no_grad(), se_fused.use_backend('triton'): print(f(torch.ones(1, 8, 3, 3)).shape)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "torch.Size([1, 8, 3, 3])\n", done.stderr
