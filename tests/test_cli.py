"""The command line: the output of each command; an error is one line with exit code 2."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import se_fused
from examples import zoo
from se_fused import __main__ as cli
from se_fused import bench as benchmark
from se_fused import cases, measure, timing, verify
from se_fused import given as specified

MODEL = """
import torch
from torch import nn

class SELayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(8, 2, bias=False), nn.ReLU(), nn.Linear(2, 8, bias=False), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]

class Pair(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.body = kind, net()

    def forward(self, x):
        y = self.body(x)
        return {"dict": {"y": y, "n": 3}, "tuple": (y.argmax(), y), "none": "text", "nan": y * float("nan")}[self.kind]

class Inline(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x):
        x = self.conv(x)
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]

class TwoMaps(Inline):
    # It returns the gate too.

    def forward(self, x):
        x = self.conv(x)
        s = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return x * s, s

def make(kind="tuple", scale=1.0, layers=1, extra=None, flag=False):
    assert isinstance(kind, str) and (scale, layers, extra, flag) in [(1.0, 1, None, False), (0.5, 2, "a=b", True)]
    return Pair(kind)

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), SELayer(), nn.ReLU())

def broken():
    raise RuntimeError("no such weights\\nsecond line")
"""


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def test_plan_prints_launches_and_bytes_for_a_gpu_that_is_not_here():
    done = run("plan", "32x256x56x56", "--hidden", "16", "--device", "A100")
    assert done.exit_code == 0
    assert re.search(r"squeeze: \d+ blocks", done.stdout)
    assert f"maps: {2 * 32 * 256 * 56 * 56 * 2} bytes read, {32 * 256 * 56 * 56 * 2} written" in done.stdout
    assert "weight_gradients" in run("plan", "32x256x56x56", "--hidden", "16", "--backward").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("32xa",), "SHAPE is '32xa'; wanted three to five sizes"),
        (("32x256",), "SHAPE is '32x256'; wanted three to five sizes"),
        (("1x8x7x7", "--device", "V100"), "device is 'V100'; wanted one of T4"),
        (("1x8x7x7", "--dtype", "int8"), "dtype is 'int8'; wanted float32"),
        (("1x8x7x7", "--forced", "vec_bytes=16"), "vec_bytes=16 with elements of 2 bytes, spans of 98 bytes"),
        (("0x8x7x7",), "n is 0; wanted 1 or more"),
        (("1x8x-7x-7",), "SHAPE is '1x8x-7x-7'; wanted sizes of 1 or more"),
        (("9223372036854775808x8x7x7",), "SHAPE gives 9223372036854775808; wanted at most 2^63 - 1"),
        (("1x8x4294967296x4294967296",), "SHAPE gives 18446744073709551616; wanted at most 2^63 - 1"),
        (("1x8x7x7", "--hidden", "9223372036854775808"), "--hidden gives 9223372036854775808; wanted at most 2^63 - 1"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(arguments, message):
    done = run("plan", "--hidden", "2", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def run_process(*arguments, cwd=None):
    command = [sys.executable, "-m", "se_fused", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def assert_refused(result, text):
    assert result.exit_code == 2
    assert re.fullmatch(r"error: .+\n", result.stderr)
    assert text in result.stderr


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The name of a module of models that can be imported."""
    name = f"models_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.fixture
def few_cases(monkeypatch):
    calls = [{"options": {"act": "silu"}}, {"n": 2, "c": 10, "r": 3, "spatial": (3, 5, 4)}]
    monkeypatch.setattr(cases, "GRID_CALLS", calls)
    monkeypatch.setattr(cases, "AFFINE_CALLS", [])


def test_info(native, monkeypatch, tmp_path):
    monkeypatch.setenv("SE_FUSED_CACHE", str(tmp_path))
    facts = json.loads(run("info", "--json").stdout)
    assert facts["torch"] == torch.__version__
    assert facts["environment"]["SE_FUSED_CACHE"] == str(tmp_path)
    (build,) = (build for build in facts["native"]["builds"] if build["group"] == "cpu")
    assert build["place"] == "package"
    assert build["problem"] is None
    assert build["compiler"]
    assert build["built"] > "2026"
    assert "baseline" in build["instruction_sets"]
    assert facts["native"]["cache"] == str(tmp_path)
    assert "baseline" in facts["cpu_features"]
    assert facts["backends"]["cpu"].keys() == set(se_fused.backends.ALL)
    assert facts["backends"]["cpu"]["cpu"] is None
    assert facts["backends"]["cpu"]["cuda"]
    shown = run("info").stdout
    assert torch.__version__ in shown
    assert re.search(r"cpu on cpu\W+usable", shown)


