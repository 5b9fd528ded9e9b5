"""The files of record: each table and figure is a function of its files."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console

from benchmarks import (
    baselines,
    call_overhead,
    census,
    compiled,
    contradictions,
    coverage,
    coverage_report,
    engines,
    figures,
    headline,
    layer_cpu,
    layer_cpu_report,
    models,
    networks,
    report,
    shapes,
)
from examples import zoo
from se_fused import timing


def test_the_bars_that_the_records_must_keep() -> None:
    """Compiled and replaced networks lose nothing, and a call with nothing to compute costs no more than before."""
    rows = {(row["network"], row["n"], row["variant"]): row for row in report.read(compiled.RECORD)}
    replaced = {key: float(row["ratio_p50"]) for key, row in rows.items() if key[2] in ("replaced", "block")}
    assert len(replaced) == 8
    assert min(replaced.values()) >= 0.98, replaced
    calls = {row["call"]: row for row in report.read(call_overhead.RECORD)}
    for call in ("bare", "in_place", "strided", "layer", "layer_replaced"):
        assert float(calls[call]["ratio_p20"]) <= 1, calls[call]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CSV of all contests with made-up times: copy and in place take 1 us, out= 1.5, fused 2, eager 3, others 4."""
    microseconds = {"copy": 1.0, "multiply": 0.5, "fused_inplace": 1.0, "fused_out": 1.5, "fused": 2.0, "eager": 3.0}

    def run_contest(contest: layer_cpu.Contest, threads: int, until: float) -> timing.Measured:
        times = {name: [microseconds.get(name, 4.0)] * 5 for name in (*contest.variants, *contest.passes)}
        return timing.Measured(times, others=0.02, dropped=1)

    monkeypatch.setattr(layer_cpu, "run_contest", run_contest)
    file = tmp_path / "layer_cpu.csv"
    planned = layer_cpu.contests(shapes.LAYER, tuple(baselines.BASELINES), layer_cpu.DTYPES, layer_cpu.DIRECTIONS)
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
    assert {(line["others"], line["dropped"]) for line in lines} == {("0.020", "1")}
    for dtype, layout, direction, variants in (
        ("float32", "contiguous", "forward", {*baselines.FUSED, *baselines.BASELINES, *baselines.PASSES}),
        ("float32", "channels_last", "forward", {"fused", "fused_inplace", "eager", "compile", *baselines.PASSES}),
        ("bfloat16", "contiguous", "forward", {"fused", "fused_inplace", "eager", "compile", *baselines.PASSES}),
        ("float32", "contiguous", "backward", {"fused", "eager", "copy"}),
        ("float32", "contiguous", "forward_backward", {"fused", "eager", "copy"}),
    ):
        cells = layer_cpu_report.select(lines, dtype, layout, direction)
        assert all(set(cells[str(shape)]) == variants for shape in shapes.LAYER)


def test_copy_and_bytes(record: Path) -> None:
    for direction, maps in layer_cpu.MAPS_MOVED.items():
        line = layer_cpu_report.select(report.read(record), "float32", "contiguous", direction)["1x72x28x28"]["fused"]
        assert int(line["bytes"]) == maps * 72 * 28 * 28 * 4
        assert float(line["copy_us"]) == maps / 2  # a copy, which moves two maps, takes 1


