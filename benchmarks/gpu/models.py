"""Whole networks before and after se_fused.replace: models_gpu.csv. Level "block" is for inference only."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import se_fused
from examples import zoo
from se_fused.measure import largest_difference
from se_fused.timing import Times, ratio, spread

from . import calls
from .worker import Rows, Worker, run_part

FIELDS = (
    "model", "n", "layout", "dtype", "mode", "variant", "se_layers", "rounds", "p20_ms", "p50_ms", "p80_ms",
    "ratio_to_fused", "error", "mhz_before", "mhz_after",
)  # fmt: skip
MODELS = ("mobilenetv3_large_100", "efficientnet_b0", "seresnet50", "regnety_016")
BATCHES = (32, 128, 1)  # batches before latency
ROUNDS, TRAINING_ROUNDS = 9, 7
SIDE = 224
GRADIENT_TOLERANCE = 1e-12  # seen on an H200: 4.5e-14


class ExactHardSigmoid(TorchFunctionMode):
    """A mode in which `F.hardsigmoid` multiplies by an exact 1/6.

    PyTorch multiplies by the float32 nearest to 1/6, even in float64. This moves every gate by 3e-8, and a ReLU that it
    moves across 0 changes a network's gradients by 5e-4.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            return F.relu6((args[0] if args else kwargs["input"]) + 3) / 6
        return func(*args, **(kwargs or {}))