def test_info_says_why_there_is_no_compiled_part(monkeypatch):
    monkeypatch.setattr(se_fused.backends.CPU, "why_not", lambda device: "no C++ compiler")
    facts = json.loads(run("info", "--json").stdout)
    assert facts["backends"]["cpu"]["cpu"] == "no C++ compiler"
    assert facts["cpu_features"] is None


def test_verify_passes_on_the_grid(native, monkeypatch):
    monkeypatch.setattr(cases, "GRID_LAYOUTS", ("every_second",))
    result = run("verify")
    assert result.exit_code == 0, result.output
    assert "run by the cpu backend" in result.stdout
    assert "wrong" not in result.output


@pytest.mark.parametrize("change", [lambda y: y * (1 + 1e-4), lambda y: y * float("nan")])
def test_verify_fails_on_wrong_numbers(few_cases, monkeypatch, change):
    right = verify.squeeze_excite
    monkeypatch.setattr(verify, "squeeze_excite", lambda *args, **options: change(right(*args, **options)))
    result = run("verify")
    assert result.exit_code == 1
    assert "3 wrong" in result.stdout or "6 wrong" in result.stdout
    assert re.search(r"wrong: .* in float64: \[", result.stderr)


def test_verify_sees_a_wrong_gradient(few_cases, monkeypatch):
    right = verify.squeeze_excite

    def wrong(x, *weights, **options):
        if x.requires_grad:
            x.register_hook(lambda dx: dx * 1.001)
        return right(x, *weights, **options)

    monkeypatch.setattr(verify, "squeeze_excite", wrong)
    assert verify.error(cases.Case())[1] == "dx"
    assert run("verify").exit_code == 1


def test_verify_refuses_what_is_not_there(few_cases):
    assert_refused(run("verify", "--device", "nonsense"), "nonsense")
    with se_fused.use_backend("cuda"):
        assert_refused(run("verify"), "cuda")


