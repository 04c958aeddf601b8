"""What an erasure leaves of a real model's states: a trace in later rows of the run, and none once they went too."""

import json
import math

import numpy as np
import pytest

from raymem.bench import leaks


def test_later_rows_tell_what_was_erased_and_nothing_does_once_they_are_gone(raymem, tmp_path):
    file = tmp_path / "leaks.json"

    ran = raymem("bench", "erasure", "--small", "--json", file)

    assert ran.code == 0, ran.err
    found = json.loads(file.read_text())
    chance, bound = found["chance"], found["bound"]
    assert (chance, found["documents"]) == (0.25, 48)
    for attack in ("probe", "nearest"):
        for distance, hit in found[attack]["run"].items():
            assert hit["top1"] <= bound, (attack, distance)
            assert abs(hit["auc"] - 0.5) < 0.05, (attack, distance)
    # the probe finds it, and so does a search without any training: the attacks are able to
    assert found["probe"]["rows"]["1"]["top1"] > max(bound, 0.6)
    assert found["probe"]["rows"]["8"]["top1"] > bound
    assert found["nearest"]["rows"]["1"]["top1"] > bound
    # nine rows after each of 48 secrets
    assert found["exposed_rows"] == {"run": 0, "rows": 48 * 9}
    assert "first guess right" in ran.out


def test_the_probe_is_the_ridge_that_others_fit():
    linear_model = pytest.importorskip("sklearn.linear_model")
    draw = np.random.default_rng(0)
    train, wanted, test = draw.normal(size=(20, 31)), draw.normal(size=(20, 3)), draw.normal(size=(7, 31))

    said = leaks.ridge(train, wanted, test, strength=2.5)

    np.testing.assert_allclose(said, linear_model.Ridge(alpha=2.5).fit(train, wanted).predict(test), atol=1e-9)


def test_the_area_is_the_one_that_others_find():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    scores, is_it = draw.integers(0, 6, 40).astype(float), draw.random(40) < 0.3

    assert leaks.auc(scores, is_it) == pytest.approx(metrics.roc_auc_score(is_it, scores))


@pytest.mark.parametrize(("trials", "chance"), [(48, 0.25), (256, 0.125), (1, 0.5)])
def test_no_more_guesses_are_right_by_luck(trials, chance):
    bound = leaks.binomial_bound(trials, chance)

    def above(hits: int) -> float:
        return sum(
            math.comb(trials, more) * chance**more * (1 - chance) ** (trials - more)
            for more in range(hits + 1, trials + 1)
        )

    assert above(bound) < 1e-3
    assert bound == 0 or above(bound - 1) >= 1e-3
