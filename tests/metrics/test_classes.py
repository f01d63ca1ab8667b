"""Scores of classes: small cases by hand, any case as scikit-learn has it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcllm.errors import DataError
from hpcllm.metrics import classes

GOLD, FOUND = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 0]
NAMES = ["cat", "dog", "a name longer than weighted avg"]


@st.composite
def pairs(draw):
    """Classes in gold and found, and how many there are; often classes that neither has."""
    count = draw(st.integers(1, 6))
    used = draw(st.integers(1, count))
    pair = st.tuples(st.integers(0, used - 1), st.integers(0, count - 1))
    gold, found = np.array(draw(st.lists(pair, min_size=1, max_size=60))).T
    return gold, found, count


@st.composite
def indicators(draw):
    rows, labels = draw(st.tuples(st.integers(1, 12), st.integers(2, 5)))
    cells = st.lists(st.booleans(), min_size=rows * labels, max_size=rows * labels)
    return [np.array(draw(cells)).reshape(rows, labels) for _ in range(2)]


def test_a_small_matrix_scored_by_hand():
    matrix = classes.confusion(GOLD, FOUND, 3)
    assert matrix.dtype == np.int64 and matrix.tolist() == [[2, 1, 0], [0, 1, 1], [1, 0, 0]]
    told = classes.scores(matrix)
    assert told["accuracy"] == told["f1_micro"] == 3 / 6
    assert told["precision"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert told["recall"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert told["f1_weighted"] == pytest.approx((3 * 2 / 3 + 2 * 1 / 2 + 1 * 0) / 6)
    # Covariances of R_K: 6 * 3 - (3*3 + 2*2 + 1*1) over 36 - (9 + 4 + 1), the same for both.
    assert told["matthews_correlation"] == pytest.approx(4 / 22)


def test_the_report_is_text_to_the_last_space():
    assert classes.report(classes.confusion([0, 1, 1], [0, 1, 0], 2), ["no", "yes"], digits=2) == (
        "              precision    recall  f1-score   support\n"
        "\n"
        "          no       0.50      1.00      0.67         1\n"
        "         yes       1.00      0.50      0.67         2\n"
        "\n"
        "    accuracy                           0.67         3\n"
        "   macro avg       0.75      0.75      0.67         3\n"
        "weighted avg       0.83      0.67      0.67         3\n"
    )


def test_without_examples_every_score_is_zero():
    assert set(classes.scores(classes.confusion([], [], 3)).values()) == {0.0}
    none = classes.multilabel_counts(np.zeros((0, 2)), np.zeros((0, 2)))
    assert set(classes.multilabel_scores(none).values()) == {0.0}


def test_a_class_that_does_not_occur_counts_in_macro_averages_alone():
    two, three = (classes.scores(classes.confusion([0, 1], [0, 1], count)) for count in (2, 3))
    assert two["f1"] == 1.0 and three["f1"] == pytest.approx(2 / 3)
    assert two["f1_weighted"] == three["f1_weighted"] == two["f1_micro"] == three["f1_micro"] == 1.0


def test_matthews_holds_for_counts_beyond_64_bits():
    matrix = np.array([[3, 1], [1, 3]]) * 10**17
    assert classes.matthews(matrix) == pytest.approx(0.5)
    assert classes.matthews(np.array([[3, 2], [0, 0]])) == 0.0


def test_what_cannot_be_counted_is_refused_by_its_place():
    with pytest.raises(DataError, match="found class of example 1 is 3, not one of 0 to 2"):
        classes.confusion([0, 1], [0, 3], 3)
    with pytest.raises(DataError, match="gold class of example 0 is -100"):
        classes.confusion([-100, 1], [0, 1], 3)
    with pytest.raises(DataError, match="2 gold classes, but 1 found"):
        classes.confusion([0, 1], [0], 3)
    with pytest.raises(DataError, match=r"\(2, 3\) in gold and \(2, 2\) found"):
        classes.multilabel_counts(np.zeros((2, 3)), np.zeros((2, 2)))


def test_multilabel_scores_by_hand():
    gold = [[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]]
    found = [[1, 0, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0]]
    counts = classes.multilabel_counts(gold, found)
    assert counts.labels.tolist() == [[2, 1, 0], [0, 0, 2], [1, 0, 0]] and (counts.rows, counts.exact) == (4, 2)
    told = classes.multilabel_scores(counts)
    assert told["accuracy"] == 0.5
    assert (told["precision_micro"], told["recall_micro"], told["f1_micro"]) == pytest.approx((3 / 4, 3 / 5, 6 / 9))
    assert told["f1"] == pytest.approx((4 / 5 + 0 + 1) / 3)
    assert told["f1_weighted"] == pytest.approx((2 * 4 / 5 + 2 * 0 + 1) / 5)
    assert told["f1_samples"] == pytest.approx((2 / 3 + 0 + 1 + 0) / 4)


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(deadline=None)
@given(pairs(), st.integers(0, 6))
def test_scores_and_report_are_those_of_scikit_learn(case, digits):
    metrics = pytest.importorskip("sklearn.metrics")
    gold, found, count = case
    labels, names = range(count), [f"class {number}" * (number + 1) for number in range(count)]
    matrix = classes.confusion(gold, found, count)
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(gold, found, labels=labels))
    told = classes.scores(matrix)
    assert told["accuracy"] == metrics.accuracy_score(gold, found)
    assert told["matthews_correlation"] == pytest.approx(metrics.matthews_corrcoef(gold, found), abs=1e-15)
    options = {"labels": labels, "zero_division": 0}
    each = metrics.precision_recall_fscore_support(gold, found, **options)
    np.testing.assert_array_equal(classes.rates(np.diagonal(matrix), matrix.sum(0), matrix.sum(1)), each[:3])
    for average, ending in (("micro", "_micro"), ("macro", ""), ("weighted", "_weighted")):
        theirs = metrics.precision_recall_fscore_support(gold, found, average=average, **options)
        assert [told[name + ending] for name in ("precision", "recall", "f1")] == list(theirs[:3])
    text = metrics.classification_report(gold, found, target_names=names, digits=digits, **options)
    assert classes.report(matrix, names, digits) == text


@settings(deadline=None)
@given(indicators())
def test_multilabel_scores_and_report_are_those_of_scikit_learn(case):
    metrics = pytest.importorskip("sklearn.metrics")
    gold, found = case
    counts = classes.multilabel_counts(gold, found)
    told = classes.multilabel_scores(counts)
    assert told["accuracy"] == metrics.accuracy_score(gold, found)
    for average, ending in (("micro", "_micro"), ("macro", ""), ("weighted", "_weighted"), ("samples", "_samples")):
        theirs = metrics.precision_recall_fscore_support(gold, found, average=average, zero_division=0)
        assert [told[name + ending] for name in ("precision", "recall", "f1")] == pytest.approx(theirs[:3], abs=1e-15)
    names = [f"label {number}" for number in range(gold.shape[1])]
    text = metrics.classification_report(gold, found, target_names=names, digits=4, zero_division=0)
    assert classes.multilabel_report(counts, names) == text
