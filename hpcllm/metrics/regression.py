"""How near numbers come to the gold ones. Arrays are float64 [N] in the order of the examples, N at least 1.

Sums are `math.fsum`, the exact sum rounded once: they do not depend on the order of the examples.
"""

import math

import numpy as np

from ..errors import DataError


def mse(gold, found):
    """Mean of squared errors, in the unit of gold squared."""
    gold, found = _pair(gold, found)
    return math.fsum((gold - found) ** 2) / len(gold)


def rmse(gold, found):
    """Root of the mean squared error, in the unit of gold."""
    return math.sqrt(mse(gold, found))


def mae(gold, found):
    """Mean of absolute errors, in the unit of gold."""
    gold, found = _pair(gold, found)
    return math.fsum(np.abs(gold - found)) / len(gold)


def r2(gold, found):
    """Coefficient of determination: 1 - squared errors / squared deviations of gold from its mean.

    Where gold is constant, 1 if found is the same and otherwise 0, as scikit-learn's `force_finite` has it.
    """
    gold, found = _pair(gold, found)
    if _constant(gold):
        return float(np.array_equal(gold, found))
    return 1.0 - math.fsum((gold - found) ** 2) / math.fsum(_centred(gold) ** 2)


def pearson(gold, found):
    """Pearson's correlation, in [-1, 1].

    0 where gold or found is constant: the quotient is 0/0 there, and who always answers the same has not been seen to
    follow gold. A number, unlike NaN, can be compared, so that the best of several evaluations is still found.
    """
    gold, found = _pair(gold, found)
    if _constant(gold) or _constant(found):
        return 0.0
    gold, found = _centred(gold), _centred(found)
    spread = math.sqrt(math.fsum(gold**2)) * math.sqrt(math.fsum(found**2))
    return max(-1.0, min(1.0, math.fsum(gold * found) / spread)) if spread else 0.0  # 0: squares that underflow


def spearman(gold, found):
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs; 0 as `pearson`."""
    gold, found = _pair(gold, found)
    return pearson(places(gold), places(found))


def places(values):
    """The place of each value in ascending order, from 1; equal values share the mean of their places. float64 [N]."""
    _, which, times = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(times) - (times - 1) / 2)[which]


def scores(gold, found):
    """All of the above: {name: float}."""
    return {score.__name__: score(gold, found) for score in (mse, rmse, mae, r2, pearson, spearman)}


def _pair(gold, found):
    """Both as float64 [N]; DataError where they do not belong together, are empty or not finite."""
    gold, found = np.asarray(gold, dtype=np.float64), np.asarray(found, dtype=np.float64)
    if gold.ndim != 1 or gold.shape != found.shape or not gold.size:
        raise DataError(f"{gold.shape} gold values and {found.shape} found; both must be one list, and not empty")
    for what, values in (("gold", gold), ("found", found)):
        wrong = np.flatnonzero(~np.isfinite(values))
        if wrong.size:
            raise DataError(f"{what} value of example {wrong[0]} is {values[wrong[0]]}, not a finite number")
    return gold, found


def _constant(values):
    # Not by the deviations: the mean of equal values may differ from them in the last bit.
    return values.min() == values.max()


def _centred(values):
    return values - math.fsum(values) / len(values)
