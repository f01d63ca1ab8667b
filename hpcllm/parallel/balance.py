"""Layers to stages of about the same work: what a pipeline does and what the planner predicts. Imports no torch."""

import functools


def balance(costs, stages):
    """Where to cut a list of `costs` (tuples, the first counts most) into `stages`: list of (start, stop).

    No stage is empty, and the largest sum of a stage is as small as can be.
    """
    kinds = range(len(costs[0]))
    sums = [tuple(sum(cost[kind] for cost in costs[:end]) for kind in kinds) for end in range(len(costs) + 1)]

    def between(start, stop):
        return tuple(sums[stop][kind] - sums[start][kind] for kind in kinds)

    @functools.cache
    def best(start, left):
        """(largest sums of a stage, first cut) of the costs from `start` on in `left` stages."""
        if left == 1:
            return between(start, len(costs)), len(costs)
        options = []
        for stop in range(start + 1, len(costs) - left + 2):
            rest, _ = best(stop, left - 1)
            options.append((tuple(map(max, between(start, stop), rest)), stop))
        return min(options)

    bounds, start = [], 0
    for left in range(stages, 0, -1):
        _, stop = best(start, left)
        bounds.append((start, stop))
        start = stop
    return bounds
