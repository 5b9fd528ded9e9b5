"""The benchmark: only right results are timed, times become the right ratios, the README follows the CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console

from benchmarks import call_overhead, compiled, layer_cpu, layer_cpu_report, peers, report, shapes, timing
from benchmarks.shapes import Shape
from benchmarks.timing import Contender
from examples import zoo

TINY = Shape(2, 12, 5, 7, r=3)


class FakeClock:
    """Time passes only in `work`."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def work(self, ns: int) -> Callable[[], None]:
        def call() -> None:
            self.now += ns

        return call


# Peers.


@pytest.mark.parametrize("name", [*peers.FUSED, *peers.PEERS])
def test_every_contender_computes_the_layer(name: str) -> None:
    inputs = peers.draw(TINY, torch.float32, "contiguous")
    with torch.inference_mode():
        contender = peers.forward(name, inputs, threads=1)
        for _ in range(2):  # the second call of what works in place starts from x again
            peers.check(contender, peers.truth(inputs, gradients=False))


@pytest.mark.parametrize("name", ["fused", "fused_inplace", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", peers.MEMORY_FORMATS)
def test_contenders_of_every_format(name: str, dtype: torch.dtype, layout: str) -> None:
    inputs = peers.draw(TINY, dtype, layout)
    assert inputs.x.is_contiguous(memory_format=peers.MEMORY_FORMATS[layout])
    with torch.inference_mode():
        peers.check(peers.forward(name, inputs, threads=1), peers.truth(inputs, gradients=False))


@pytest.mark.parametrize("name", ["fused", "eager"])
@pytest.mark.parametrize("with_forward", [False, True])
def test_gradients(name: str, with_forward: bool) -> None:
    inputs = peers.draw(TINY, torch.float32, "contiguous")
    contender = peers.backward(name, inputs, with_forward=with_forward)
    for _ in range(2):  # the graph can be used again
        peers.check(contender, peers.truth(inputs, gradients=True))


def test_a_wrong_contender_is_rejected() -> None:
    inputs = peers.draw(TINY, torch.float32, "contiguous")
    want = peers.truth(inputs, gradients=False)
    y = want[0].float()
    never_written = Contender("idle", lambda: None, outputs=(torch.full_like(y, math.nan),))
    off_at_one_place = y.clone()
    off_at_one_place[1, 3, 2, 2] += 1e-4
    nearly = Contender("nearly", lambda: off_at_one_place)
    # A squeeze over the wrong map shows, because the channels differ in mean.
    other = peers.draw(TINY, torch.float32, "contiguous", seed=1)
    w1, b1, w2, b2 = inputs.weights
    s = torch.sigmoid(torch.relu(other.x.mean((2, 3)) @ w1.T + b1) @ w2.T + b2)
    wrong_squeeze = Contender("wrong_squeeze", lambda: inputs.x * s[:, :, None, None])
    wrong_shape = Contender("wrong_shape", lambda: y[:1])
    for contender in (never_written, nearly, wrong_squeeze, wrong_shape):
        with pytest.raises(peers.WrongResult, match=contender.name):
            peers.check(contender, want)
    peers.check(Contender("right", lambda: y), want)


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "eager", lambda inputs, threads: Contender("eager", inputs.x.clone))
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("timed"))
    case = layer_cpu.Case(TINY, "float32", "contiguous", "forward", ("fused", "eager"))
    with pytest.raises(peers.WrongResult, match="eager"):
        layer_cpu.run_case(case, threads=1, until=0)


def test_calls_in_place_do_not_reach_denormals() -> None:
    inputs = peers.draw(shapes.QUICK[0], torch.float32, "contiguous")
    with torch.inference_mode():
        contender = peers.forward("fused_inplace", inputs, threads=1)
        for _ in range(timing.CALLS_BETWEEN_RESTORES):
            x = contender.call()
    assert isinstance(x, torch.Tensor)
    magnitude = x.abs()
    assert magnitude[magnitude > 0].min() > 1e-15 > torch.finfo(torch.float32).tiny


# Timing.


