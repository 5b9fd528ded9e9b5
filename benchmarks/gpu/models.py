"""Whole networks before and after se_fused.replace, inference and training: models_gpu.csv."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import se_fused
from examples import zoo

from . import calls
from .part import Part, Rows

FIELDS = (
    "model", "n", "layout", "dtype", "mode", "variant", "se_layers", "rounds", "p20_ms", "p50_ms", "p80_ms",
    "ratio_to_fused", "error", "error_of_original", "mhz_before", "mhz_after",
)  # fmt: skip
MODELS = ("mobilenetv3_large_100", "efficientnet_b0", "seresnet50", "regnety_016")
BATCHES = (1, 32, 128)
MODES = ("graph", "calls", "training")
ROUNDS, TRAINING_ROUNDS = 9, 7
SIDE = 224
LOSS_TOLERANCE = 2e-2  # of the first training step, relative: some roundings of bfloat16, 2^-8 each


def build(name: str) -> nn.Module:
    """Random weights from a fixed seed, with the batch norm statistics of a random batch, so that maps keep a scale."""
    torch.manual_seed(0)
    model = zoo.build(f"timm:{name}").eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        if norm.weight is not None and not norm.weight.any():
            nn.init.ones_(norm.weight)
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(torch.randn(8, 3, SIDE, SIDE))
    for norm in norms:
        norm.eval().momentum = 0.1
    return model


def training_step(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Forward in bfloat16 by autocast, loss, backward, and an SGD step in float32. A call returns the loss."""
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


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def measure(
    name: str, models: dict[str, nn.Module], se_layers: int, mode: str, n: int, part: Part
) -> list[dict[str, object]]:
    """The lines of one network, batch and mode, original and fused taking turns."""
    device = part.device
    dtype = torch.float32 if mode == "training" or device.type == "cpu" else torch.float16
    x = torch.randn(n, 3, SIDE, SIDE, device=device, generator=torch.Generator(device).manual_seed(n))
    x = x.contiguous(memory_format=torch.channels_last)
    placed = {
        variant: copy.deepcopy(model).to(device, memory_format=torch.channels_last) for variant, model in models.items()
    }
    errors = dict.fromkeys(models, "")
    if mode == "training":
        functions = {variant: [training_step(model, x)] for variant, model in placed.items()}
        losses = {variant: float(each[0]()) for variant, each in functions.items()}
        difference = abs(losses["fused"] / losses["original"] - 1)
        errors["fused"] = f"{difference:.1e}"
        if not difference <= LOSS_TOLERANCE:
            part.wrong(f"{name}, N = {n}: the first loss is {losses['fused']}, the original's {losses['original']}")
    else:
        with torch.no_grad():
            truth = placed["original"](x)
            x = x.to(dtype)
            outputs = {variant: model.to(dtype)(x) for variant, model in placed.items()}
        found = {variant: relative(y, truth) for variant, y in outputs.items()}
        errors = {variant: f"{value:.1e}" for variant, value in found.items()}
        # Both round in every layer, each in its own way: the fused one may not be further from float32 than that.
        if not found["fused"] <= 2 * found["original"] + 1e-4:
            part.wrong(f"{name}, N = {n}: off by {errors['fused']}, the original by {errors['original']}")
        functions = {variant: [lambda model=model: model(x)] for variant, model in placed.items()}  # type: ignore[misc]
    before = calls.clock_mhz()
    with torch.set_grad_enabled(mode == "training"):
        if mode == "graph":
            replays = {v: calls.Replay(f, 2, device) for v, f in functions.items()}
            times = calls.interleaved({v: replay.time for v, replay in replays.items()}, ROUNDS)
        else:
            rounds = TRAINING_ROUNDS if mode == "training" else ROUNDS
            times = calls.interleaved({v: calls.loop_timer(f, device, count=2) for v, f in functions.items()}, rounds)
    after = calls.clock_mhz()
    lines: list[dict[str, object]] = []
    for variant, values in times.items():
        p20, p50, p80 = (f"{value / 1e3:.4f}" for value in calls.spread(values))
        lines.append({
            "model": name, "n": n, "layout": "channels_last", "mode": mode, "variant": variant,
            "dtype": "bfloat16 autocast" if mode == "training" else str(dtype)[6:],
            "se_layers": se_layers, "rounds": len(values), "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
            "ratio_to_fused": f"{calls.ratio(times, variant, 'fused'):.3f}",
            "error": errors[variant], "error_of_original": errors["original"],
            "mhz_before": before, "mhz_after": after,
        })  # fmt: skip
    return lines


def main() -> None:
    part = Part(__doc__ or "")
    if importlib.util.find_spec("timm") is None:
        part.give_up("timm is not installed")
    torch.backends.cudnn.allow_tf32 = False  # for the float32 truth
    rows = Rows(part.out / "models_gpu.csv", FIELDS)
    batches = BATCHES if part.device.type == "cuda" else (1,)
    wanted = [(name, n, mode) for name in MODELS for n, mode in itertools.product(batches, MODES)]
    # Inference first, because a training step of a new network takes 10 s to set up; batches before latency.
    wanted.sort(key=lambda case: (case[2] == "training", case[2] == "training" and case[1] != 32, case[1] == 1))
    built: dict[str, tuple[dict[str, nn.Module], int]] = {}
    for _, (name, n, mode) in part.each(wanted, lambda case: f"{case[0]}, N = {case[1]}, {case[2]}"):
        if name not in built:
            original = build(name)
            report = se_fused.replace(copy.deepcopy(original))
            built[name] = {"original": original, "fused": report.model}, len(report.replaced)
            part.say(f"  {name}: {len(report.replaced)} SE layers replaced, {len(report.skipped)} left")
            if not report.replaced:
                part.wrong(f"{name}: no SE layer was replaced")
        lines = measure(name, *built[name], mode, n, part)
        rows.write(*lines)
        part.say("  " + ", ".join(f"{x['variant']} {x['p50_ms']} ms" for x in lines))
        calls.free(part.device)
    part.finish()


if __name__ == "__main__":
    main()