def test_the_table_is_a_function_of_the_csv(record: Path) -> None:
    text = layer_cpu_report.table(report.read(record))
    one, two, three = "1.00 (1.00 to 1.00)", "2.00 (2.00 to 2.00)", "3.00 (3.00 to 3.00)"
    ratio = "1.50 (1.50 to 1.50)"
    assert f"| 1x72x28x28 | {two} | {ratio} | {ratio} | {ratio} | {two} | eager | {one} | 50% |" in text
    assert "| geometric mean, batch 1 (6 shapes) |  |  | 1.50 | 1.50 | 2.00 |  |  |  |" in text
    assert f"| 1x72x28x28 | {one} | {three} | {three} | 0.500 (0.500 to 0.500) | 50% |" in text
    assert "| geometric mean, batch 1 (6 shapes) |  | 3.00 | 3.00 |  |  |" in text
    assert "| torch.compile without guards | 4.00 (4.00 to 4.00) |" in text
    assert "| geometric mean, batch 1 (6 shapes) |  |  |  |  | **0.75** | **0.75** | **0.75** |" in text
    assert "other processes used 2% of the CPU or less, and 67 rounds were left out" in text

    def slower_at_one_shape(line: dict[str, str]) -> None:
        if line["shape"] == "16x2048x7x7" and line["variant"] == "eager":
            line.update(ratio_to_fused_p20="0.80", ratio_to_fused_p50="0.900", ratio_to_fused_p80="0.95", p20_us="1.8")

    edit(record, slower_at_one_shape)
    text = layer_cpu_report.table(report.read(record))
    assert "**0.90 (0.800 to 0.950)**" in text
    mean = (1.5**10 * 0.9) ** (1 / 11)
    assert f"| geometric mean, all 11 shapes |  |  | {mean:.2f} |" in text


def test_a_mean_over_fewer_shapes_is_not_given(record: Path) -> None:
    lines = [line for line in report.read(record) if line["shape"] != "16x2048x7x7"]
    text = layer_cpu_report.table(lines)
    assert "geometric mean, batch 1" in text
    assert "geometric mean, batch 16" not in text
    assert "geometric mean, all" not in text


def test_check_compares_a_document_with_the_csv(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "figure.png"
    document = tmp_path / "tables.md"
    drawn = {figure: figures.by_shape}
    entry = dataclasses.replace(report.RECORDS["layer_cpu"], source=record, figures=drawn, document=document)
    monkeypatch.setattr(report, "RECORDS", {"layer_cpu": entry})
    document.write_text("before\n\n<!-- layer_cpu:begin -->\n<!-- layer_cpu:end -->\n\nafter\n")

    def exit_code(*, check: bool) -> int:
        try:
            report.main(check=check)
        except typer.Exit as stop:
            return stop.exit_code
        return 0

    assert exit_code(check=True) == 1
    assert exit_code(check=False) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    written = document.read_text()
    assert written.startswith("before\n\n<!--")
    assert written.endswith("-->\n\nafter\n")
    assert exit_code(check=True) == 0
    document.write_text(written.replace("1.50", "1.51", 1))
    assert exit_code(check=True) == 1
    document.write_text("no markers")
    assert exit_code(check=True) == 2
    assert "layer_cpu:begin" in capsys.readouterr().err
    document.write_text(written)
    edit(record, lambda line: line.update(commit="other") if line["shape"] == "1x72x28x28" else None)
    assert exit_code(check=True) == 2
    assert "several runs" in capsys.readouterr().err
    record.unlink()
    assert exit_code(check=True) == 2


def test_the_figure_at_a_glance(record: Path, tmp_path: Path) -> None:
    lines = report.read(record)
    assert figures.speeds(lines, shapes.BATCH_1) == pytest.approx(
        {"compile": 0.75, "openvino": 0.75, "onnxruntime": 0.75, "fused": 1.5, "fused_out": 2, "fused_inplace": 3}
    )
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for file in (first, second):
        figures.bars(lines, file)
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture
def networks_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_layers: None) -> Path:
    """A models.csv of two small layers and made-up times in microseconds; one model stands for all networks."""
    microseconds = {"original": 3000.0, "replaced": 2000.0, "in place": 4000.0}

    def measure(model: torch.nn.Module, x: torch.Tensor, calls: dict[str, object], seconds: float) -> timing.Measured:
        return timing.Measured({name: [microseconds.get(name, 1000.0)] * 5 for name in calls}, 0.031, 0)

    layer = zoo.import_torchvision().ops.SqueezeExcitation
    model = torch.nn.Sequential(layer(8, 2), layer(8, 2))
    monkeypatch.setattr(networks, "measure", measure)
    monkeypatch.setattr(models, "engine", lambda *_: None)
    monkeypatch.setattr(networks, "build", lambda *_: (model, torch.ones(1)))
    monkeypatch.setattr(networks, "build_variant", functools.cache(networks.build_variant))
    file = tmp_path / "models.csv"
    models.main(out=file, seconds=0, threads=torch.get_num_threads())
    return file


