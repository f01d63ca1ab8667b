"""How well answers to questions were found, by the rules of SQuAD 1.1 and 2.0.

The rules are those of the official evaluation scripts (Rajpurkar et al. 2016, Rajpurkar, Jia and Liang 2018). Scores
are in percent. One question has a list of gold answers (strings); in SQuAD 2.0 it may be empty, and the right answer is
the empty string then.
"""

import math
import re
import string
from collections import Counter
from itertools import accumulate

from ..errors import DataError

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII's only, as in the official scripts


def normalise(answer):
    """Lower case, no punctuation, no articles, single spaces, in this order."""
    return " ".join(_ARTICLE.sub(" ", answer.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact(gold, found):
    """1.0 where two answers are the same once normalised, else 0.0."""
    return float(normalise(gold) == normalise(found))


def f1(gold, found, version=2):
    """F1 of the words that two normalised answers share, counted as often as both have them.

    Answers without words share none. SQuAD 2.0 counts them as right where both have none, 1.1 as wrong.
    """
    gold, found = normalise(gold).split(), normalise(found).split()
    if version == 2 and not (gold and found):
        return float(gold == found)
    shared = (Counter(gold) & Counter(found)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(found), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def squad1(golds, answers):
    """{"exact_match", "f1"} of SQuAD 1.1: golds, a list of strings for each question; answers, one string for each.

    DataError for a question without gold answers.
    """
    _check(golds, answers)
    for place, gold in enumerate(golds):
        if not gold:
            raise DataError(f"question {place} has no gold answer, which SQuAD 1.1 does not know; SQuAD 2.0 does")
    told = {"exact_match": exact, "f1": lambda gold, found: f1(gold, found, version=1)}
    return {name: _percent([_best(score, *pair) for pair in _pairs(golds, answers)]) for name, score in told.items()}


def squad2(golds, answers, no_answer=None, threshold=1.0):
    """Scores of SQuAD 2.0: {"exact", "f1", "total"}, the same of questions that have an answer ("HasAns_...") and that
    have none ("NoAns_..."), where there are such.

    no_answer: of each question, how surely it has no answer, a probability or any score; where it exceeds `threshold`
    the empty string counts as the answer. With it also "best_exact" and "best_f1", the most that any threshold could
    have reached, and "best_exact_thresh" and "best_f1_thresh", which one.
    """
    _check(golds, answers, no_answer)
    answerable = [bool(gold) for gold in golds]
    # A gold answer that is nothing but articles and punctuation is left out.
    golds = [[text for text in gold if normalise(text)] or [""] for gold in golds]
    raw = {score.__name__: [_best(score, *pair) for pair in _pairs(golds, answers)] for score in (exact, f1)}
    settled = raw
    if no_answer is not None:
        withheld = [sureness > threshold for sureness in no_answer]
        settled = {
            name: [float(not has) if out else one for one, out, has in zip(values, withheld, answerable, strict=True)]
            for name, values in raw.items()
        }
    told = _part("", settled, [True] * len(golds))
    for prefix, chosen in (("HasAns_", answerable), ("NoAns_", [not has for has in answerable])):
        if any(chosen):
            told |= _part(prefix, settled, chosen)
    if no_answer is not None:
        for name, values in raw.items():
            told[f"best_{name}"], told[f"best_{name}_thresh"] = _best_threshold(values, answers, no_answer, answerable)
    return told


def _best_threshold(values, answers, no_answer, answerable):
    """The highest score in percent, and the threshold that reaches it; the lowest such one, 0.0 if all is withheld.

    Withholding every answer scores the questions that have none. Then questions are answered one by one, the least sure
    to have no answer first. Questions equally sure are taken one by one as well, in the order of examples: the official
    script does so, though no threshold stops between them.
    """
    order = sorted(range(len(values)), key=no_answer.__getitem__)
    gains = [values[i] if answerable[i] else -float(bool(answers[i])) for i in order]
    reached = list(accumulate(gains, initial=answerable.count(False)))
    best = max(range(len(reached)), key=reached.__getitem__)  # the first of equals
    threshold = float(no_answer[order[best - 1]]) if best else 0.0
    return 100.0 * reached[best] / max(len(values), 1), threshold


def _best(score, gold, answer):
    return max(score(text, answer) for text in gold)


def _pairs(golds, answers):
    return zip(golds, answers, strict=True)


def _part(prefix, values, chosen):
    """exact, f1 and total of the chosen questions."""
    told = {
        prefix + name: _percent([one for one, take in zip(each, chosen, strict=True) if take])
        for name, each in values.items()
    }
    return {**told, f"{prefix}total": sum(chosen)}


def _percent(values):
    return 100.0 * math.fsum(values) / max(len(values), 1)


def _check(golds, answers, no_answer=None):
    counts = [len(each) for each in (golds, answers, no_answer) if each is not None]
    if len(set(counts)) > 1:
        raise DataError(f"{counts[0]} questions, but {' and '.join(map(str, counts[1:]))} answers or scores for them")
