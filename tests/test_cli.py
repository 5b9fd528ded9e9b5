"""The command line: the output of each command; an error is one line with exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from command_line import run

import se_fused
from se_fused import __main__ as cli
from se_fused import cases, verify
from se_fused import given as specified


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
