"""Ranks that compute more slowly than the others, named with their hosts: every step of all waits for them.

Each rank's own time is that of a step without what it waited for others or for data (`monitor.Clock`). Ranks tell
each other the median of every 50 steps: one number each, so that a step costs nothing.
"""

import statistics

_WINDOW = 50  # steps; the median of them does not see a pause of the machine


class Watch:
    """comm: of all ranks; hosts: name of each rank's; ratio: train.slow_rank_ratio, 0 for none of it.

    alike: for each rank, a word for what it computes; times are compared between ranks of one word, since stages of a
    pipeline compute different layers.
    """

    def __init__(self, comm, hosts, ratio, alike=None):
        self._comm, self._hosts, self._ratio = comm, hosts, ratio
        self._alike = alike or [None] * len(hosts)
        self._seconds, self._slow = [], set()

    def step(self, seconds):
        """Note what this rank computed in a step; returns ([(rank, its ratio)] that have become slow, [...] that are
        so no longer), two empty lists but at the end of a window. Collective."""
        if not self._ratio or self._comm.size == 1:
            return [], []
        self._seconds.append(seconds)
        if len(self._seconds) < _WINDOW:
            return [], []
        median, self._seconds = statistics.median(self._seconds), []
        return self.judge(self._comm.allgather(median))

    def judge(self, medians):
        """As `step`, for the `medians` of all ranks, in seconds."""
        ratios = compare(medians, self._alike)
        now = {rank for rank, ratio in enumerate(ratios) if ratio > self._ratio}
        new, over = sorted(now - self._slow), sorted(self._slow - now)
        self._slow = now
        return [(rank, ratios[rank]) for rank in new], [(rank, ratios[rank]) for rank in over]

    def describe(self, rank, ratio, step):
        """The line for a rank that has become slow, or is so no longer."""
        where = f"step {step}: rank {rank} on {self._hosts[rank]} computes"
        if ratio > self._ratio:
            return f"{where} {ratio:.2f} times as long as ranks do, and all wait for it"
        return f"{where} as fast as others again ({ratio:.2f} times as long)"


def compare(medians, alike):
    """How many times as long as the median rank that does the same each rank computes.

    The lower of two in the middle: of two ranks the faster one says how long it takes.
    """
    middle = {
        word: statistics.median_low(t for t, w in zip(medians, alike, strict=True) if w == word) for word in set(alike)
    }
    return [time / max(middle[word], 1e-9) for time, word in zip(medians, alike, strict=True)]
