"""When a checkpoint is due: every so many steps, or so often that the least time is lost (checkpoint.every_steps).

Time goes to checkpoints and to steps that are done again after a failure. Daly 2006 ("A higher order estimate of the
optimum checkpoint interval for restart dumps", equation 37) gives the interval that makes the sum of both smallest,
from what a checkpoint costs and how long a job runs between failures; Young 1974 has its first term.
"""

import math
import statistics

_FIRST_STEPS, _FIRST_S = 20, 120.0  # whichever is later: then the first one is written, and measured
_FIRST_PART = 1 / 20  # of the time between failures, at most: a job may run for no longer than that
_NEWEST_STEPS, _NEWEST_SAVES = 100, 5  # what counts for the medians
_LEAST = 20.0  # seconds of training for each second that a checkpoint costs: at most 5 % of the time goes there


def optimum_s(cost_s, mtbf_s):
    """Seconds of training between checkpoints that cost `cost_s` each, with a failure every `mtbf_s` on average."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    part = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(part) / 3 + part / 9) - cost_s


class Interval:
    """every: checkpoint.every_steps, a number or "auto"; mtbf_s: of the whole job, in seconds.

    All that it is told is the same on all ranks, and so is what it says.
    """

    def __init__(self, every, mtbf_s):
        self._auto, self._every, self._mtbf_s = every == "auto", 0 if every == "auto" else every, mtbf_s
        self._steps, self._during = [], []  # seconds of steps; of those while one was being written or read back
        self._costs, self._writes = [], []
        self._since, self._passed_s = 0, 0.0

    @property
    def auto(self):
        return self._auto

    def stepped(self, seconds, saving):
        """A step took so long. saving: a checkpoint was being written meanwhile."""
        if self._auto:
            (self._during if saving else self._steps).append(seconds)
            del self._steps[:-_NEWEST_STEPS]
            self._since += 1
            self._passed_s += seconds

    def began(self):
        """A checkpoint has begun, due or not."""
        self._since, self._passed_s = 0, 0.0

    def saved(self, waited_s, seconds):
        """A checkpoint is complete, which took `seconds`, `waited_s` of which training waited.

        Returns a sentence for what that means, where the interval has become another by a tenth or more, else None.
        """
        during, self._during = self._during, []
        if not self._auto or not (self._steps or during):
            return None
        step_s = statistics.median(self._steps or during)
        slowed_s = sum(during) - step_s * len(during)  # which has most of `waited_s` in it
        self._costs, self._writes = [*self._costs, max(waited_s, slowed_s)], [*self._writes, seconds]
        del self._costs[:-_NEWEST_SAVES], self._writes[:-_NEWEST_SAVES]
        cost_s, write_s = statistics.median(self._costs), statistics.median(self._writes)
        wanted_s = max(optimum_s(cost_s, self._mtbf_s), _LEAST * cost_s, write_s)
        before, self._every = self._every, max(1, round(wanted_s / step_s))
        if abs(self._every - before) < 0.1 * self._every:
            return None
        return (
            f"a checkpoint every {self._every} steps ({self._every * step_s:.0f} s): one costs {cost_s:.3g} s of "
            f"training, and a failure is expected every {self._mtbf_s / 3600:.3g} h"
        )

    @property
    def every_steps(self):
        """Steps between checkpoints now; 0 where there are none, or none is measured yet."""
        return self._every

    def due(self, step):
        """Whether a checkpoint is due after `step`."""
        if not self._auto:
            return self._every > 0 and step % self._every == 0
        if not self._every:
            first_s = min(_FIRST_S, _FIRST_PART * self._mtbf_s)
            return self._since >= _FIRST_STEPS and self._passed_s >= first_s
        return self._since >= self._every
