"""In which order a pipeline's ranks compute: plain lists, made by playing the pipeline through, step by step.

Stage s of a model is on rank s % ranks. An action is the forward pass of one micro-batch through one stage, its
backward pass, or half of that: the gradient of the inputs, which the stage before waits for, and that of the weights,
which nobody does.

    1f1b         forward passes until the last rank has begun, then one backward, one forward pass (Narayanan et al.
                 2019, PipeDream; 2021, arXiv 2104.04473)
    interleaved  the same with several stages a rank: the pipeline fills and empties sooner (arXiv 2104.04473, 2.2)
    zero_bubble  as 1f1b, and weights' gradients wait for time that would be idle (ZB-H1 of Qi et al. 2023, arXiv
                 2401.10241, where the hand-made order lets a rank hold as many micro-batches; here two more)
    forward      no backward passes: evaluation

Any number of micro-batches will do; interleaved, multiples of the ranks leave the least time idle. With one rank and
one stage it is gradient accumulation.
"""

import functools
from typing import NamedTuple

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"
_LASTS = {FORWARD: 1, BACKWARD: 2, INPUT: 1, WEIGHT: 1}  # in units of a forward pass


class Action(NamedTuple):
    kind: str
    stage: int
    micro_batch: int


@functools.lru_cache(maxsize=16)
def actions(schedule, ranks, stages_per_rank, micro_batches):
    """[rank][turn] of Action: what each rank does, in order."""
    return [[action for _, action in turns] for turns in _play(schedule, ranks, stages_per_rank, micro_batches)]


def bubble(schedule, ranks, stages_per_rank, micro_batches):
    """Fraction of the ranks' time that is idle, a forward pass taking half as long as a backward pass."""
    played = _play(schedule, ranks, stages_per_rank, micro_batches)
    whole = ranks * max(at + _LASTS[action.kind] for turns in played for at, action in turns)
    return 1 - sum(_LASTS[action.kind] for turns in played for _, action in turns) / whole


def _play(schedule, ranks, chunks, count):
    """[rank] of [(when it begins, Action)]."""
    kind = _Filling if schedule == "zero_bubble" else _ByTurns
    players = [kind(schedule, rank, ranks, chunks, count) for rank in range(ranks)]
    ends, time = {}, 0
    while any(player.todo for player in players):
        idle = all(player.free <= time for player in players)
        began = [player.begin(ends, time) for player in players]
        if idle and not any(began):
            # A last group of fewer micro-batches than ranks: where all would wait for their turn, none does.
            began = [player.begin(ends, time, out_of_turn=True) for player in players]
            if not any(began):
                raise RuntimeError(f"{schedule}: {ranks} ranks, {chunks} stages each, {count} micro-batches: all wait")
        time += 1
    return [player.turns for player in players]


class _Rank:
    """What one rank has to do. free: when it is done with what it does."""

    def __init__(self, back, rank, ranks, chunks, count):
        self.turns, self.free = [], 0
        self.last, self.back = ranks * chunks - 1, back
        # In groups of as many micro-batches as there are ranks, each group through all stages of this rank.
        stages = range(rank, rank + ranks * chunks, ranks)
        groups = [range(first, min(first + ranks, count)) for first in range(0, count, ranks)]
        self.forward = [Action(FORWARD, stage, m) for group in groups for stage in stages for m in group]
        self.backward = [Action(back, stage, m) for group in groups for stage in reversed(stages) for m in group]

    def begin(self, ends, time, out_of_turn=False):
        """Begin what there is to do at `time`, if anything; True if so. ends: {action: when it is over}."""
        action = self.choose(ends, time, out_of_turn) if self.free <= time else None
        if action:
            self.turns.append((time, action))
            self.free = ends[action] = time + _LASTS[action.kind]
        return action is not None

    def next(self, queue, ends, time):
        """The first action of `queue`, removed, if all that it needs is over; else None."""
        if not queue:
            return None
        kind, stage, number = queue[0]
        needs = []
        if kind == FORWARD and stage > 0:
            needs = [Action(FORWARD, stage - 1, number)]
        if kind == self.back:
            needs = [Action(FORWARD, stage, number)]
            needs += [Action(kind, stage + 1, number)] if stage < self.last else []
        return queue.pop(0) if all(ends.get(need, time + 1) <= time for need in needs) else None


class _ByTurns(_Rank):
    """Forward passes to fill the pipeline, then backward and forward by turns, then the backward passes left."""

    def __init__(self, schedule, rank, ranks, chunks, count):
        super().__init__(BACKWARD, rank, ranks, chunks, count)
        filling = {"1f1b": ranks - rank - 1, "interleaved": 2 * (ranks - rank - 1) + (chunks - 1) * ranks}
        self._ahead = filling.get(schedule, count * chunks) + 1  # forward passes to do before the next backward pass
        if schedule == "forward":
            self.backward = []

    @property
    def todo(self):
        return self.forward or self.backward

    def choose(self, ends, time, out_of_turn):
        forward = bool(self.forward) and (self._ahead > 0 or not self.backward)
        action = self.next(self.forward if forward != out_of_turn else self.backward, ends, time)
        if action:
            self._ahead += -1 if action.kind == FORWARD else 1
        return action


class _Filling(_Rank):
    """Whatever can be done: gradients of inputs first, then forward passes within bounds, then gradients of weights."""

    def __init__(self, _, rank, ranks, chunks, count):
        super().__init__(INPUT, rank, ranks, chunks, count)
        more = (chunks - 1) * ranks
        self._weights, self._free = [], ranks + 2 + more
        self._ahead = ranks - rank if chunks == 1 else 2 * (ranks - rank - 1) + more + 1

    @property
    def todo(self):
        return self.forward or self.backward or self._weights

    def choose(self, ends, time, out_of_turn):
        if action := self.next(self.backward, ends, time):
            self._weights.append(action._replace(kind=WEIGHT))
            self._ahead += 1
            return action
        if self._free > 0 and (self._ahead > 0 or out_of_turn) and (action := self.next(self.forward, ends, time)):
            self._ahead -= 1
            self._free -= 1
            return action
        if self._weights:
            self._free += 1
            return self._weights.pop(0)
        return None
