"""`python -m se_fused bench`: what it measures, what it says of that, and what it refuses."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
from command_line import run

from examples import zoo
from se_fused import bench as benchmark
from se_fused import measure, timing


@pytest.fixture
def quick(monkeypatch):
    """Makes `bench` quick: no round is timed, and every call takes 1 ms, that of a replaced model half of it."""

    def measure(calls, seconds, *, limit, progress):
        assert limit == 1
        progress(1.0)
        times = {v.name: [1000.0 if v.name == "original" else 500.0] * 5 for v in calls}
        return timing.Measured(times, others=0.0, dropped=0)

    monkeypatch.setattr(timing, "measure", measure)


def test_bench_measures_each_way_to_replace(models):
    """The one test whose rounds are timed: what they say depends on the machine, what is said of them does not."""
    result = run("bench", f"{models}:net", "--input", "2x3x9x9", "--batch", "2", "--seconds", "0")
    assert result.exit_code == 0, result.output
    for batch in "12":
        assert re.search(rf"│ {batch}\s+│ original │ [\d.]+ \([\d.]+ to [\d.]+\)\s+│\s+│\s+│", result.stdout)
        for variant in ("layer", "in place", "block"):
            numbers = r"[\d.]+ \([\d.]+ to [\d.]+\)\s+│ [\d.]+ \([\d.]+ to [\d.]+\)\s+│ equal"
            assert re.search(rf"│ {batch}\s+│ {variant}\s+│ {numbers}", result.stdout)
        assert re.search(rf"At batch {batch}, (no variant|replace\(model)", " ".join(result.stdout.split()))


def test_bench_prints_one_json_object(models, quick):
    result = run("bench", f"{models}:make", "--arg", "tuple", "--input", "1x3x9x9", "--batch", "3", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["model"] == f"{models}:make tuple"
    assert (facts["device"], facts["dtype"], facts["threads"]) == ("cpu", "float32", torch.get_num_threads())
    assert [(r["batch"], r["variant"]) for r in facts["results"]] == [
        (n, variant) for n in (1, 3) for variant in ("original", "layer", "in place", "block")
    ]
    assert all(r["equal"] for r in facts["results"])
    assert facts["results"][1]["speed"] == {"p20": 2, "p50": 2, "p80": 2}
    assert facts["results"][1]["milliseconds"] == {"p20": 0.5, "p50": 0.5, "p80": 0.5}
    assert facts["verdict"].startswith(
        "At batch 1, replace(model) makes the model 2.00 (2.00 to 2.00) times as fast. At"
    )
    assert facts["failures"] == []


def test_bench_passes_dtype_order_and_batch_on(models, quick, monkeypatch):
    seen, real = [], benchmark.run
    monkeypatch.setattr(benchmark, "run", lambda models, x, *more: seen.append(x) or real(models, x, *more))
    options = ["--dtype", "bfloat16", "--channels-last", "--input", "5x3x9x9", "--batch", "4"]
    assert run("bench", f"{models}:net", *options).exit_code == 0
    assert [tuple(x.shape) for x in seen] == [(1, 3, 9, 9), (4, 3, 9, 9)]
    assert all(x.dtype is torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert not torch.equal(seen[1][0], seen[1][1])
    assert len(seen[:]) == 2
    run("bench", f"{models}:net", "--input", "1x3x9x9", "--batch", "1")
    assert len(seen) == 3


def test_bench_fails_on_another_output(models, quick, monkeypatch):
    calls = itertools.count()  # of four, the first is of the original, which gives the same again
    wrong = lambda got, wanted: (next(calls) % 4 > 0) * 2e-4 * float(wanted.abs().max())  # noqa: E731
    monkeypatch.setattr(measure, "largest_difference", wrong)
    result = run("bench", f"{models}:net", "--input", "1x3x9x9")
    assert result.exit_code == 1
    assert result.stdout.count("differs") == 6
    assert "error: the output of block differs\n" in result.stderr
    assert "makes the model" not in result.stdout


# Models that make a careless benchmark lie.
TREACHEROUS = """
import threading, torch
from {models} import SELayer
from torch import nn

class WithInput(nn.Module):  # returns its input, which a layer in place overwrites
    def __init__(self):
        super().__init__()
        self.layer = SELayer()

    def forward(self, x):
        y = self.layer(x)
        return x, y

class Spoils(WithInput):
    def forward(self, x):
        return self.layer(x.mul_(2))

class Random(WithInput):
    def forward(self, x):
        return self.layer(x) + torch.rand(())

class One(WithInput):
    def forward(self, x):
        if len(x) > 1:
            raise KeyError("one at a time")
        return self.layer(x)

class Locked(WithInput):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

class Talks(WithInput):
    def forward(self, x):
        print("hello")
        return self.layer(x)

def talks():
    print("I build")
    return Talks()
