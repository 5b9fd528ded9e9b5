"""The memory of `replace(model, level="block")`: no more than the original's, and no map for a fold."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from peak_memory import ENVIRONMENT, NOISE, can_measure, peak_of
from se_blocks import C, Inverted, drawn
from torch import Tensor, nn

from examples import zoo
from se_fused import replace
from se_fused.backends import CPU
from se_fused.blocks import fused
from se_fused.blocks.cost import WAYS
from se_fused.weights import WeightReader

pytestmark = pytest.mark.skipif(not can_measure(), reason="the peak memory of a process cannot be measured here")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Narrow(Inverted):
    """Its result is an eighth of the map that is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.bn2 = nn.Conv2d(C, C // 8, 1), nn.BatchNorm2d(C // 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.project(self.se(self.act(self.bn1(self.conv(x))))))


def begin() -> None:
    """Begin the process that is forked for each call."""
    torch.set_num_threads(1)
    zoo.build("timm:lcnet_050")  # imports what all networks need


def forked(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args).result()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process whose memory can be measured. Each call has a new one: what others have left in the
    heap would count. They are forks of one process: to import torch and timm takes 5 s."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin) as pool:
            yield lambda function, *args: pool.submit(forked, function, *args).result()


def of_a_sum(maps: int) -> tuple[int, int]:
    x = torch.zeros(2**21)
    return peak_of(lambda: sum([x + i for i in range(maps)])), x.nbytes


def test_the_measure(elsewhere: Callable[..., Any]) -> None:
    for maps in (1, 2, 5):
        peak, size = elsewhere(of_a_sum, maps)
        assert abs(peak - (maps + min(maps, 2)) * size) <= NOISE


def of_a_fold(n: int, layout: str, way: str | None) -> tuple[int, int]:
    model = drawn(Narrow())
    ((neighbours,),) = replace(model, level="block").blocks.values()
    weights = WeightReader(model.get_submodule(neighbours.layer), neighbours.recognised)
    run = fused.bind(
        neighbours, model, fused.How(CPU.unchecked, {(neighbours.layer, neighbours.recognised): weights}, way)
    )
    u = torch.randn(n, C, 512, 512).contiguous(memory_format=LAYOUTS[layout])
    with torch.inference_mode():
        return peak_of(lambda: run(u)), u.nbytes


@pytest.mark.parametrize(
    ("layout", "way"),
    [*(("contiguous", way) for way in WAYS), ("channels_last", "convolution"), ("channels_last", None)],
)
@pytest.mark.parametrize("n", [1, 2])
def test_a_convolution_allocates_its_result_alone(
    n: int, layout: str, way: str | None, elsewhere: Callable[..., Any]
) -> None:
    peak, size = elsewhere(of_a_fold, n, layout, way)
    assert abs(peak - size / 8) <= NOISE


def of_a_network(name: str) -> tuple[int, int]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 160, 160)
    model = zoo.settled(zoo.build(name), x)
    with torch.inference_mode():
        original = peak_of(lambda: model(x))
        assert len(replace(model, level="block").blocks) > 0
        return original, peak_of(lambda: model(x))


@pytest.mark.parametrize(
    "name", ["timm:efficientnet_b0", "timm:seresnet18", "timm:regnety_002", "torchvision:mobilenet_v3_small"]
)
def test_a_network_needs_no_more(name: str, elsewhere: Callable[..., Any]) -> None:
    original, block = elsewhere(of_a_network, name)
    assert 0 < block <= original + NOISE
