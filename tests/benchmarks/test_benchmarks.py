"""The benchmarks time only right results and compute the right ratios from the times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from benchmarks import baselines, compiled, layer_cpu, networks, shapes, timing
from benchmarks.shapes import Shape
from benchmarks.timing import Variant
from examples import zoo

TINY = Shape(2, 12, 5, 7, r=3)


class FakeClock:
    """A clock on which time passes only in `work`."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def work(self, ns: int) -> Callable[[], None]:
        def call() -> None:
            self.now += ns

        return call


# Baselines.


@pytest.mark.parametrize("name", [*baselines.FUSED, *baselines.BASELINES])
def test_every_variant_computes_the_layer(name: str) -> None:
    inputs = baselines.draw(TINY, torch.float32, "contiguous")
    with torch.inference_mode():
        variant = baselines.forward(name, inputs, threads=1)
        for _ in range(2):  # a second call in place starts from x again
            baselines.check(variant, baselines.truth(inputs, gradients=False))


@pytest.mark.parametrize("name", ["fused", "fused_inplace", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", baselines.MEMORY_FORMATS)
def test_variants_of_every_format(name: str, dtype: torch.dtype, layout: str) -> None:
    inputs = baselines.draw(TINY, dtype, layout)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    assert inputs.x.is_contiguous(memory_format=formats[layout])
    with torch.inference_mode():
        baselines.check(baselines.forward(name, inputs, threads=1), baselines.truth(inputs, gradients=False))


@pytest.mark.parametrize("name", ["fused", "eager"])
@pytest.mark.parametrize("with_forward", [False, True])
def test_gradients(name: str, with_forward: bool) -> None:
    inputs = baselines.draw(TINY, torch.float32, "contiguous")
    variant = baselines.backward(name, inputs, with_forward=with_forward)
    for _ in range(2):  # the graph can be used again
        baselines.check(variant, baselines.truth(inputs, gradients=True))


def test_a_wrong_variant_is_rejected() -> None:
    inputs = baselines.draw(TINY, torch.float32, "contiguous")
    want = baselines.truth(inputs, gradients=False)
    y = want[0].float()
    never_written = Variant("idle", lambda: None, outputs=(torch.full_like(y, math.nan),))
    off_at_one_place = y.clone()
    off_at_one_place[1, 3, 2, 2] += 1e-4
    nearly = Variant("nearly", lambda: off_at_one_place)
    # The check notices a squeeze over the wrong map, because the channels differ in mean.
    other = baselines.draw(TINY, torch.float32, "contiguous", seed=1)
    w1, b1, w2, b2 = inputs.weights
    s = torch.sigmoid(torch.relu(other.x.mean((2, 3)) @ w1.T + b1) @ w2.T + b2)
    wrong_squeeze = Variant("wrong_squeeze", lambda: inputs.x * s[:, :, None, None])
    wrong_shape = Variant("wrong_shape", lambda: y[:1])
    for variant in (never_written, nearly, wrong_squeeze, wrong_shape):
        with pytest.raises(baselines.WrongResult, match=variant.name):
            baselines.check(variant, want)
    baselines.check(Variant("right", lambda: y), want)


def test_a_wrong_variant_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baselines.BASELINES, "eager", lambda inputs, threads: Variant("eager", inputs.x.clone))
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("timed"))
    contest = layer_cpu.Contest(TINY, "float32", "contiguous", "forward", ("fused", "eager"))
    with pytest.raises(baselines.WrongResult, match="eager"):
        layer_cpu.run_contest(contest, threads=1, until=0)


def test_calls_in_place_do_not_reach_denormals() -> None:
    inputs = baselines.draw(shapes.QUICK[0], torch.float32, "contiguous")
    with torch.inference_mode():
        variant = baselines.forward("fused_inplace", inputs, threads=1)
        for _ in range(timing.CALLS_BETWEEN_RESTORES):
            x = variant.call()
    assert isinstance(x, torch.Tensor)
    magnitude = x.abs()
    assert magnitude[magnitude > 0].min() > 1e-15 > torch.finfo(torch.float32).tiny


# Timing.


