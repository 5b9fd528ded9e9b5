"""Small networks trained on scikit-learn's 1,797 handwritten digits, with the reference and with the fused SE layer.

Each experiment has three runs, which take their steps in turn and see the same batches. Two start from the same
weights, with the reference layer and with the fused one; the control has the reference layer and starts from weights
one rounding step away. Training magnifies rounding: the control shows by how much, and so what difference the fused
layer may make.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from examples.se_inception import SEInception
from examples.se_resnet import ReferenceSqueezeExcite, SEResNet
from se_fused import SqueezeExcite

SEED = 0
BATCH = 64
NETWORKS: dict[str, Callable[..., nn.Module]] = {"SE-ResNet": SEResNet, "SE-Inception": SEInception}
EXPERIMENTS = (("SE-ResNet", "mean"), ("SE-ResNet", "max"), ("SE-Inception", "mean"))
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "reference": ReferenceSqueezeExcite,
    "fused": SqueezeExcite,
    "control": ReferenceSqueezeExcite,
}


@dataclass
class Run:
    """One network in training, with its losses and times so far."""

    network: str
    squeeze: str
    layer: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def __str__(self) -> str:
        return f"{self.network}, squeeze = {self.squeeze}"

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.losses.append(loss.item())


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1347, 1, 8, 8] in 0..1 and their labels, test images [450, 1, 8, 8] and theirs."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=SEED)
    train_images, test_images = (torch.tensor(p, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for p in parts[:2])
    return train_images, torch.tensor(parts[2]), test_images, torch.tensor(parts[3])


def batches(count: int, epochs: int) -> list[Tensor]:
    """For each step the indices [BATCH] of its images, out of `count`; every epoch has an order of its own."""
    generator = torch.Generator().manual_seed(SEED)
    # Only whole batches, because batch norm on the three images left over would make the loss jump.
    whole = count // BATCH * BATCH
    return [b for _ in range(epochs) for b in torch.randperm(count, generator=generator)[:whole].split(BATCH)]


def _start(network: str, squeeze: str, layer: str, steps: int) -> Run:
    torch.manual_seed(SEED)
    model = NETWORKS[network](partial(LAYERS[layer], reduction=4, squeeze=squeeze))
    if layer == "control":
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    return Run(network, squeeze, layer, model, optimizer, schedule)


def train(epochs: int, console: Console) -> list[Run]:
    """Train all runs of all experiments, in the order of EXPERIMENTS and LAYERS, and test them on held-back digits."""
    images, labels, test_images, test_labels = digits()
    steps = batches(len(images), epochs)
    runs = [_start(*experiment, layer, len(steps)) for experiment in EXPERIMENTS for layer in LAYERS]
    # On maps this small a second thread gains a tenth (16 instead of 18 ms per step). Beside any other process it loses
    # more than that, because the two threads wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Automatic refresh would run in a thread of its own, on the cores that are measured.
        for i, batch in enumerate(track(steps, "training on digits", console=console, auto_refresh=False)):
            # The run that comes second finds a warmer cache, so the order is reversed from step to step.
            for run in runs if i % 2 == 0 else reversed(runs):
                run.step(images[batch], labels[batch])
    finally:
        torch.set_num_threads(threads)
    for run in runs:
        run.model.eval()
        with torch.inference_mode():
            run.accuracy = (run.model(test_images).argmax(1) == test_labels).float().mean().item()
    return runs


def _experiments(runs: list[Run]) -> list[tuple[Run, Run, Run]]:
    return list(zip(runs[0::3], runs[1::3], runs[2::3], strict=True))


def table(runs: list[Run]) -> Table:
    result = Table(
        title=f"Handwritten digits: {len(runs[0].losses)} training steps, 450 test images, one thread, seed {SEED}",
        caption="control: the reference again, from weights one rounding step away",
    )
    for column in ("network", "squeeze", "SE layer"):
        result.add_column(column)
    for column in ("accuracy", "last loss", "ms per step"):
        result.add_column(column, justify="right")
    for experiment in _experiments(runs):
        for run in experiment:
            result.add_row(
                run.network, run.squeeze, run.layer,
                f"{run.accuracy:.2%}", f"{run.losses[-1]:.5f}", f"{1e3 * median(run.seconds):.2f}",
            )  # fmt: skip
        result.add_section()
    return result


def plot_losses(runs: list[Run], path: Path) -> None:
    """Plot the losses with both layers, and below them how far they and the control are apart."""
    experiments = _experiments(runs)
    figure, axes = plt.subplots(
        2, len(experiments), figsize=(4.5 * len(experiments), 6), sharex=True, sharey="row",
        height_ratios=(3, 2), squeeze=False, layout="constrained",
    )  # fmt: skip
    for (reference, fused, control), (above, below) in zip(experiments, axes.T, strict=True):
        above.plot(reference.losses, color="tab:orange", linewidth=4, alpha=0.5, label=_legend(reference))
        above.plot(fused.losses, color="tab:blue", linewidth=1, label=_legend(fused))
        above.set(title=str(reference), yscale="log")
        above.legend(loc="upper right")
        for run, color in ((control, "silver"), (fused, "tab:blue")):
            difference = [abs(a - b) for a, b in zip(reference.losses, run.losses, strict=True)]
            below.plot(difference, color=color, linewidth=1, label=run.layer)
        below.set(xlabel="training step")
        below.set_yscale("symlog", linthresh=1e-8)  # the difference may be exactly zero
        below.legend(loc="lower right")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("|difference|\nfrom the reference")
    figure.suptitle(
        "Digits: one network trained with the reference and with the fused SE layer\n"
        "control: the reference from weights one rounding step away"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _legend(run: Run) -> str:
    return f"{run.layer}: {run.accuracy:.2%} on test"


def gate(layer: SqueezeExcite, x: Tensor) -> Tensor:
    """s [N, C] by the layer's formula, because the fused call does not return it."""
    u = F.relu(x) if layer.pre_act == "relu" else x
    z = u.mean((2, 3)) if layer.squeeze == "mean" else u.amax((2, 3))
    h = F.relu(F.linear(z, layer.w1, layer.b1))
    return torch.sigmoid(F.linear(h, layer.w2, layer.b2))