def test_rounds_are_interleaved_and_ratios_are_within_a_round() -> None:
    clock, order = FakeClock(), []
    speed = itertools.cycle([1, 1, 1, 5])  # the machine slows down now and then, for both

    def work(name: str, ns: int) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            clock.now += ns * slowness[0]

        return call

    slowness = [1]
    contenders = [Contender("a", work("a", 6_000_000)), Contender("b", work("b", 12_000_000))]
    rests = itertools.count()

    def rest() -> None:
        if next(rests) % 2 == 0:
            slowness[0] = next(speed)

    times = timing.measure(contenders, budget_s=1, clock=clock, rest=rest)
    assert len(times["a"]) == len(times["b"]) > timing.MIN_ROUNDS
    assert timing.ratio(times, "b", "a") == pytest.approx(2)
    assert timing.ratio(times, "a", "b") == pytest.approx(1 / 2)
    assert timing.spread(times["a"]).p50 == pytest.approx(6_000)
    assert max(times["a"]) == pytest.approx(30_000)
    # After the first calls of both, a round is two calls (one to warm up, one timed) of each contender.
    rounds = [order[i] for i in range(len(order) - 4 * len(times["a"]), len(order), 2)]
    assert all({first, second} == {"a", "b"} for first, second in zip(rounds[::2], rounds[1::2], strict=True))
    assert {"a", "b"} == set(rounds[::2])


def test_a_batch_lasts_and_the_budget_ends() -> None:
    clock = FakeClock()
    fast = Contender("fast", clock.work(1_000))
    assert timing.calls_per_batch(fast, clock) == timing.BATCH_NS // 1_000
    assert timing.calls_per_batch(Contender("slow", clock.work(10**9)), clock) == 1
    times = timing.measure([Contender("slow", clock.work(10**9))], budget_s=0, clock=clock, rest=lambda: None)
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

    assert timing.run_batch(Contender("x", call, restore=restore), 20, clock) == 20 * 100
    chunks = [len(list(group)) for key, group in itertools.groupby(calls) if key == "call"]
    assert chunks == [8, 8, 4]


def test_percentiles() -> None:
    assert timing.spread([float(t) for t in range(101)]) == (20, 50, 80)


def test_rest_ends_and_a_busy_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: whether a spinning thread gets a core is the machine's affair."""
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


# The CSV and the report.


def test_variants_compute_the_same_and_differ_in_what_they_call() -> None:
    model, x = zoo.build("timm:mobilenetv3_small_100").eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        for contender in compiled.CONTENDERS:
            other = compiled.variant(model, contender)
            torch.testing.assert_close(other(x), wanted, rtol=1e-4, atol=1e-5)
            calls = sum(isinstance(module, compiled.Call) for module in other.modules())
            assert calls == (9 if contender in ("formula", "operator") else 0)


