"""The benchmarks time only right results and compute the right ratios from the times."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from benchmarks import baselines, compiled, layer_cpu, networks, shapes, training
from benchmarks.shapes import Shape
from examples import zoo
from se_fused import timing
from se_fused.timing import Variant

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


@pytest.mark.parametrize("name", [*baselines.FUSED, *baselines.BASELINES, *baselines.OF_A_CALL])
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

    found = timing.measure(variants, budget_s=1, clock=clock, rest=rest, others=lambda: 0.01)
    times = found.times
    assert (found.others, found.dropped) == (0.01, 0)
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
    calls = timing.BATCH_NS // 1_000
    assert timing.batch(fast, clock) == (calls // timing.WARM_UP, calls)
    assert timing.batch(Variant("one", clock.work(2 * timing.BATCH_NS)), clock) == (1, 1)
    slow = Variant("slow", clock.work(10**9))
    assert timing.batch(slow, clock) == (0, 1)
    found = timing.measure([slow], budget_s=0, clock=clock, rest=lambda: None, others=lambda: 0.0)
    assert found.times == {"slow": [1e6] * timing.MIN_ROUNDS}


def test_rounds_beside_other_processes_do_not_count() -> None:
    """Windows of one round take turns: in every second one others use the CPU, and calls take three times as long."""
    clock = FakeClock()
    shares, share, done = itertools.cycle([0.2, 0.01]), [0.0], []

    def others() -> float:
        now, share[0] = share[0], next(shares) if len(done) % 2 == 0 else share[0]
        done.append(None)
        return now

    def call() -> None:
        clock.now += 10**9 * (3 if share[0] > timing.QUIET else 1)

    variant = Variant("a", call)
    found = timing.measure([variant], budget_s=20, clock=clock, rest=lambda: None, others=others)
    assert set(found.times["a"]) == {1e6}
    assert found.others == 0.01
    assert found.dropped >= timing.MIN_ROUNDS
    all_count = timing.measure([variant], 20, limit=1, clock=clock, rest=lambda: None, others=others)
    assert set(all_count.times["a"]) == {1e6, 3e6}
    assert (all_count.others, all_count.dropped) == (0.2, 0)


def test_a_busy_machine_is_refused() -> None:
    clock = FakeClock()
    start = clock.now
    with pytest.raises(timing.BusyMachine, match="other processes use 50% of the CPU; at most 5%"):
        timing.measure(
            [Variant("a", clock.work(10**9))], budget_s=5, clock=clock, rest=lambda: None, others=lambda: 0.5
        )
    assert clock.now - start < 2 * timing.PATIENCE * 5 * 10**9


def test_the_share_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores for 10 s, of which other processes, one of them ended, use 3 s and another virtual machine 0.5 s."""
    now, steal = [100.0], [5.0]
    times = {1: [1.0, 2.0, 0.0, 0.0], 2: [7.0, 0.0, 0.0, 0.0], os.getpid(): [50.0, 1.0, 9.0, 9.0]}
    kinds = ("user", "system", "children_user", "children_system")

    def process_iter(names: list[str]) -> list[SimpleNamespace]:
        read = {pid: SimpleNamespace(**dict(zip(kinds, each, strict=True))) for pid, each in times.items()}
        return [SimpleNamespace(pid=pid, info={"cpu_times": read[pid]}) for pid in times] + [
            SimpleNamespace(pid=3, info={"cpu_times": None})
        ]

    monkeypatch.setattr("psutil.process_iter", process_iter)
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    monkeypatch.setattr("psutil.cpu_times", lambda: SimpleNamespace(steal=steal[0]))
    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    others = timing.Others(mine=[4])
    del times[2]
    times[4] = [5.0, 5.0, 5.0, 5.0]
    times[1] = [2.0, 3.0, 8.0, 0.0]  # 2 s more, and process 2, which used another second before it ended
    times[os.getpid()] = [69.0, 1.0, 9.0, 9.0]
    now[0], steal[0] = 110.0, 5.5
    assert others() == pytest.approx((2 + 1 + 0.5) / 20)
    assert others() == 0


def test_progress_is_told() -> None:
    clock, told = FakeClock(), []
    slow = Variant("slow", clock.work(10**9))
    timing.measure([slow], 8, clock=clock, rest=lambda: None, others=lambda: 0.0, progress=told.append)
    assert told == sorted(told)
    assert 0 < told[0] < told[-1] == 1


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


@pytest.mark.parametrize(
    ("found", "rounds", "text"),
    [
        ((1.2345, 1.2345, 1.2345), 5, "1.23 (1.23 to 1.23)"),
        ((1.1, 1.234, 1.3), 400, "1.23 (1.10 to 1.30)"),
        ((1.1, 1.234, 1.5), 9, "1.2 (1.10 to 1.50)"),
        ((1.01, 1.044, 1.14), 6, "1.04 (1.01 to 1.14)"),
        ((0.4, 0.974, 2.6), 5, "0.97 (0.400 to 2.600)"),
        ((11_800, 12_953, 13_100), 9, "13,000 (11,800 to 13,100)"),
        ((0.0, 0.0, 0.0), 5, "0.00000000000 (0.00000000000 to 0.00000000000)"),
    ],
)
def test_a_median_has_the_digits_that_its_spread_allows(found: tuple[float, ...], rounds: int, text: str) -> None:
    p20, p50, p80 = found
    assert timing.text(timing.Spread(p20, p50, p80), rounds) == text


# Networks.


@pytest.mark.usefixtures("known_layers")
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
    monkeypatch.setattr(networks.timing, "measure", lambda *_: pytest.fail("timed"))
    model, x = torch.nn.ReLU(), torch.randn(2, 3)
    with pytest.raises(AssertionError, match="wrong"):
        networks.measure(model, x, {"right": lambda: x.relu(), "wrong": lambda: x}, seconds=0)


def test_a_wrong_gradient_is_not_timed() -> None:
    model, x = zoo.build("timm:mobilenetv3_small_050").train(), torch.randn(2, 3, 64, 64)
    labels = torch.randint(1000, (2,))
    training.check(networks.build_variant(model, "replaced"), model, x, labels)
    other = networks.build_variant(model, "original")
    next(other.parameters()).data.mul_(1.5)
    with pytest.raises(AssertionError, match="conv_stem"):
        training.check(other, model, x, labels)


def test_a_step_trains() -> None:
    model, x = torch.nn.Linear(4, 1000), torch.randn(3, 4)
    before = model.weight.detach().clone()
    run = training.step(model, x, torch.tensor([1, 2, 3]))
    run()
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.detach(), before - 1e-3 * model.weight.grad)
