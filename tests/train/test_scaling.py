"""What the law predicts is true as often as it says, and it says nothing where it cannot."""

import dataclasses
import json
import math

import numpy as np
import pytest

from nanollm.train.scaling import LEVEL, Ladder, Point, fit, regress, seconds_of, seen, tokens_per_step

SIZES = {700_000: 46_000, 1_700_000: 19_000, 2_900_000: 11_000, 5_300_000: 6_000, 8_500_000: 4_000}  # tokens/s
FAR = (16_600_000, 7e6)


def truth(parameters: float, tokens: float, e=0.75, a=35.0, alpha=0.35, b=26.0, beta=0.25) -> float:
    return e + a / parameters**alpha + b / tokens**beta


def ladder(seed: int = 0, noise: float = 0.003, sizes: int = 5, loss=truth) -> list[Point]:
    """Three runs of each size, as long as 15 minutes allow, a third of it and a ninth."""
    draw = np.random.default_rng(seed)
    places = [(n, 900 * rate / part) for n, rate in list(SIZES.items())[:sizes] for part in (9, 3, 1)]
    return [Point(n, d, loss(n, d) * (1 + noise * draw.standard_normal())) for n, d in places]


def test_known_coefficients_are_recovered():
    found = fit(ladder(noise=1e-4)).best()
    assert found["alpha"] == pytest.approx(0.35, abs=0.1)
    assert found["beta"] == pytest.approx(0.25, abs=0.05)
    assert found["E"] == pytest.approx(0.75, abs=0.1)
    assert found["noise"] < 0.003
    assert fit(ladder(noise=1e-4)).predict(*FAR).value == pytest.approx(truth(*FAR), rel=0.003)


@pytest.mark.parametrize("sizes", [3, 5])
def test_a_run_far_from_the_ladder_ends_in_the_interval_as_often_as_it_says(sizes):
    draw, runs = np.random.default_rng(1), 60
    expected = [regress(ladder(seed, sizes=sizes)).expect(*FAR) for seed in range(runs)]
    inside = sum(each.low <= truth(*FAR) * (1 + 0.003 * draw.standard_normal()) <= each.high for each in expected)
    assert inside >= LEVEL * runs - 2 * math.sqrt(LEVEL * (1 - LEVEL) * runs)
    assert max(each.error for each in expected) < 0.05  # and it says something


def test_a_run_that_contradicts_the_others_takes_the_number_away():
    points = ladder()
    points[7] = dataclasses.replace(points[7], loss=1.15 * points[7].loss)
    with pytest.raises(ValueError, match=f"the fit does not hold: {points[7].parameters:,} parameters ended at"):
        fit(points)


@pytest.mark.parametrize("points", [[], ladder()[:6], [point for point in ladder() if point.tokens > 900 * 6_000]])
def test_too_few_runs_are_refused(points):
    with pytest.raises(ValueError, match="a fit needs 3 sizes, each trained on 2 numbers of tokens; there are"):
        fit(points)


def test_nothing_is_said_where_the_interval_would_say_nothing():
    with pytest.raises(ValueError, match="too far from the ladder's runs: the interval would be"):
        fit(ladder(noise=0.01, sizes=3)).predict(1e12, 1e13)


def test_repeated_text_counts_less_and_beyond_four_epochs_not_at_all(tmp_path):
    assert seen(5e5, 1e6) == 5e5
    assert 3.5e6 < seen(4e6, 1e6) < 4e6
    from tests.stages.conftest import MODEL

    shape = {"vocab_size": MODEL.vocab_size, "context_length": MODEL.context_length}
    small = Ladder("small", ladder(), 1e6, shape)
    assert small.predict(MODEL, 4e6).value > Ladder("large", ladder(), 1e9, shape).predict(MODEL, 4e6).value
    with pytest.raises(ValueError, match=f"have context_length 2,048, this one has {MODEL.context_length}"):
        Ladder("longer", ladder(), 1e9, shape | {"context_length": 2048}).predict(MODEL, 4e6)
    with pytest.raises(ValueError, match=r"4,100,000 tokens are 4\.1 epochs of the text"):
        small.predict(MODEL, 4.1e6)
    file = tmp_path / "scale.json"
    runs = [
        {"parameters": each.parameters, "seen": each.tokens, "val_bpb": each.loss, "model": shape}
        for each in small.points
    ]
    file.write_text(json.dumps({"text_tokens": 1e6, "runs": runs}))
    assert Ladder.read(file).predict(MODEL, 4e6) == small.predict(MODEL, 4e6)
    runs[3]["val_bpb"] = None
    file.write_text(json.dumps({"text_tokens": 1e6, "runs": runs}))
    with pytest.raises(ValueError, match="1 of its 15 runs are missing"):
        Ladder.read(file).predict(MODEL, 4e6)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"is not a ladder; give the scale\.json of nanollm scale"):
        Ladder.read(file)


def test_the_batch_follows_the_tokens_as_measured():
    assert [round(math.log2(tokens_per_step(tokens))) for tokens in (1.43e6, 3.48e6)] == [12, 13]


@pytest.mark.parametrize(("budget", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400)])
def test_a_budget_is_a_time(budget, seconds):
    assert seconds_of(budget) == seconds


@pytest.mark.parametrize("budget", ["10", "", "m", "0s", "10m!", "-5m", "ten minutes"])
def test_what_is_no_time_is_refused(budget):
    with pytest.raises(ValueError, match="--budget: expected a time such as 90s, 10m or 1h30m, got"):
        seconds_of(budget)