@pytest.mark.parametrize("name", engines.ENGINES)
def test_an_engine_computes_the_network(name: str) -> None:
    model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    call = models.engine(name, model, x, threads=1)
    with torch.inference_mode():
        torch.testing.assert_close(call(), model(x), rtol=1e-4, atol=1e-4)


def test_the_table_of_networks(networks_record: Path) -> None:
    text = models.table(report.read(networks_record))
    for network in models.NETWORKS:
        for n in models.BATCHES:
            label = f"{network} (2 SE layers) | {n}"
            loss = "**0.750 (0.750 to 0.750)**"
            assert f"| {label} | 3.00 (3.00 to 3.00) | 1.50 (1.50 to 1.50) | {loss} | 3.00 (3.00 to 3.00) |" in text
    assert "| geometric mean |  |  | 1.50 | **0.75** | 3.00 | 3.00 | 3.00 | 3.00 |" in text
    assert "medians (20th to 80th percentile) of 5 or more interleaved rounds" in text
    assert "other processes used 3.1% of the CPU or less" in text
    short = models.short_table(report.read(networks_record))
    cells = "3.00 | 1.50 (1.50 to 1.50) | 3.00 (3.00 to 3.00)"
    assert f"| timm:efficientnet_b0 | {cells} | {cells} |" in short


def test_the_figure_of_networks(networks_record: Path, tmp_path: Path) -> None:
    lines = report.read(networks_record)
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for file in (first, second):
        figures.networks(lines, file)
    assert first.read_bytes() == second.read_bytes()