def gates(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The gates s [N, C] of each SE layer of `model`, from the first to the last."""
    found: list[Tensor] = []

    def record(layer: SqueezeExcite, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        found.append(gate(layer, inputs[0]))

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, SqueezeExcite)]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def by_digit(s: Tensor, labels: Tensor) -> Tensor:
    """Gates [N, C] averaged over the images of each digit, [10, C]; or other numbers that images have."""
    return torch.stack([s[labels == digit].mean(0) for digit in range(10)])


def recognised(s: Tensor, labels: Tensor, means: Tensor) -> float:
    """The share of images whose gates s [N, C] are nearest, of all `means` [10, C], to those of their own digit."""
    return (torch.cdist(s, means).argmin(1) == labels).float().mean().item()


def plot_gates(run: Run, path: Path) -> None:
    """Plot how far each digit opens every channel of every SE layer, as figure 5 of the paper does for ImageNet.

    The test digits are drawn, but the training digits order the channels: sorted by themselves, even random numbers
    would show a diagonal. An image is recognised by the nearest mean gates of the training digits.
    """
    images, labels, test_images, test_labels = digits()
    layers = list(zip(gates(run.model, images), gates(run.model, test_images), strict=True))
    drawn = [by_digit(test, test_labels) for _, test in layers]
    changes = [means - means.mean(0) for means in drawn]
    limit = max(float(change.abs().max()) for change in changes)

    figure = plt.figure(figsize=(13, 8.5), layout="constrained")
    *first, last = range(len(layers))
    named = figure.subplot_mosaic([[last] * len(first), first], height_ratios=(5, 2))
    axes = [named[i] for i in range(len(layers))]
    for i, ((train, test), change, axis) in enumerate(zip(layers, changes, axes, strict=True)):
        means = by_digit(train, labels)
        strength, owner = (means - means.mean(0)).max(0)
        order = sorted(range(len(owner)), key=lambda c: (owner[c], -strength[c]))
        picture = axis.imshow(change[:, order].numpy(), vmin=-limit, vmax=limit, cmap="RdBu_r", aspect="auto")
        counts = torch.bincount(owner, minlength=10)
        for digit, (count, end) in enumerate(zip(counts.tolist(), counts.cumsum(0).tolist(), strict=True)):
            if count:
                axis.add_patch(Rectangle((end - count - 0.5, digit - 0.5), count, 1, fill=False, linewidth=1.5))
        share = recognised(test, test_labels, means)
        axis.set_title(f"SE layer {i + 1}: by its gates alone {share:.0%} of the digits are recognised", fontsize=12)
        axis.set(xlabel=f"{len(owner)} channels, by the digit that opens them most (box)", xticks=[], yticks=range(10))
        axis.tick_params(left=False, labelsize=13 if i == last else 7)

    axes[last].tick_params(pad=36)
    beside = {"xycoords": axes[last].get_yaxis_transform(), "xybox": (-20, 0), "boxcoords": "offset points"}
    for digit, pixels in enumerate(by_digit(test_images.flatten(1), test_labels).unflatten(1, (8, 8))):
        image = OffsetImage(pixels.numpy(), zoom=3.2, cmap="gray_r")
        axes[last].add_artist(AnnotationBbox(image, (0, digit), pad=0, frameon=False, **beside))
    figure.colorbar(picture, ax=axes, label="mean gate of the digit - mean gate of all digits", pad=0.01, aspect=40)
    figure.suptitle(
        "What trained SE gates do: a digit opens channels of its own (red) and closes others (blue)\n"
        f"{run}: means over {len(test_labels)} test digits, channels ordered by the training digits",
        fontsize=15,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