def training_step(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A training step: forward in bfloat16 by autocast, loss, backward, SGD in float32. A call returns the loss."""
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    target = torch.arange(len(x), device=x.device) % 10

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


@dataclasses.dataclass(frozen=True)
class Network:
    """A network before and after `replace`, at both levels, on the CPU; `layers`: the names of its SE layers."""

    name: str
    models: dict[str, nn.Module]
    layers: tuple[str, ...]
    blocks: int

    def on(self, device: torch.device, *variants: str) -> dict[str, nn.Module]:
        """Copies of these, or of all."""
        return {
            variant: copy.deepcopy(model).to(device, memory_format=torch.channels_last)
            for variant, model in self.models.items()
            if variant in variants or not variants
        }

    def gradients(self, variant: str, model: nn.Module, x: Tensor) -> Tensor:
        """The gradients of the SE layers' parameters in one vector, in float64 and eval mode. In float32 two correct
        networks differ by up to 2 % of the norm, because a rounding can move a value across 0 of a ReLU."""
        model, x = model.double().eval(), x.double()
        inside = tuple(f"{layer}." for layer in self.layers)
        parameters = [p for name, p in model.named_parameters() if name.startswith(inside)]
        # The fused network runs without a mode, because under one its layers would not take a user's code path.
        with ExactHardSigmoid() if variant == "original" else contextlib.nullcontext():
            found = torch.autograd.grad(model(x).square().mean(), parameters)
        return torch.cat([gradient.flatten() for gradient in found])


def network(name: str) -> Network:
    torch.manual_seed(0)
    original = zoo.settled(zoo.build(f"timm:{name}"), torch.randn(8, 3, SIDE, SIDE))
    report = se_fused.replace(copy.deepcopy(original))
    at_block = se_fused.replace(copy.deepcopy(original), level="block")
    models = {"original": original, "fused": report.model, "block": at_block.model}
    return Network(name, models, tuple(report.replaced), len(at_block.blocks))


def infer(network: Network, mode: str, x: Tensor, worker: Worker) -> tuple[Times, dict[str, str]]:
    """Times, and errors against the original in float32. In mode "graph" the errors are of the timed outputs."""
    placed = network.on(x.device)
    with torch.no_grad():
        truth = placed["original"](x)
        x = x.to(torch.float16 if x.is_cuda else torch.float32)
        functions = {v: [partial(model.to(x.dtype), x)] for v, model in placed.items()}
        if mode == "graph":
            replays = {v: calls.Replay(f, 2, x.device) for v, f in functions.items()}
            times = calls.interleaved({v: replay.time for v, replay in replays.items()}, ROUNDS)
            outputs = {v: replay.results[0] for v, replay in replays.items()}
        else:
            times = calls.interleaved({v: calls.loop_timer(f, x.device, count=3) for v, f in functions.items()}, ROUNDS)
            outputs = {v: f[0]() for v, f in functions.items()}
    largest = float(truth.abs().max())
    found = {v: largest_difference(y, truth) / largest for v, y in outputs.items() if isinstance(y, Tensor)}
    # All networks round in every layer, but differently. A replaced one may have twice the original's error.
    for v, error in found.items():
        if not error <= 2 * found["original"] + 1e-4:
            where, wanted = f"{network.name}, N = {len(x)}", f"the original by {found['original']:.1e}"
            worker.wrong(f"{where}: {v} is off by {error:.1e}, {wanted}")
    return times, {v: f"{error:.1e}" for v, error in found.items()}


def train(network: Network, x: Tensor, worker: Worker) -> tuple[Times, dict[str, str]]:
    """Times of a step, and the difference of the SE layers' gradients relative to their norm."""
    variants = "original", "fused"
    wanted, got = (network.gradients(v, model, x[:2]) for v, model in network.on(x.device, *variants).items())
    difference = float((got - wanted).norm() / wanted.norm())
    if not difference <= GRADIENT_TOLERANCE:
        worker.wrong(f"{network.name}, N = {len(x)}: the SE layers' gradients differ by {difference:.1e} of their norm")
    steps = {v: training_step(model, x) for v, model in network.on(x.device, *variants).items()}
    timers = {v: calls.loop_timer([step], x.device, count=2) for v, step in steps.items()}
    return calls.interleaved(timers, TRAINING_ROUNDS), {"original": "", "fused": f"{difference:.1e}"}


def measure(network: Network, mode: str, n: int, worker: Worker) -> list[dict[str, object]]:
    """Time one network, batch and mode, the variants in turns, and return the lines."""
    x = torch.randn(n, 3, SIDE, SIDE, device=worker.device, generator=torch.Generator(worker.device).manual_seed(n))
    x = x.contiguous(memory_format=torch.channels_last)
    before = calls.clock_mhz()
    times, errors = train(network, x, worker) if mode == "training" else infer(network, mode, x, worker)
    after = calls.clock_mhz()
    inference = "float16" if worker.device.type == "cuda" else "float32"
    lines: list[dict[str, object]] = []
    for variant, values in times.items():
        p20, p50, p80 = (f"{value / 1e3:.4f}" for value in spread(values))
        lines.append({
            "model": network.name, "n": n, "layout": "channels_last", "mode": mode, "variant": variant,
            "dtype": "bfloat16 autocast" if mode == "training" else inference, "se_layers": len(network.layers),
            "rounds": len(values), "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
            "ratio_to_fused": f"{ratio(times, variant, 'fused'):.3f}",
            "error": errors[variant], "mhz_before": before, "mhz_after": after,
        })  # fmt: skip
    return lines


def main() -> None:
    worker = Worker(__doc__ or "")
    for name in ("timm", "torchvision"):  # timm imports torchvision
        if importlib.util.find_spec(name) is None:
            worker.give_up(f"{name} is not installed")
    torch.backends.cudnn.allow_tf32 = False  # because the truth is in float32
    rows = Rows(worker.out / "models_gpu.csv", FIELDS)
    batches = BATCHES if worker.device.type == "cuda" else (1,)
    # Inference comes first, because the first training step of a network takes seconds.
    wanted = [
        (name, n, mode)
        for modes in (("graph", "calls"), ("training",))
        for n, name, mode in itertools.product(batches, MODELS, modes)
    ]
    built: dict[str, Network] = {}
    for _, (name, n, mode) in worker.each(wanted, lambda case: f"{case[0]}, N = {case[1]}, {case[2]}"):
        if name not in built:
            built[name] = network(name)
            worker.say(f"  {name}: {len(built[name].layers)} SE layers replaced")
            if not (built[name].layers and built[name].blocks):
                worker.wrong(f"{name}: no SE layer or no block was replaced")
        try:
            lines = measure(built[name], mode, n, worker)
        except torch.OutOfMemoryError as error:
            worker.skip(error)
            continue
        rows.write(*lines)
        worker.say("  " + ", ".join(f"{x['variant']} {x['p50_ms']} ms" for x in lines))
        calls.free(worker.device)
    worker.finish()


if __name__ == "__main__":
    run_part(main)