def test_layouts_of_the_grid_have_their_strides():
    t = torch.arange(120.0).reshape(2, 3, 4, 5)
    strided, last = (cases.LAYOUTS[name](t) for name in ("every_second", "channels_last"))
    assert torch.equal(strided, t)
    assert torch.equal(last, t)
    assert strided.stride() == (120, 40, 10, 2)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_replace_shows_layers_difference_and_times(models):
    result = run("replace", f"{models}:net", "--input", "2x3x9x9", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert "1 of 1 SE layer replaced" in result.stdout
    found = re.search(r"largest difference of the output: (\S+) of its largest number (\S+): (.*)", result.stdout)
    assert float(found[1]) < 1e-5
    assert float(found[2]) > 1e-2
    assert found[3] == "equal within rounding of float32"
    assert re.search(r"[\d.]+ ms before, [\d.]+ ms after", result.stdout)


def test_replace_prints_one_json_object(models):
    result = run("replace", f"{models}:net", "--input", "2x3x9x9", "--repeats", "1", "--json", "--dtype", "float64")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["replaced"] == {"1": "SELayer: C=8, R=2, relu, sigmoid"}
    assert facts["skipped"] == facts["near"] == {}
    assert 0 <= facts["relative"] <= facts["tolerance"] == 1024 * 2**-52
    assert facts["relative"] == facts["difference"] / facts["scale"]
    assert facts["verdict"] == "equal within rounding of float64"
    assert facts["seconds"].keys() == {"before", "after"}
    assert facts["failures"] == []


def test_replace_at_block_level(models):
    result = run("replace", f"{models}:net", "--input", "2x3x9x9", "--repeats", "1", "--level", "block")
    assert result.exit_code == 0, result.output
    assert "with their neighbours, in blocks: 1\n  1 + relu, in place\n" in result.stdout
    result = run("replace", f"{models}:net", "--input", "2x3x9x9", "--repeats", "1", "--level", "block", "--json")
    facts = json.loads(result.stdout)
    assert facts["blocks"] == {"": ["1 + relu, in place"]}
    assert facts["convolutions"] == {}
    assert run("replace", f"{models}:net", "--level", "network").exit_code == 2


@pytest.mark.parametrize(
    ("options", "reason"), [(["--exclude", "1"], "excluded by '1'"), (["--include", "2*"], "no pattern of include")]
)
def test_replace_passes_patterns_on(models, options, reason):
    result = run("replace", f"{models}:net", *options)
    assert result.exit_code == 1
    assert result.stderr == "error: nothing was replaced\n"
    assert reason in result.stdout
    assert "0 of 1 SE layer replaced" in result.stdout
    assert "ms before" not in result.stdout


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_replace_fails_on_a_pattern_without_a_match(models, option):
    result = run("replace", f"{models}:net", "--input", "1x3x9x9", "--repeats", "1", option, "*", option, "1.fx*")
    assert result.exit_code == 1
    assert f"error: {option} '1.fx*' matches the name of no module\n" in result.stderr
    assert "'*'" not in result.stderr
    assert ("ms before" in result.stdout) == (option == "--include")


def test_replace_counts_inline_layers(models):
    result = run("replace", f"{models}:Inline", "--input", "1x3x9x9", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("1 of 1 SE layer replaced (1 inline)\n")
    facts = json.loads(run("replace", f"{models}:Inline", "--input", "1x3x9x9", "--repeats", "1", "--json").stdout)
    assert facts["inline"] == {"": ["Inline: C=8, R=2, relu, sigmoid"]}


def test_replace_shows_near_misses_and_fails(models):
    result = run("replace", f"{models}:TwoMaps")
    assert result.exit_code == 1
    assert "near misses: 1" in result.stdout
    assert "SE written into the block: two fully connected layers [R=2, C=8]" in result.stdout
    facts = json.loads(run("replace", f"{models}:TwoMaps", "--json").stdout)
    assert list(facts["near"]) == [""]
    assert facts["failures"] == ["nothing was replaced"]


def test_replace_fails_on_another_output(models):
    result = run("replace", f"{models}:net", "--input", "1x3x9x9", "--repeats", "1")
    assert result.exit_code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.measure, "largest_difference", lambda got, wanted: 2e-4 * float(wanted.abs().max()))
        result = run("replace", f"{models}:net", "--input", "1x3x9x9", "--repeats", "1")
    assert result.exit_code == 1
    assert re.search(r"output: 2.0e-04 of its largest number \S+: differs\n", result.stdout)
    assert "error: the output differs" in result.stderr
    result = run("replace", f"{models}:make", "--arg", "nan", "--input", "1x3x9x9", "--repeats", "1", "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert facts["verdict"] == "cannot be compared: the output before replacing is not finite"
    assert facts["difference"] is None


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_replace_compares_outputs_of_several_tensors(models, kind):
    options = ["--arg", "scale=0.5", "--arg", "layers=2", "--arg", "extra=a=b", "--arg", "flag=True"]
    result = run("replace", f"{models}:make", "--arg", kind, *options, "--input", "1x3x9x9", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert "equal within rounding of float32" in result.stdout


def test_replace_builds_with_arguments():
    given = ["mobilenetv3_large_100", "1000", "a=1", "b=1e-3", "c=None", "d=False", "e=relu", "f=[1]", "1x=2", "g="]
    assert specified.arguments(given) == (
        ["mobilenetv3_large_100", "1000", "1x=2"],
        {"a": 1, "b": 1e-3, "c": None, "d": False, "e": "relu", "f": "[1]", "g": ""},
    )


def test_replace_takes_dtype_and_order(models):
    options = ("--dtype", "bfloat16", "--channels-last", "--input", "1x3x9x9", "--repeats", "1")
    result = run("replace", f"{models}:net", *options)
    assert result.exit_code == 0, result.output
    assert "equal within rounding of bfloat16" in result.stdout
    model, x = specified.placed(torch.nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 5, 4), "cpu", "float64", True)
    assert x.dtype is model.weight.dtype is torch.float64
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--dtype", "int8"], "--dtype is 'int8'; wanted one of float32"),
        (["--device", "nonsense"], "--device is 'nonsense'"),
        (["--channels-last", "--input", "1x3x9"], "wants an input of 4 or 5 dimensions, not 3"),
        (["--arg", "x=1"], "raised TypeError: "),
    ],
)
def test_replace_refuses_options(models, options, text):
    assert_refused(run("replace", f"{models}:net", *options), text)


def test_replace_refuses_an_output_without_tensors(models):
    result = run("replace", f"{models}:make", "--arg", "none", "--input", "1x3x9x9")
    assert result.exit_code == 2
    assert "the model gives a str in which no tensor is found" in result.stderr


@pytest.mark.parametrize(
    ("spec", "shape", "text"),
    [
        ("net", "1x3x9x9", "wanted module:callable"),
        ("no_such_module:net", "1x3x9x9", "No module named 'no_such_module'"),
        ("math:no_such_name", "1x3x9x9", "no_such_name"),
        ("builtins:dict", "1x3x9x9", "gave a dict"),
        ("{models}:broken", "1x3x9x9", "RuntimeError: no such weights"),
        ("{models}:net", "1x3xmany", "--input is '1x3xmany'"),
        ("{models}:net", "1x3x-9x9", "--input is '1x3x-9x9'"),
        ("{models}:net", "1x4x9x9", "on a random input of 1x4x9x9"),
    ],
)
def test_replace_refuses_in_one_line(models, spec, shape, text):
    assert_refused(run("replace", spec.format(models=models), "--input", shape), text)


def test_a_missing_package_is_named():
    code = "import sys; sys.modules['typer'] = None; import se_fused.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: the command line needs typer: pip install typer rich psutil\n"


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
