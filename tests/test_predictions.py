"""Fitting the planner's model, and what it predicts for GPUs that nobody has measured."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import gpu_report, predicted, refit
from se_fused import native

RECORD = refit.RESULTS / "h200"


@pytest.fixture(scope="module")
def model():
    return refit.Model()


def test_the_constants_have_the_names_of_the_struct(model):
    for backward in (False, True):
        assert len(refit.names()) == len(model.constants(backward)) == 18
    printed = refit.text("kForward", model.constants(False))
    assert printed in (refit.ROOT / "csrc/plan/model.cpp").read_text()


def test_a_prediction_is_the_planner_s(model):
    row = next(row for row in refit.read("h200") if row.plan != "two_pass")
    n, c, h, w = row.shape
    facts = native.load_facts()
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
    constants, gpu = predicted.compile_model(RECORD), native.load_facts().preset("H200")
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
        printed = dict(re.findall(rf"^\| {gpu} \| (.*?) \| (\d+) of ", text, re.MULTILINE))
        assert printed == {why: str(count) for why, count in lost.items()}
        clusters = any(native.load_facts().preset(gpu).clusters)
        assert clusters == (set(lost) != {"the GPU has no clusters: x is read twice, by several launches"})


def test_the_table_of_the_sweep_names_the_calls_whose_choice_is_not_the_fastest():
    text = predicted.against(RECORD)
    timed = [row for row in refit.read("h200") if row.direction == "forward"]
    calls = {row.call for row in timed}
    missed = 0
    for call in calls:
        plans = [predicted.planned(row) for row in timed if row.call == call]
        chosen, fastest = min(plans, key=lambda p: p.predicted), min(plans, key=lambda p: p.measured)
        shape, _, _, channels_last, _ = call
        line = f"| {'x'.join(map(str, shape))} {'channels_last' if channels_last else 'contiguous'}, forward | "
        slower = chosen.measured > 1.05 * fastest.measured
        missed += slower
        assert (
            line + f"{chosen.name}: {chosen.predicted:.1f} predicted, {chosen.measured:.1f} measured" in text
        ) == slower
    assert 0 < missed < len(calls) / 4