"""


@pytest.fixture
def treacherous(models, tmp_path):
    (tmp_path / f"treacherous_{models}.py").write_text(TREACHEROUS.replace("{models}", models))
    return f"treacherous_{models}"


def test_bench_gives_each_model_its_own_input(treacherous, models, quick):
    result = run("bench", f"{treacherous}:WithInput", "--input", "1x8x9x9")
    assert result.exit_code == 1
    assert "error: the output of in place differs\n" in result.stderr
    assert result.stderr.count("error") == 1
    for spec in (f"{treacherous}:Spoils", f"{models}:SELayer"):
        result = run("bench", spec, "--input", "1x8x9x9")
        assert result.exit_code == 0, result.output


def test_bench_restores_the_input_of_each_round(models, monkeypatch):
    """A layer in place multiplies its input by its gates; after many calls only zeros would be left."""
    seen = []
    real = timing.measure

    def measured(variants, *more, **options):
        found = real(variants, 0.0, **options)
        for variant in variants:
            variant.restore()
            seen.append(float(variant.call().abs().max()))
        return found

    monkeypatch.setattr(timing, "measure", measured)
    assert run("bench", f"{models}:SELayer", "--input", "1x8x9x9", "--batch", "1").exit_code == 0
    assert len(seen) == 4
    assert min(seen) > 0.9 * max(seen) > 0


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("Random", "DoesNotRepeat: the model gives another output when it is called again"),
        ("One", "raised KeyError: 'one at a time'"),
        ("Locked", "raised TypeError: cannot pickle '_thread.lock' object"),
    ],
)
def test_bench_says_why_a_model_cannot_be_measured(treacherous, quick, model, text):
    result = run("bench", f"{treacherous}:{model}", "--input", "1x8x9x9")
    assert result.exit_code == 2
    assert text in result.stderr


@pytest.mark.parametrize("command", ["bench", "replace"])
def test_json_is_not_mixed_with_what_a_model_prints(treacherous, quick, command):
    result = run(command, f"{treacherous}:talks", "--input", "1x8x9x9", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    assert "hello" in result.stderr


def test_bench_says_that_an_output_is_not_finite(models, quick):
    result = run("bench", f"{models}:make", "--arg", "nan", "--input", "1x3x9x9", "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert "the output of block cannot be compared: the output before replacing is not finite" in facts["failures"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{models}:TwoMaps", "--input", "1x3x9x9"], "nothing is replaced: 0 of 1 SE layer"),
        (["{models}:net", "--input", "9"], "--input is '9'; wanted sizes joined by x"),
        (["{models}:net", "--input", "1x3x9x9", "--batch", str(2**62)], "an input of 4611686018427387904x3x9x9 cannot"),
        (["{models}:net", "--input", "1x4x9x9"], "on a random input of 1x4x9x9 raised RuntimeError"),
        (["{models}:net", "--input", "1x3x9x9", "--dtype", "int8"], "--dtype is 'int8'; wanted one of float32"),
        (["{models}:broken"], "raised RuntimeError: no such weights"),
        (["nothing"], "SPEC is 'nothing'; wanted module:callable"),
    ],
)
def test_bench_refuses(models, quick, arguments, text):
    result = run("bench", *(argument.format(models=models) for argument in arguments))
    assert result.exit_code == 2
    assert text in result.stderr


def test_bench_has_an_example(quick, monkeypatch):
    """A small network in place of EfficientNet-B0, so that the test is quick."""
    zoo.import_torchvision()
    import timm

    real, names = timm.create_model, {"efficientnet_b0": "test_efficientnet"}
    monkeypatch.setattr(timm, "create_model", lambda name: real(names[name]))
    result = run("bench", "--input", "1x3x64x64")
    assert result.exit_code == 0, result.output
    assert "timm:create_model efficientnet_b0 on cpu, float32" in " ".join(result.stdout.split())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "neither timm nor torchvision is installed" in run("bench").stderr


def a_result(**changes):
    speed, found = changes.pop("speed", (1.1, 1.2, 1.3)), {"equal": changes.pop("equal", True), "verdict": ""}
    numbers = {"milliseconds": timing.Spread(1.0, 2.0, 3.0), "speed": timing.Spread(*speed), "rounds": 9}
    return benchmark.Result(**{"batch": 1, "variant": "layer", "others": 0.0, "found": found} | numbers | changes)


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([{}], "At batch 1, replace(model) makes the model 1.20 (1.10 to 1.30) times as fast."),
        ([{"speed": (1.01, 1.02, 1.03)}], "At batch 1, no variant with an equal output is faster"),
        ([{"speed": (0.9, 1.2, 1.3)}], "At batch 1, no variant with an equal output is faster"),
        ([{"equal": False}], "At batch 1, no variant with an equal output is faster"),
        (
            [{"variant": "original", "speed": (1.1, 1.1, 1.1)}],
            "At batch 1, no variant with an equal output is faster",
        ),
        (
            [{}, {"variant": "block", "speed": (1.3, 1.4, 1.5)}],
            'At batch 1, replace(model, level="block") makes the model 1.40 (1.30 to 1.50) times as fast.',
        ),
        (
            [{"others": 0.3, "speed": (0.9, 1.0, 1.1)}],
            "Other processes used 30% of the CPU, so do not trust this: measure again. At batch 1, no variant",
        ),
    ],
)
def test_the_verdict_of_bench(results, text):
    assert benchmark.verdict([a_result(**changes) for changes in results]).startswith(text)