def test_the_bars_that_the_records_must_keep() -> None:
    """Compiled and replaced networks lose nothing, and a call with nothing to compute costs no more than before."""
    rows = {(row["network"], row["n"], row["contender"]): row for row in report.read(compiled.RECORD)}
    replaced = {key: float(row["original_by_this"]) for key, row in rows.items() if key[2] == "replaced"}
    assert len(replaced) == 4
    assert min(replaced.values()) >= 0.98, replaced
    calls = {row["call"]: row for row in report.read(call_overhead.RECORD)}
    for call in ("bare", "in_place", "strided", "layer", "layer_replaced"):
        assert float(calls[call]["p20"]) <= 1, calls[call]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CSV of all cases with made-up times in microseconds: a copy 1, in place 1, fused 2, eager 3, others 4."""
    microseconds = {"copy": 1.0, "multiply": 0.5, "fused_inplace": 1.0, "fused": 2.0, "eager": 3.0}

    def run_case(case: layer_cpu.Case, threads: int, until: float) -> timing.Times:
        return {name: [microseconds.get(name, 4.0)] * 5 for name in (*case.contenders, *case.floors)}

    monkeypatch.setattr(layer_cpu, "run_case", run_case)
    file = tmp_path / "layer_cpu.csv"
    planned = layer_cpu.cases(shapes.LAYER, tuple(peers.PEERS), layer_cpu.DTYPES, layer_cpu.DIRECTIONS)
    with file.open("w", newline="") as stream:
        layer_cpu.run(planned, stream, torch.get_num_threads(), minutes=1, console=Console(file=io.StringIO()))
    return file


def edit(file: Path, change: Callable[[dict[str, str]], None]) -> None:
    lines = list(csv.DictReader(file.open(newline="")))
    for line in lines:
        change(line)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def test_every_shape_is_measured_in_every_format(record: Path) -> None:
    lines = report.read(record)
    assert list(lines[0]) == [field.name for field in dataclasses.fields(layer_cpu.Row)]
    for dtype, layout, direction, contenders in (
        ("float32", "contiguous", "forward", {*peers.FUSED, *peers.PEERS, *peers.FLOORS}),
        ("float32", "channels_last", "forward", {*peers.FUSED, "eager", "compile", *peers.FLOORS}),
        ("bfloat16", "contiguous", "forward", {*peers.FUSED, "eager", "compile", *peers.FLOORS}),
        ("float32", "contiguous", "backward", {"fused", "eager", "copy"}),
        ("float32", "contiguous", "forward_backward", {"fused", "eager", "copy"}),
    ):
        cells = layer_cpu_report.select(lines, dtype, layout, direction)
        assert all(set(cells[str(shape)]) == contenders for shape in shapes.LAYER)


def test_floor_and_bytes(record: Path) -> None:
    for direction, maps in layer_cpu.MAPS_MOVED.items():
        line = layer_cpu_report.select(report.read(record), "float32", "contiguous", direction)["1x72x28x28"]["fused"]
        assert int(line["bytes"]) == maps * 72 * 28 * 28 * 4
        assert float(line["floor_us"]) == maps / 2  # a copy, which moves two maps, takes 1


def test_the_table_is_a_function_of_the_csv(record: Path) -> None:
    text = layer_cpu_report.table(report.read(record))
    assert "| 1x72x28x28 | 2.0 | 3.0 (eager) | 1.50 | 1.50 | 1.0 | 50% |" in text
    assert "| geometric mean, batch 1 (6 shapes) |  |  | 1.50 | 1.50 |  |  |" in text
    assert "| 1x72x28x28 | 1.0 | 3.00 | 0.5 | 50% | 6.00 |" in text
    assert "| geometric mean, batch 1 (6 shapes) |  | 3.00 |  |  | 6.00 |" in text
    assert "eager / fused 1.50." in text
    assert "**" not in text

    def slower_at_one_shape(line: dict[str, str]) -> None:
        if line["shape"] == "16x2048x7x7" and line["contender"] == "eager":
            line["ratio_to_fused"] = "0.900"

    edit(record, slower_at_one_shape)
    text = layer_cpu_report.table(report.read(record))
    assert "**0.90**" in text
    mean = (1.5**10 * 0.9) ** (1 / 11)
    assert f"| geometric mean, all 11 shapes |  |  | {mean:.2f} |" in text


def test_a_mean_over_fewer_shapes_is_not_given(record: Path) -> None:
    lines = [line for line in report.read(record) if line["shape"] != "16x2048x7x7"]
    text = layer_cpu_report.table(lines)
    assert "geometric mean, batch 1" in text
    assert "geometric mean, batch 16" not in text
    assert "geometric mean, all" not in text


def test_check_compares_the_readme_with_the_csv(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "figure.png"
    readme = tmp_path / "README.md"
    entry = dataclasses.replace(report.RECORDS["layer_cpu"], source=record, figure=figure, document=readme)
    monkeypatch.setattr(report, "RECORDS", {"layer_cpu": entry})
    readme.write_text("before\n\n<!-- layer_cpu:begin -->\n<!-- layer_cpu:end -->\n\nafter\n")

    def exit_code(*, check: bool) -> int:
        try:
            report.main(check=check)
        except typer.Exit as stop:
            return stop.exit_code
        return 0

    assert exit_code(check=True) == 1
    assert exit_code(check=False) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    written = readme.read_text()
    assert written.startswith("before\n\n<!--")
    assert written.endswith("-->\n\nafter\n")
    assert exit_code(check=True) == 0
    readme.write_text(written.replace("1.50", "1.51", 1))
    assert exit_code(check=True) == 1
    readme.write_text("no markers")
    assert exit_code(check=True) == 2
    assert "layer_cpu:begin" in capsys.readouterr().err
    readme.write_text(written)
    edit(record, lambda line: line.update(commit="other") if line["shape"] == "1x72x28x28" else None)
    assert exit_code(check=True) == 2
    assert "several runs" in capsys.readouterr().err
    record.unlink()
    assert exit_code(check=True) == 2
