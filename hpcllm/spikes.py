"""Losses that jump: when a run is to go back to a checkpoint and leave out the samples that led there.

PaLM (Chowdhery et al. 2022, section 5.1) went on from a checkpoint before the spike and skipped the batches that were
seen around it; the same batches, met in another state, did no harm. `Spikes` decides, from losses that are the same
on all ranks; `train.Run.go_back` acts. What it knows is in every checkpoint, so a run that goes on decides the same.
"""

import math
import statistics

_WINDOW = 100  # steps whose losses are compared with
_ENOUGH = 20  # of them, before any loss counts as a spike
_DEVIATION = 1.4826  # of a normal distribution, by its median absolute deviation
_LEAST = 1e-3  # of the median: of losses that hardly differ, none is a spike


class Spikes:
    """plan: the run file's [train]; state: as `state` gives it, of the checkpoint that the run goes on from."""

    def __init__(self, plan, state=None):
        self._plan = plan
        known = state or {}
        self._losses = list(known.get("losses", []))
        self._first, self._row = known.get("first"), known.get("row", 0)
        self.rollbacks, self.skipped = known.get("rollbacks", 0), [list(pair) for pair in known.get("skipped", [])]

    @property
    def on(self):
        return self._plan.max_loss_spike > 0

    @property
    def under_way(self):
        """True where the newest losses are no good: a checkpoint now would be one that is gone back from."""
        return self._first is not None

    @property
    def state(self):
        """JSON-able: for a checkpoint. None of a run that does not ask."""
        if not self.on:
            return None
        told = {"losses": self._losses, "first": self._first, "row": self._row}
        return told | {"rollbacks": self.rollbacks, "skipped": self.skipped}

    def limit(self):
        """The largest loss that is no spike; infinity before there are enough to tell."""
        if len(self._losses) < _ENOUGH:
            return math.inf
        median = statistics.median(self._losses)
        deviation = _DEVIATION * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self._plan.max_loss_spike * max(deviation, _LEAST * abs(median))

    def seen(self, step, loss, nonfinite):
        """Note the `loss` of a `step`; returns the first step of what to go back before, None where all is well.

        nonfinite: how many steps in a row, up to this one, have had a loss or gradient that is no number.
        """
        if not self.on:
            return None
        if nonfinite:
            self._first = self._first or step
            return self._first if nonfinite > self._plan.max_nonfinite_steps else None
        if loss > self.limit():
            self._first = self._first or step
            self._row += 1
            return self._first if self._row >= self._plan.max_spike_steps else None
        self._first, self._row = None, 0
        self._losses = [*self._losses, loss][-_WINDOW:]
        return None

    def went_back(self, known, start, end):
        """The run is where a checkpoint is whose state was `known`; the samples from `start` to `end` are left out."""
        fresh = Spikes(self._plan, known)
        self._losses, self._first, self._row = fresh._losses, None, 0
        self.rollbacks += 1
        self.skipped.append([start, end])
