"""How well entities were found in sentences: right is what has the type, the start and the end of a gold one.

What is counted are integers, so the numbers do not depend on which rank counted what. `tags` has the schemes, and the
lenient and strict readings of sequences of tags.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ..errors import DataError
from . import classes
from .tags import spans


@dataclass
class EntityCounts:
    """Entities per type, and tokens; `+` joins the counts of two sets of sentences."""

    right: Counter = field(default_factory=Counter)
    found: Counter = field(default_factory=Counter)
    gold: Counter = field(default_factory=Counter)
    tokens: int = 0
    right_tokens: int = 0  # tokens with exactly the gold tag

    def __add__(self, other):
        return EntityCounts(*(mine + theirs for mine, theirs in zip(self._all(), other._all(), strict=True)))

    def _all(self):
        return self.right, self.found, self.gold, self.tokens, self.right_tokens

    def types(self):
        """The types in gold or found, sorted."""
        return sorted(self.found.keys() | self.gold.keys())

    def arrays(self):
        """Right, found and gold of each type, int64 [T] each, in the order of `types`."""
        types = self.types()
        return [np.array([each[kind] for kind in types], dtype=np.int64) for each in self._all()[:3]]


def count(gold, found, read=spans):
    """EntityCounts of sentences: gold, found, lists of lists of tags; read: one sentence's tags to its entities.

    For the strict reading: read=functools.partial(strict_spans, scheme="IOB2"). DataError where lengths differ.
    """
    counts = EntityCounts()
    for true, guess in _pairs(gold, found):
        true_spans, guess_spans = set(read(true)), set(read(guess))
        counts.gold.update(kind for kind, *_ in true_spans)
        counts.found.update(kind for kind, *_ in guess_spans)
        counts.right.update(kind for kind, *_ in true_spans & guess_spans)
        counts.tokens += len(true)
        counts.right_tokens += sum(a == b for a, b in zip(true, guess, strict=True))
    return counts


def rates(right, found, gold, unit=1):
    """As `classes.rates`, the F1 from precision and recall, as seqeval and conlleval do it, and not from counts: that
    may differ in the last bit, and then in a digit that is printed. unit: 100 for percentages."""
    precision, recall = classes.divide(unit * right, found), classes.divide(unit * right, gold)
    return np.stack([precision, recall, classes.divide(2 * precision * recall, precision + recall)])


def scores(counts):
    """{name: float}: precision, recall and f1 are those of all entities ("micro", as in CoNLL), then averages over
    types ("..._macro", "..._weighted"), and accuracy over tokens."""
    told = classes.keyed(classes.averages(*counts.arrays(), rates), plain="micro")
    return {**told, "accuracy": float(classes.divide(counts.right_tokens, counts.tokens))}


def report(counts, digits=4):
    """The text of seqeval.metrics.classification_report, which without any entity fails; here averages are 0 then."""
    arrays = counts.arrays()
    last = {f"{how} avg": values for how, values in classes.averages(*arrays, rates).items()}
    return classes.table(counts.types(), rates(*arrays), arrays[2], last, digits)


def token_report(gold, found, names=None, digits=4):
    """A row per tag, "O" included, each token one example: scikit-learn's report of the flattened sequences.

    gold, found: lists of lists of tags; names: all tags, if not just those that occur, sorted.
    """
    pairs = [pair for sentence in _pairs(gold, found) for pair in zip(*sentence, strict=True)]
    names = sorted({tag for pair in pairs for tag in pair}) if names is None else names
    number = {name: place for place, name in enumerate(names)}
    if unknown := {tag for pair in pairs for tag in pair} - number.keys():
        raise DataError(f"tag {min(unknown)!r} is none of {', '.join(names)}")
    numbers = np.array([[number[tag] for tag in pair] for pair in pairs], dtype=np.int64).reshape(-1, 2)
    return classes.report(classes.confusion(*numbers.T, len(names)), names, digits)


def conlleval_report(counts):
    """What the script conlleval of CoNLL-2000 prints (version of 2004): percentages, last the number found."""
    arrays = counts.arrays()
    right, found, gold = totals = [each.sum() for each in arrays]
    text = f"processed {counts.tokens} tokens with {gold} phrases; found: {found} phrases; correct: {right}.\n"
    if counts.tokens:
        text += f"accuracy: {100 * counts.right_tokens / counts.tokens:6.2f}%; {_percentages(*totals)}\n"
    for kind, *numbers in zip(counts.types(), *arrays, strict=True):
        text += f"{kind:>17}: {_percentages(*numbers)}  {numbers[1]}\n"
    return text


def _percentages(right, found, gold):
    return "precision: {:6.2f}%; recall: {:6.2f}%; FB1: {:6.2f}".format(*rates(right, found, gold, unit=100))


def _pairs(gold, found):
    """Pairs of sentences of the same length; DataError where they are not."""
    if len(gold) != len(found):
        raise DataError(f"{len(gold)} gold sentences, but {len(found)} found")
    for number, (true, guess) in enumerate(zip(gold, found, strict=True)):
        if len(true) != len(guess):
            raise DataError(f"sentence {number} (from 0) has {len(true)} gold tags, but {len(guess)} found")
        yield true, guess
