"""Scores of entities: small cases by hand, any case as seqeval and scikit-learn have it."""

import functools
import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpcllm.errors import DataError
from hpcllm.metrics import entities, tags

GOLD = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "O"]]
FOUND = [["B-PER", "I-PER", "O", "B-ORG"], ["O", "B-ORG", "I-ORG"]]
BIOES = ["O", *map("-".join, itertools.product("BIES", ["PER", "A-B", "a type with a long name"]))]
BIO = [tag for tag in BIOES if tag[0] in "OBI"]


def sentences(names):
    """Gold and found tags of several sentences, of the same lengths."""
    pair = st.tuples(st.sampled_from(names), st.sampled_from(names))
    several = st.lists(st.lists(pair, min_size=1, max_size=8), min_size=1, max_size=6)
    return several.map(lambda all: [[[one[side] for one in sentence] for sentence in all] for side in (0, 1)])


def test_entities_are_counted_and_scored_by_hand():
    counts = entities.count(GOLD, FOUND)
    assert counts.types() == ["LOC", "ORG", "PER"]
    assert [each.tolist() for each in counts.arrays()] == [[0, 0, 1], [0, 2, 1], [1, 1, 1]]
    told = entities.scores(counts)
    assert (told["precision"], told["recall"], told["f1"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert (told["precision_macro"], told["accuracy"]) == pytest.approx((1 / 3, 5 / 7))


def test_the_report_of_conlleval_is_text_to_the_last_space():
    assert entities.conlleval_report(entities.count(GOLD, FOUND)) == (
        "processed 7 tokens with 3 phrases; found: 3 phrases; correct: 1.\n"
        "accuracy:  71.43%; precision:  33.33%; recall:  33.33%; FB1:  33.33\n"
        "              LOC: precision:   0.00%; recall:   0.00%; FB1:   0.00  0\n"
        "              ORG: precision:   0.00%; recall:   0.00%; FB1:   0.00  2\n"
        "              PER: precision: 100.00%; recall: 100.00%; FB1: 100.00  1\n"
    )


def test_the_report_is_text_to_the_last_space():
    assert entities.report(entities.count(GOLD, FOUND)) == (
        "              precision    recall  f1-score   support\n"
        "\n"
        "         LOC     0.0000    0.0000    0.0000         1\n"
        "         ORG     0.0000    0.0000    0.0000         1\n"
        "         PER     1.0000    1.0000    1.0000         1\n"
        "\n"
        "   micro avg     0.3333    0.3333    0.3333         3\n"
        "   macro avg     0.3333    0.3333    0.3333         3\n"
        "weighted avg     0.3333    0.3333    0.3333         3\n"
    )


def test_f1_is_rounded_as_seqeval_rounds_it():
    # 2 * 2 / (123 + 5) is 0.03125, but from precision and recall it comes out a little above, and prints as 0.0313.
    gold, found = [["B-A"] * 5 + ["O"] * 121], [["B-A"] * 2 + ["O"] * 3 + ["B-A"] * 121]
    counts = entities.count(gold, found)
    for row in ("        A", "micro avg", "macro avg"):
        assert f"   {row}     0.0163    0.4000    0.0313         5\n" in entities.report(counts)
    assert all(entities.scores(counts)[name] > 0.03125 for name in ("f1", "f1_macro", "f1_weighted"))


def test_a_row_per_tag_with_o_among_them():
    assert entities.token_report([["B-A", "I-A", "O", "O"]], [["B-A", "O", "O", "O"]]) == (
        "              precision    recall  f1-score   support\n"
        "\n"
        "         B-A     1.0000    1.0000    1.0000         1\n"
        "         I-A     0.0000    0.0000    0.0000         1\n"
        "           O     0.6667    1.0000    0.8000         2\n"
        "\n"
        "    accuracy                         0.7500         4\n"
        "   macro avg     0.5556    0.6667    0.6000         4\n"
        "weighted avg     0.5833    0.7500    0.6500         4\n"
    )
    assert "      B-B     0.0000" in entities.token_report([["O"]], [["O"]], names=["O", "B-B"])
    with pytest.raises(DataError, match="tag 'B-C' is none of O, B-B"):
        entities.token_report([["O"]], [["B-C"]], names=["O", "B-B"])


def test_without_entities_every_score_is_zero():
    counts = entities.count([["O", "O"]], [["O", "O"]])
    assert entities.scores(counts).pop("accuracy") == 1.0
    assert sum(entities.scores(counts).values()) == 1.0
    assert "   micro avg     0.0000    0.0000    0.0000         0\n" in entities.report(counts)
    assert entities.conlleval_report(counts).startswith("processed 2 tokens with 0 phrases; found: 0 phrases;")
    assert set(entities.scores(entities.count([], [])).values()) == {0.0}
    assert entities.conlleval_report(entities.count([], [])).count("\n") == 1
    assert entities.token_report([], []).count("0.0000") == 7


def test_sentences_that_do_not_belong_together_are_refused():
    with pytest.raises(DataError, match=r"sentence 1 \(from 0\) has 2 gold tags, but 1 found"):
        entities.count([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(DataError, match="1 gold sentences, but 0 found"):
        entities.token_report([["O"]], [])


@settings(deadline=None)
@given(sentences(BIO), st.integers(0, 6))
def test_counts_of_parts_add_up_to_those_of_all(case, cut):
    gold, found = case
    parts = entities.count(gold[:cut], found[:cut]) + entities.count(gold[cut:], found[cut:])
    assert parts == entities.count(gold, found)
    assert entities.report(parts) == entities.report(entities.count(gold, found))


@settings(deadline=None)
@given(sentences(BIOES), st.integers(0, 5))
def test_scores_and_report_are_those_of_seqeval(case, digits):
    metrics = pytest.importorskip("seqeval.metrics.sequence_labeling")
    gold, found = case
    counts = entities.count(gold, found)
    assume(counts.types())
    told = entities.scores(counts)
    assert told["accuracy"] == metrics.accuracy_score(gold, found)
    for average, ending in (("micro", ""), ("macro", "_macro"), ("weighted", "_weighted")):
        theirs = metrics.precision_recall_fscore_support(gold, found, average=average, zero_division=0)
        assert [told[name + ending] for name in ("precision", "recall", "f1")] == list(theirs[:3])
    assert entities.report(counts, digits) == metrics.classification_report(gold, found, digits=digits, zero_division=0)


@settings(deadline=None)
@given(sentences(BIO))
def test_the_strict_report_is_that_of_seqeval(case):
    metrics, scheme = pytest.importorskip("seqeval.metrics"), pytest.importorskip("seqeval.scheme")
    gold, found = case
    counts = entities.count(gold, found, functools.partial(tags.strict_spans, scheme="IOB2"))
    assume(counts.types())
    options = {"digits": 4, "mode": "strict", "scheme": scheme.IOB2, "zero_division": 0}
    assert entities.report(counts) == metrics.classification_report(gold, found, **options)


@settings(deadline=None)
@given(sentences(BIO))
def test_the_report_of_tags_is_that_of_scikit_learn(case):
    metrics = pytest.importorskip("sklearn.metrics")
    flat = [[tag for sentence in side for tag in sentence] for side in case]
    assert entities.token_report(*case) == metrics.classification_report(*flat, digits=4, zero_division=0)
