"""Scores of answers: cases by hand, and any case as the definition, written once more here, has it."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcllm.errors import DataError
from hpcllm.metrics import answers

TEXTS = st.lists(st.sampled_from(["a", "The", "cat", "cat!", "Dog", "-", "u.s.", "1998"]), max_size=4).map(" ".join)
QUESTIONS = st.lists(
    st.tuples(st.lists(TEXTS, max_size=3), TEXTS, st.sampled_from([0.0, 0.2, 0.5, 0.5, 1.0, -3.5])),
    min_size=1,
    max_size=12,
)


def test_answers_are_normalised():
    assert answers.normalise(" The  U.S. Army's\tan-them, a  theatre ") == "us armys anthem theatre"
    assert answers.normalise("A, an; THE!") == "" == answers.normalise("")
    assert answers.normalise("Élan «vital»") == "élan «vital»"  # only ASCII's punctuation goes


def test_one_answer_by_hand():
    assert answers.exact("the Cat.", "cat") == 1.0 and answers.exact("cat", "cats") == 0.0
    # "black cat" and "cat sat black cat": 2 of 2 words, 2 of 4 found.
    assert answers.f1("The black cat", "cat sat, black cat") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert answers.f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert answers.f1("", "cat") == answers.f1("cat", "") == answers.f1("cat", "dog") == 0.0


def test_answers_without_words_are_right_in_2_and_wrong_in_1():
    assert answers.f1("the", "a") == 1.0 and answers.f1("the", "a", version=1) == 0.0
    assert answers.squad1([["the"]], ["a"]) == {"exact_match": 100.0, "f1": 0.0}


def test_squad1_by_hand():
    told = answers.squad1([["Denver Broncos", "The Broncos"], ["1998"], ["Santa Clara"]], ["broncos", "1999", "Santa"])
    assert told["exact_match"] == pytest.approx(100 / 3)
    assert told["f1"] == pytest.approx(100 * (1 + 0 + 2 / 3) / 3)
    with pytest.raises(DataError, match="question 1 has no gold answer"):
        answers.squad1([["x"], []], ["x", ""])


def test_squad2_by_hand():
    golds = [["cat"], ["black cat"], [], []]
    found = ["cat", "cat", "", "dog"]
    assert answers.squad2(golds, found) == {
        "exact": 50.0,
        "f1": pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4),
        "total": 4,
        "HasAns_exact": 50.0,
        "HasAns_f1": pytest.approx(100 * (1 + 2 / 3) / 2),
        "HasAns_total": 2,
        "NoAns_exact": 50.0,
        "NoAns_f1": 50.0,
        "NoAns_total": 2,
    }
    told = answers.squad2(golds, found, no_answer=[0.1, 0.6, 0.2, 0.7], threshold=0.5)
    assert (told["exact"], told["f1"]) == (75.0, 75.0)  # the second and the last are withheld
    # From all withheld, 2 right: the first adds 1, the third 0, the second 0 or 2/3, the last -1.
    assert (told["best_exact"], told["best_exact_thresh"]) == (75.0, 0.1)
    assert (told["best_f1"], told["best_f1_thresh"]) == (pytest.approx(100 * (2 + 1 + 2 / 3) / 4), 0.6)


def test_only_parts_that_exist_are_told():
    assert "NoAns_total" not in answers.squad2([["x"]], ["x"]) and "HasAns_f1" not in answers.squad2([[]], ["x"])
    assert answers.squad2([], []) == {"exact": 0.0, "f1": 0.0, "total": 0}
    assert answers.squad2([[]], ["x"], [0.5])["best_exact_thresh"] == 0.0  # withholding all is best


def test_a_gold_answer_without_words_is_the_empty_answer_to_a_question_that_has_one():
    assert answers.squad2([["the"]], [""])["HasAns_exact"] == 100.0
    assert answers.squad2([["the", "cat"]], [""])["HasAns_exact"] == 0.0


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(DataError, match="2 questions, but 1 answers"):
        answers.squad2([["x"], []], ["x"])
    with pytest.raises(DataError, match="1 questions, but 1 and 2 answers"):
        answers.squad2([["x"]], ["x"], [0.1, 0.2])


def words(text):
    kept = "".join(letter for letter in text.lower() if not (letter.isascii() and re.match(r"[^\w\s]|_", letter)))
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def overlap(gold, found):
    gold, found = words(gold), words(found)
    if not gold or not found:
        return float(gold == found)
    left, shared = list(gold), 0
    for word in found:
        if word in left:
            left.remove(word)
            shared += 1
    return 2 * shared / (len(gold) + len(found))


@settings(deadline=None)
@given(QUESTIONS, st.sampled_from([-1.0, 0.3, 0.5, 1.0]))
def test_squad2_is_its_definition(questions, threshold):
    golds, found, sure = map(list, zip(*questions, strict=True))
    told = answers.squad2(golds, found, sure, threshold)
    for name, score in (("exact", lambda gold, one: float(words(gold) == words(one))), ("f1", overlap)):
        values = [
            max(score(text, one) for text in [text for text in gold if words(text)] or [""])
            for gold, one in zip(golds, found, strict=True)
        ]
        shown = [value if one <= threshold else not gold for gold, value, one in zip(golds, values, sure, strict=True)]
        assert told[name] == pytest.approx(100 * sum(shown) / len(sure))
        for part, taken in (("HasAns_", True), ("NoAns_", False)):
            chosen = [value for gold, value in zip(golds, shown, strict=True) if bool(gold) == taken]
            if chosen:
                assert told[part + name] == pytest.approx(100 * sum(chosen) / len(chosen))
                assert told[part + "total"] == len(chosen)


@settings(deadline=None)
@given(QUESTIONS)
def test_no_threshold_is_better_than_the_best(questions):
    golds, found, _ = map(list, zip(*questions, strict=True))
    # Answers of articles alone are left out: the official script takes them as wrong here and as right elsewhere.
    found = [one if words(one) else "" for one in found]
    sure = [float(7 * place % 13) for place in range(len(found))]  # no two alike, the lowest 0
    best = answers.squad2(golds, found, sure)
    for name in ("exact", "f1"):
        reached = {limit: answers.squad2(golds, found, sure, limit)[name] for limit in (-1.0, *sure)}
        assert best[f"best_{name}"] == pytest.approx(max(reached.values()))
        # The official script says 0.0 where nothing is better than to withhold all.
        limit = best[f"best_{name}_thresh"]
        assert best[f"best_{name}"] == pytest.approx(reached[limit if best[f"best_{name}"] > reached[-1.0] else -1.0])


def test_questions_equally_sure_are_walked_one_by_one():
    # No threshold tells them apart, and all that one can reach is 1 of 2.
    assert answers.squad2([["x"], []], ["x", "y"], [0.5, 0.5])["best_exact"] == 100.0