# A change of the lines that it is told, and what the report then says.
CONTRADICTIONS = {
    "a ratio that is not that of the times": (
        lambda line: line["variant"] == "eager" and line["direction"] == "backward",
        {"ratio_to_fused_p50": "1.8"},
        "16x512x28x28 float32 contiguous backward eager: ratio_to_fused_p50 1.8 is not that of the times",
    ),
    "backward that takes longer than forward and backward": (
        lambda line: line["direction"] == "backward",
        {"p20_us": "4.5", "p50_us": "4.6", "p80_us": "4.7"},
        "16x512x28x28 float32 contiguous backward fused: took longer than forward and backward",
    ),
    "in place slower than out of place": (
        lambda line: line["variant"] == "fused_inplace",
        {"p20_us": "2.1", "p50_us": "2.2", "p80_us": "2.3"},
        "16x512x28x28 float32 contiguous forward fused_inplace: took longer than into new memory",
    ),
    "a copy slower than the layer": (
        lambda line: line["variant"] == "copy",
        {"p20_us": "2.1", "p50_us": "2.2", "p80_us": "2.3"},
        "16x512x28x28 float32 contiguous forward copy: took longer than the layer",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_lines_that_contradict_each_other_are_not_published(record: Path, name: str) -> None:
    applies, change, message = CONTRADICTIONS[name]
    contradictions.refuse(report.read(record))
    edit(record, lambda line: line.update(change) if line["shape"] == "16x512x28x28" and applies(line) else None)
    with pytest.raises(contradictions.Contradiction, match=re.escape(message)):
        layer_cpu_report.table(report.read(record))


def test_a_difference_within_the_spread_is_no_contradiction(record: Path) -> None:
    def noisy(line: dict[str, str]) -> None:
        if line["variant"] == "fused_inplace":
            line.update(p20_us="1.9", p50_us="2.5", p80_us="3.0")

    edit(record, noisy)
    with pytest.raises(contradictions.Contradiction) as caught:  # of its ratios, but not of its time
        contradictions.refuse(report.read(record))
    assert "took longer" not in str(caught.value)


def test_a_batch_that_takes_less_time_than_one_sample_is_not_published(networks_record: Path) -> None:
    def faster(line: dict[str, str]) -> None:
        if line["n"] == "16" and line["network"] == "timm:seresnet50":
            line.update({f"{p}_ms": str(float(line[f"{p}_ms"]) / 2) for p in timing.Spread._fields})

    edit(networks_record, faster)
    for table in (models.table, models.short_table):
        with pytest.raises(contradictions.Contradiction, match="seresnet50 original: N = 1 took longer than N = 16"):
            table(report.read(networks_record))


OF_THE_RUN = {
    "date": "2026-01-02", "commit": "abc", "cpu": "a CPU", "torch": "2", "library": "a", "version": "1"
}  # fmt: skip


def test_the_table_of_what_replace_covers() -> None:
    line = dict.fromkeys(coverage.COLUMNS, "") | dict.fromkeys(coverage.COUNTS, "0")
    line |= OF_THE_RUN | {"architectures": "4"}
    none = line | {"model": "x", "skipped": "3", "skipped_reasons": "3 it is far", "seen": "Eca: it is near, 2 modules"}
    exact = dict(zip(coverage.RESULTS, ("2.0e-07", "1.0e-07", "1.0e-07", "1.0e-15"), strict=True))
    fused = line | {"model": "y", "replaced": "5", "inline": "2", "near": "1", "near_reasons": "1 it is wide"} | exact
    text = coverage_report.table([none, fused])
    assert "| a 1 | 8 | 2 | 11 | 5 | 2 | 3 | 1 | 1 | 1 | 2e-07 | 1e-15 |" in text
    assert "| it is far | 3 | a x |" in text
    assert "| it is wide | 1 | a y |" in text
    assert "| Eca | it is near | a x |" in text
    assert "Models that failed" not in text
    assert "Results that differ" not in text
    different = fused | {"model": "z", "gradient_difference": "1.0e-03", "error": "it fell"}
    text = coverage_report.table([none, fused, different])
    assert "| a z | it fell |" in text
    assert "| a z | 2.0e-07 | 1.0e-07 | 1.0e-07 | 1.0e-03 |" in text
    assert "PyTorch 2, commit abc, 2026-01-02." in text


def test_the_table_of_what_is_joined() -> None:
    line = OF_THE_RUN | {"model": "x"} | dict.fromkeys(census.NEIGHBOURS, "2") | dict.fromkeys(census.RESULTS, "")
    line |= {"layers": "9", "joined": "4", "reasons": "2 it is far | 3 it is wide"}
    exact = {"error": "2.0e-06", "classes": "equal"}
    apart = {"error": "3.0e-05", "classes": "different", "original_error": "5.0e-05", "block_error": "4.0e-05"}
    text = census.table([line, line | exact | {"model": "y"}, line | apart | {"model": "z", "reasons": "1 it is far"}])
    assert "| a 1 | 3 | 27 | 12 | 6 | 6 | 6 | 6 | 6 | 6 | 6 |" in text
    assert "| it is wide | 6 | x, y |\n| it is far | 5 | x, y, z |" in text
    assert "2 of the networks were run. The classes are equal except for z. " in text
    assert "by 1e-05 of the largest or less in 1 of them." in text
    assert "| z | 3.0e-05 | 5.0e-05 | 4.0e-05 |" in text
    assert "PyTorch 2, commit abc, 2026-01-02." in text


def test_the_headline_is_a_function_of_the_records(record: Path, networks_record: Path, tmp_path: Path) -> None:
    for name in ("compiled.csv", "training.csv", "coverage.csv", "h200"):
        source = report.RESULTS / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    found = report.read_headline(tmp_path)
    for name, wanted in {
        "layer_eager": "1.5", "layer_best": "1.50 at batch 1 and 1.50 at batch 16", "in_place_eager": "3.0",
        "layer_out_best": "2.00 at batch 1 and 2.00 at batch 16", "training_eager": "1.5", "models": "9",
        "models_replaced": "1.50 to 1.50", "models_replaced_mean": "1.50", "models_block": "3.00 to 3.00",
        "models_block_means": "3.00 at batch 1 and 3.00 at batch 16", "coverage_libraries": "12",
        "gpu_faster": "33 of 48 calls",
        "gpu_slower": "8 of 12", "gpu_calls": "0.89 to 1.17", "gpu_graphs": "1.06 to 1.25", "gpu_cases": "540",
    }.items():  # fmt: skip
        assert found[name] == wanted, name
    text = headline.text(found)
    assert "runs at 1.5 times eager speed, in place at 3.0, and forward with backward at 1.5." in text
    assert "{" not in text