def test_rounds_are_interleaved_and_ratios_are_within_a_round() -> None:
    clock, order = FakeClock(), []
    speed = itertools.cycle([1, 1, 1, 5])  # now and then the machine slows down, for both

    def work(name: str, ns: int) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            clock.now += ns * slowness[0]

        return call

    slowness = [1]
    variants = [Variant("a", work("a", 6_000_000)), Variant("b", work("b", 12_000_000))]
    rests = itertools.count()

    def rest() -> None:
        if next(rests) % 2 == 0:
            slowness[0] = next(speed)

    times = timing.measure(variants, budget_s=1, clock=clock, rest=rest)
    assert len(times["a"]) == len(times["b"]) > timing.MIN_ROUNDS
    assert timing.ratio(times, "b", "a") == pytest.approx(2)
    assert timing.ratio(times, "a", "b") == pytest.approx(1 / 2)
    assert timing.spread(times["a"]).p50 == pytest.approx(6_000)
    assert max(times["a"]) == pytest.approx(30_000)
    # After the first calls of both, a round is two calls (one to warm up, one timed) of each variant.
    rounds = [order[i] for i in range(len(order) - 4 * len(times["a"]), len(order), 2)]
    assert all({first, second} == {"a", "b"} for first, second in zip(rounds[::2], rounds[1::2], strict=True))
    assert {"a", "b"} == set(rounds[::2])


def test_a_batch_lasts_and_the_budget_ends() -> None:
    clock = FakeClock()
    fast = Variant("fast", clock.work(1_000))
    assert timing.calls_per_batch(fast, clock) == timing.BATCH_NS // 1_000
    assert timing.calls_per_batch(Variant("slow", clock.work(10**9)), clock) == 1
    times = timing.measure([Variant("slow", clock.work(10**9))], budget_s=0, clock=clock, rest=lambda: None)
    assert times == {"slow": [1e6] * timing.MIN_ROUNDS}


def test_restoring_is_not_timed() -> None:
    clock = FakeClock()
    calls: list[str] = []

    def call() -> None:
        calls.append("call")
        clock.now += 100

    def restore() -> None:
        calls.append("restore")
        clock.now += 10**9

    assert timing.run_batch(Variant("x", call, restore=restore), 20, clock) == 20 * 100
    chunks = [len(list(group)) for key, group in itertools.groupby(calls) if key == "call"]
    assert chunks == [8, 8, 4]


def test_percentiles() -> None:
    assert timing.spread([float(t) for t in range(101)]) == (20, 50, 80)


def test_rest_ends_and_a_busy_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test has its own clock, because the machine decides whether a spinning thread gets a core."""
    now, busy = [0.0], [True]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(
        timing,
        "time",
        SimpleNamespace(sleep=sleep, monotonic=lambda: now[0], process_time=lambda: now[0] * busy[0]),
    )
    with pytest.raises(TimeoutError, match=r"still busy 0\.05 s"):
        timing.come_to_rest(limit_s=0.05)
    assert 0.05 < now[0] < 0.06
    busy[0] = False
    timing.come_to_rest(limit_s=0.05)
    assert now[0] < 0.06


# Networks.


def test_variants_compute_the_same_and_differ_in_what_they_call() -> None:
    model, x = zoo.build("timm:mobilenetv3_small_100").eval(), torch.randn(1, 3, 64, 64)
    variants = {variant: compiled.build_variant(model, variant) for variant in compiled.VARIANTS}
    variants["in place"] = networks.build_variant(model, "in place")
    with torch.no_grad():
        wanted = model(x)
        for variant, other in variants.items():
            # Wide, because the rounding of float32 piles up over a whole network.
            torch.testing.assert_close(other(x), wanted, rtol=1e-4, atol=1e-5)
            calls = sum(isinstance(module, compiled.Call) for module in other.modules())
            assert calls == (9 if variant in ("formula", "operator") else 0)


def test_a_wrong_network_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("timed"))
    model, x = torch.nn.ReLU(), torch.randn(2, 3)
    with pytest.raises(AssertionError, match="wrong"):
        networks.measure(model, x, {"right": lambda: x.relu(), "wrong": lambda: x}, seconds=0)
