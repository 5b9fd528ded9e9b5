"""Fitting the planner's model, and what it predicts for GPUs that nobody has measured."""

import math
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import gpu_report, predicted
from dev import refit
from se_fused import native

RECORD = refit.RESULTS / "h200"


@pytest.fixture(scope="module")
def model():
    return refit.Model()


def test_the_constants_have_the_names_of_the_struct(model):
    for backward in (False, True):
        assert len(refit.names()) == len(model.constants(backward)) == 18
    for title, backward in (("kForward", False), ("kBackward", True)):
        assert refit.text(title, model.constants(backward)) in (refit.ROOT / "csrc/plan/model.cpp").read_text()


def test_a_prediction_is_the_planner_s(model):
    row = next(row for row in refit.read("h200") if row.plan.startswith("cluster"))
    n, c, h, w = row.shape
    facts = native.load_extension()
    for backward in (False, True):
        (us,) = model.predict([model.plan(row, backward)], model.constants(backward))
        plan = facts.plan(
            facts.preset("H200"), n=n, c=c, r=row.r, l=h * w, dtype=row.dtype, channels_last=row.channels_last,
            backward=backward, forced=row.plan,
        )  # fmt: skip
        assert us == pytest.approx(plan.predicted_us)
    assert model.plan(replace(row, plan="cluster size=3 threads=256"), False) is None
    assert model.plan(replace(row, gpu="no GPU"), False) is None


def test_a_fit_finds_what_the_times_were_made_from(model):
    """Times that a model with other constants gives are predicted by the fitted one, and the choice with them."""
    rows, constants = refit.read("h200"), model.constants(False)
    timed = refit.Timed.of(model, rows, "forward")
    assert len(timed.rows) > 200
    low, high = np.array([refit.BOUNDS.get(name, (0, np.inf)) for name in refit.names()]).T
    others = np.clip(constants * np.random.default_rng(0).uniform(0.7, 1.4, len(constants)), low, high)
    made = timed.predict(model, others, constants)
    timed = replace(timed, rows=[replace(row, us=us) for row, us in zip(timed.rows, made, strict=True)])
    before = timed.predict(model, constants, constants)
    found = refit.fit(lambda k: timed.predict(model, k, constants), timed.measured(), timed.weights(), constants)
    after = timed.predict(model, found, constants)
    near = timed.weights() > 0.64

    def off(us):
        return np.abs(np.log(us / made))[near]

    assert np.median(off(after)) < 0.01 < 0.05 < np.median(off(before))
    assert off(after).max() < 0.05
    assert max(timed.losses(after)) < 0.05
    assert ((low <= found) & (found <= high)).all()


def test_torch_compile_s_model_gives_its_recorded_times():
    constants, gpu = predicted.compile_model(RECORD), native.load_extension().preset("H200")
    off = []
    for case in gpu_report.best_measured(gpu_report.read(RECORD)):
        line = case.lines.get(("graph", "compile"))
        if line and case.direction == "forward":
            n, c, side, _ = map(int, case.shape.split("x"))
            call = predicted.Call(gpu, case.dtype, case.layout, n, c, int(line["r"]), side)
            off.append(float(np.dot(constants, call.compile_terms())) / float(line["p50_us"]))
    assert len(off) >= 36
    assert 0.8 < min(off) < max(off) < 1.25


def test_every_call_that_is_predicted_to_lose_has_its_reason():
    constants, text = predicted.compile_model(RECORD), predicted.table(RECORD)
    for gpu in predicted.GPUS:
        found = predicted.predict(gpu, constants)
        assert len(found) == len(predicted.SHAPES) * 3 * 2 * 2
        lost = Counter(each.why for each in found if each.compile < each.ours)
        for each in found:
            assert ("weights outweigh" in each.why) <= (2 * each.call.r > each.call.side**2)
            assert ("x is read twice" in each.why) == str(each.call.plan()).startswith("two_pass")
        printed = dict(re.findall(rf"^\| {gpu} \| (.*?) \| (\d+) of ", text, re.MULTILINE))
        assert printed == {why: str(count) for why, count in lost.items()}
        clusters = any(native.load_extension().preset(gpu).clusters)
        assert clusters == (set(lost) != {"the GPU has no clusters: x is read twice, by several launches"})


def test_the_table_of_the_sweep_names_the_calls_where_another_plan_is_faster():
    """From the ratios that were recorded; the table is made from times."""
    text = predicted.against(RECORD)
    fastest = defaultdict(lambda: math.inf)
    for line in gpu_report.read(RECORD).plans:
        call = f"{line['shape']} {line['layout']}, {gpu_report.DIRECTIONS[line['direction']]}"
        fastest[call] = min(fastest[call], float(line["ratio_to_planner"]))
    for call, ratio in fastest.items():
        if abs(ratio - 0.95) > 0.005:  # of medians, and the median of ratios
            assert (f"| {call} |" in text) == (ratio < 0.95), call
    medians = [float(cell) for cell in re.findall(r"\| (\d\.\d\d) \(", text)]
    assert len(medians) >= 11
    assert all(0.8 < median < 1.25 for median in medians)


def test_the_record_of_a_gpu_that_has_no_preset_is_refused():
    assert refit.preset("rtx4090") == "RTX 4090"
    with pytest.raises(ValueError, match="the GPU is 'h900'; wanted one of t4, a100"):
        refit.preset("h900")
