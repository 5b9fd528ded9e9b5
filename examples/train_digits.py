"""Trains the digits' SE-ResNet in several processes, and shows that they compute what one process computes.

    torchrun --nproc-per-node 2 -m examples.train_digits --strategy fsdp2

Each process takes its part of every batch; DDP or FSDP2 averages the gradients. FSDP2 also divides the weights among
the processes, and gathers those of a block while it computes. Then every process trains the network once more, alone,
on whole batches. If losses or weights differ by more than rounding, the exit status is 1. Both runs are in float64,
which leaves no doubt what is rounding.

The norms are group norms. A batch norm takes the statistics of the images that its process has, so that N processes
would train another network than one. SyncBatchNorm takes those of the whole batch, but runs on GPUs only.
"""

from __future__ import annotations

import os
from enum import Enum
from functools import partial
from statistics import mean
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from examples.demo_digits import BATCH, SEED, batches, digits
from examples.se_resnet import SEResNet
from se_fused import SqueezeExcite
from se_fused.measure import largest_difference

NORM = partial(nn.GroupNorm, 4)
# Of two processes on a CPU, 168 steps: weights up to 1.3 differ by 9e-16. One rounding to float32 would give 1e-7.
ALLOWED = 1e-12


class Strategy(str, Enum):
    ddp = "ddp"
    fsdp2 = "fsdp2"


def network(device: torch.device) -> SEResNet:
    torch.manual_seed(SEED)  # FSDP2 sends no weights around: every process starts from the same ones
    return SEResNet(partial(SqueezeExcite, reduction=4), norm=NORM).to(device, torch.float64)


def distribute(model: SEResNet, strategy: Strategy) -> nn.Module:
    if strategy is Strategy.ddp:
        return DistributedDataParallel(model)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)  # what the blocks do not hold


def share(batch: Tensor, rank: int, world: int) -> Tensor:
    """The part [B / world] of a batch [B] that process `rank` computes."""
    return batch[rank::world]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rank: int = 0, world: int = 1) -> list[float]:
    """Train on this process's part of each batch; the loss of every step, averaged over all processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    losses = []
    for batch in batches(len(images), epochs):
        part = share(batch, rank, world)
        loss = F.cross_entropy(model(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def main(
    strategy: Annotated[Strategy, typer.Option(help="How the processes share the work.")] = Strategy.ddp,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the digits.")] = 8,
) -> None:
    """Train on handwritten digits in the processes that torchrun starts, and compare with one process."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if BATCH % world:
        raise typer.BadParameter(f"{world} processes cannot share a batch of {BATCH} images equally")
    images, labels, test_images, test_labels = (
        part.to(device, torch.float64 if part.is_floating_point() else None) for part in digits()
    )
    model = distribute(network(device), strategy)
    losses = train(model, images, labels, epochs, rank, world)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))

    # In every process, not only in the first: nobody has to wait, and no copy of the weights goes unchecked.
    alone = network(device)
    loss_difference = max(abs(a - b) for a, b in zip(losses, train(alone, images, labels, epochs), strict=True))
    weight_difference = max(largest_difference(weights[name], wanted) for name, wanted in alone.state_dict().items())

    alone.load_state_dict(weights)  # the gathered weights are a checkpoint for one process
    with torch.inference_mode():
        accuracy = (alone(test_images).argmax(1) == test_labels).double().mean().item()
    if rank == 0:
        steps = len(losses) // epochs
        for epoch in range(epochs):
            print(f"epoch {epoch + 1}: loss {mean(losses[epoch * steps : (epoch + 1) * steps]):.5f}")
        print(f"{accuracy:.2%} of {len(test_labels)} test digits are right")
        print(f"{strategy.value}, {world} processes on {device.type}, compared with one process:")
        print(f"largest difference of a loss {loss_difference:.1e}, of a weight {weight_difference:.1e}")
        print(f"allowed: {ALLOWED:.0e}")
    dist.destroy_process_group()
    if not max(loss_difference, weight_difference) <= ALLOWED:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
