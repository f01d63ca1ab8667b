"""How well classes were found: from a confusion matrix, or per label where an example may have several.

Everything is computed from integer counts, so the numbers do not depend on which rank counted what. The definitions are
those of scikit-learn with `labels=range(C)` and `zero_division=0`: 0/0 is 0, and a class that is neither in gold nor in
found has precision, recall and F1 0 and takes part in macro averages with them (not in weighted ones).
"""

import math
from dataclasses import dataclass

import numpy as np

from ..errors import DataError

COLUMNS = ("precision", "recall", "f1-score", "support")


def confusion(gold, found, count):
    """Count pairs of classes: int64 [count, count], rows gold, columns found.

    gold, found: integer arrays [N]. DataError where their lengths differ or a class is not in range(count).
    """
    gold, found = np.asarray(gold, dtype=np.int64), np.asarray(found, dtype=np.int64)
    if gold.shape != found.shape:
        raise DataError(f"{len(gold)} gold classes, but {len(found)} found")
    for what, classes in (("gold", gold), ("found", found)):
        wrong = np.flatnonzero((classes < 0) | (classes >= count))
        if wrong.size:
            raise DataError(f"{what} class of example {wrong[0]} is {classes[wrong[0]]}, not one of 0 to {count - 1}")
    return np.bincount(gold * count + found, minlength=count * count).reshape(count, count)


def divide(a, b):
    """a / b element by element, float64; 0/0 is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, dtype=np.float64), b)
    return np.divide(a, b, out=np.zeros(a.shape), where=b != 0)


def rates(right, found, gold):
    """Precision, recall and F1 of each class: float64 [3, C] from its numbers right, found and in gold, each [C]."""
    return np.stack([divide(right, found), divide(right, gold), divide(2 * right, found + gold)])


def averages(right, found, gold, rates=rates):
    """{"micro", "macro", "weighted": [precision, recall, F1]} over classes; weighted: by the number in gold."""
    each = rates(right, found, gold)
    micro = rates(*(np.sum(counts, keepdims=True) for counts in (right, found, gold)))[:, 0]
    # np.average, and not the sums of counts, so that the last bits are those of scikit-learn.
    macro = np.average(each, axis=1) if each.size else np.zeros(3)
    weighted = np.array([np.average(row, weights=gold) for row in each]) if np.any(gold) else np.zeros(3)
    return {"micro": micro, "macro": macro, "weighted": weighted}


def keyed(averages, plain="macro"):
    """Averages as a flat dict of floats: precision, recall and f1 are the plain ones, f1_micro says which it is."""
    told = {}
    for how, values in averages.items():
        for what, value in zip(("precision", "recall", "f1"), values, strict=True):
            told[what if how == plain else f"{what}_{how}"] = float(value)
    return told


def table(names, each, gold, last, digits):
    """The text table of scikit-learn and seqeval.

    names: of C rows; each: float64 [3, C]; gold: [C], the column support; last: {name: [precision, recall, F1]}, the
    rows below, where None is an empty cell; digits: after the point.
    """
    width = max([len("weighted avg"), digits, *map(len, names)])

    def row(name, values, support):
        cells = [f"{'' if value is None else format(value, f'.{digits}f'):>9}" for value in values]
        return f"{name:>{width}}  {' '.join([*cells, f'{support:>9}'])}\n"

    head = f"{'':>{width}}  {' '.join(f'{column:>9}' for column in COLUMNS)}\n\n"
    rows = [row(*of_class) for of_class in zip(names, each.T, gold, strict=True)]
    return head + "".join(rows) + "\n" + "".join(row(name, values, np.sum(gold)) for name, values in last.items())


def _counts(matrix):
    """Right, found and gold of each class."""
    return np.diagonal(matrix), matrix.sum(axis=0), matrix.sum(axis=1)


def accuracy(matrix):
    return float(divide(np.trace(matrix), matrix.sum()))


def matthews(matrix):
    """Matthews correlation for any number of classes (R_K, Gorodkin 2004); 0 where gold or found is one class only."""
    right, found, gold = ([int(n) for n in counts] for counts in _counts(matrix))  # Python's, which cannot overflow
    total = sum(gold)
    together = total * sum(right) - sum(a * b for a, b in zip(found, gold, strict=True))
    alone = [total**2 - sum(n**2 for n in counts) for counts in (found, gold)]
    return together / math.sqrt(math.prod(alone)) if all(alone) else 0.0


def scores(matrix):
    """All scores of a confusion matrix: {name: float}, averages named as `keyed` says."""
    named = {"accuracy": accuracy(matrix), **keyed(averages(*_counts(matrix)))}
    return {**named, "matthews_correlation": matthews(matrix)}


def report(matrix, names, digits=4):
    """The text of sklearn.metrics.classification_report(..., labels=range(C), target_names=names, zero_division=0).

    Its line is "accuracy", never "micro avg", which scikit-learn keeps for a choice of labels that leaves some out:
    a matrix has them all, and there the two are the same number.
    """
    counts = _counts(matrix)
    means = averages(*counts)
    last = {"accuracy": (None, None, accuracy(matrix)), "macro avg": means["macro"], "weighted avg": means["weighted"]}
    # scikit-learn prints support as "3.0" where no example at all is right; so that texts can be compared, so do we.
    support = counts[2] if counts[0].any() else counts[2].astype(np.float64)
    return table(names, rates(*counts), support, last, digits)


@dataclass
class MultilabelCounts:
    """What the scores of multi-label examples need."""

    labels: np.ndarray  # int64 [L, 3]: true positives, false positives, false negatives
    rows: int  # examples
    exact: int  # examples with exactly the gold labels
    samples: np.ndarray  # float64 [3]: precision, recall and F1 within each example, summed over examples

    def averages(self):
        """As `averages`, with "samples": the mean over examples."""
        return {**averages(*self.split()), "samples": divide(self.samples, self.rows)}

    def split(self):
        right, surplus, missed = self.labels.T
        return right, right + surplus, right + missed


def multilabel_counts(gold, found):
    """Count labels: gold, found bool [N, L], N examples of which each has or has not each of L labels."""
    gold, found = np.asarray(gold, dtype=bool), np.asarray(found, dtype=bool)
    if gold.ndim != 2 or gold.shape != found.shape:
        raise DataError(f"labels are {gold.shape} in gold and {found.shape} found; both must be [examples, labels]")
    labels = np.stack([(a & b).sum(axis=0) for a, b in ((gold, found), (~gold, found), (gold, ~found))], axis=1)
    each = rates((gold & found).sum(axis=1), found.sum(axis=1), gold.sum(axis=1))
    samples = np.array([math.fsum(row) for row in each])
    return MultilabelCounts(labels, len(gold), int((gold == found).all(axis=1).sum()), samples)


def multilabel_scores(counts):
    """All scores of MultilabelCounts: {name: float}; accuracy is of whole examples (subset accuracy)."""
    return {"accuracy": float(divide(counts.exact, counts.rows)), **keyed(counts.averages())}


def multilabel_report(counts, names, digits=4):
    """The text of sklearn.metrics.classification_report of two label indicator matrices."""
    right_found_gold = counts.split()
    last = {f"{how} avg": values for how, values in counts.averages().items()}
    return table(names, rates(*right_found_gold), right_found_gold[2], last, digits)
