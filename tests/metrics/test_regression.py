"""Scores of numbers: small cases by hand, any case as scikit-learn and SciPy have it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcllm.errors import DataError
from hpcllm.metrics import regression

VALUES = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, width=32))
PAIRS = st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=50).map(lambda pairs: np.array(pairs).T)


def test_a_small_case_by_hand():
    told = regression.scores([1, 2, 3, 4], [1, 3, 2, 6])
    assert told.pop("rmse") == pytest.approx(math.sqrt(6 / 4))
    # Deviations -1.5 -0.5 0.5 1.5 and -2 0 -1 3; ranks 1 3 2 4.
    assert told.pop("pearson") == pytest.approx(7 / math.sqrt(5 * 14))
    assert told == pytest.approx({"mse": 6 / 4, "mae": 4 / 4, "r2": 1 - 6 / 5, "spearman": 0.8})


def test_equal_values_share_the_mean_of_their_places():
    assert regression.places([10, 20, 10, 5, 10]).tolist() == [3, 5, 3, 1, 3]


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e10])
def test_constant_values_give_numbers(constant):
    # The mean of three times 0.1 is not 0.1, so that deviations alone would show a perfect correlation.
    same, other = [constant] * 3, [1.0, 2.0, 4.0]
    for pair in ((same, other), (other, same), (same, same)):
        told = regression.scores(*pair)
        assert told["pearson"] == told["spearman"] == 0.0 and all(map(math.isfinite, told.values()))
    assert regression.r2(same, same) == 1.0 and regression.r2(same, other) == 0.0
    assert regression.r2([3.0], [3.0]) == 1.0 and regression.pearson([3.0], [2.0]) == 0.0


def test_perfect_is_perfect_and_never_more():
    values = np.random.default_rng(0).normal(size=(200, 7))
    for row in values:
        assert -1 <= regression.pearson(row, -3 * row) <= -1 + 1e-15 and 1 - 1e-15 <= regression.pearson(row, row) <= 1
        assert regression.r2(row, row) == 1.0 and regression.mse(row, row) == 0.0


@settings(deadline=None)
@given(PAIRS, st.randoms())
def test_the_order_of_the_examples_does_not_change_a_bit(pair, random):
    order = list(range(pair.shape[1]))
    random.shuffle(order)
    assert regression.scores(*pair) == regression.scores(*pair[:, order])


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match=r"\(0,\) gold values and \(0,\) found"):
        regression.mse([], [])
    with pytest.raises(DataError, match=r"\(2,\) gold values and \(3,\) found"):
        regression.scores([1, 2], [1, 2, 3])
    with pytest.raises(DataError, match="found value of example 1 is nan"):
        regression.pearson([1, 2], [1, math.nan])


@settings(deadline=None)
@given(PAIRS)
def test_scores_are_those_of_scikit_learn_and_scipy(pair):
    metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    gold, found = pair
    told = regression.scores(gold, found)
    assert told["mse"] == pytest.approx(metrics.mean_squared_error(gold, found), rel=1e-12)
    assert told["mae"] == pytest.approx(metrics.mean_absolute_error(gold, found), rel=1e-12)
    if min(np.ptp(gold), np.ptp(found)) > 1e-3 * np.abs(pair).max():
        assert told["r2"] == pytest.approx(metrics.r2_score(gold, found), rel=1e-9, abs=1e-9)
        assert told["pearson"] == pytest.approx(stats.pearsonr(gold, found).statistic, abs=1e-9)
    if min(np.ptp(gold), np.ptp(found)) > 0:
        assert told["spearman"] == pytest.approx(stats.spearmanr(gold, found).statistic, abs=1e-12)
    np.testing.assert_array_equal(regression.places(gold), stats.rankdata(gold))
