"""When a run saves or ends before its last step: at a signal, at the job's time limit, for a file SAVE, STOP or GROW.

Ranks hear of it at different moments, and of most things only some do. What each has heard is a number, and the largest
of all ranks counts: it comes with the sums at the edge of a step (`monitor.Clock.collect`), so all act in one step. An
evaluation, which may take longer than a job that is being ended has, is broken off (`Ear`).
"""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from . import deadline, startup
from .errors import PAUSED

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
SAVE, STOP, GROW = "SAVE", "STOP", "GROW"  # files in the run's folder
# What ranks tell each other: nothing, or one of these; a signal by its number on top of _SIGNAL; how many ranks the run
# is to go on with, on top of _GROW.
_NOTHING, _SAVE, _STOP, _LIMIT, _SIGNAL, _GROW = 0, 1, 2, 3, 100, 1000
_MOST_RANKS = 10**8
_LOOK_EVERY_S = 1.0  # for files: thousands of quick steps are not to ask a parallel file system thousands of times
_ASK_EVERY_S, _ASK_SELDOM_S = 60.0, 600.0  # whether the limit has been moved, when the end is near, and when it is not
_HEAR_EVERY_S = 0.5  # in an evaluation
_SPARE, _MARGIN_S = 1.5, 10.0  # steps and saves may take so many times as long as any has; for leaving

_heard = set()


def listen():
    """From now on SIGUSR1, SIGUSR2 and SIGTERM are noted, and end a run at the edge of a step. Main thread only."""
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _heard.add(number))


@dataclass(frozen=True)
class Wish:
    """What is to happen after a step: save, and end if `ends`, with the exit code `code`. why: in the user's words.

    ranks: what the run is to go on with, where it ends for that.
    """

    why: str
    ends: bool = True
    code: int = PAUSED
    ranks: int | None = None


def wish(number):
    """The Wish that the largest number of all ranks' `Requests.heard` stands for; None for none."""
    if number >= _GROW:
        ranks = number - _GROW
        return Wish(f"the file {GROW}: it is to go on with {ranks} ranks", ranks=ranks)
    if number >= _SIGNAL:
        return Wish(signal.Signals(number - _SIGNAL).name)
    known = {
        _SAVE: Wish(f"the file {SAVE}", ends=False),
        _STOP: Wish(f"the file {STOP}", code=0),
        _LIMIT: Wish("the time limit"),
    }
    return known.get(number)


class Asked(Exception):
    """The run is to end, in the middle of what the next start does again. wish: the Wish."""

    def __init__(self, wish):
        super().__init__(wish.why)
        self.wish = wish


class Ear:
    """Called by all ranks alike between the parts of what takes long, it has them hear twice a second.

    heard: returns this rank's number; largest: monitor.Clock.largest; act: called with a `wish` of the ranks.
    """

    def __init__(self, heard, largest, act):
        self._heard, self._largest, self._act = heard, largest, act
        self._since, self._parts, self._left = time.monotonic(), 1, 1

    def __call__(self):
        self._left -= 1
        if self._left:
            return
        part_s = (time.monotonic() - self._since) / self._parts
        number, part_s = self._largest(self._heard(), part_s)
        if found := wish(int(number)):
            self._act(found)
        self._parts = self._left = max(1, min(2 * self._parts, int(_HEAR_EVERY_S / max(part_s, 1e-6))))
        self._since = time.monotonic()


class Requests:
    """What this rank hears. looks: it is the one that looks at the run's `folder` and at the clock.

    limit_s: run.time_limit in seconds, counted from the start of this process, or None; save_s: what a save may take,
    as long as none has been seen; ask: tells when the job ends, and is told what is known of that.
    """

    def __init__(self, folder, looks, limit_s=None, save_s=0.0, ask=deadline.end_of_job):
        self._folder, self._looks, self._ask = Path(folder), looks, ask
        self._own = time.time() - startup.age_s() + limit_s if limit_s is not None else None
        self.longest = {"step": 0.0, "save": save_s, "evaluation": 0.0}  # s
        self._looked, self._asked = float("-inf"), float("-inf")
        self._told = None
        self._find_end()

    def look(self, looks):
        """Whether this rank is the one that looks, from now on."""
        if looks and not self._looks:
            self._looks = True
            self._find_end()

    @property
    def end(self):
        """When this job, or the time that the run file gives it, will end: Unix time, None where nobody says."""
        return min((end for end in (self._own, self._told) if end is not None), default=None)

    def took(self, what, seconds):
        """A "step", "save" or "evaluation" has taken so long."""
        self.longest[what] = max(self.longest[what], seconds)

    def heard(self, evaluates=False, saves=1):
        """The number for what this rank has heard.

        evaluates: an evaluation follows this step or the next; saves: how many saves ending now would wait for.
        """
        return self._heard(self.lead_s(evaluates, saves))

    def heard_meanwhile(self, saves, steps):
        """As `heard`, in the middle of an evaluation; what does not end the run waits until that is over.

        steps: how many must still be possible after it, since nothing is heard before the end of the next one.
        """
        return self._heard(self.lead_s(saves=saves, steps=steps), only_ends=True)

    def _heard(self, lead_s, only_ends=False):
        if _heard:
            return _SIGNAL + max(_heard)
        if not self._looks:
            return _NOTHING
        if self._short_of_time(lead_s):
            return _LIMIT
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return _NOTHING
        if not only_ends:
            self._looked = time.monotonic()
        if stop_file(self._folder):
            return _STOP
        with contextlib.suppress(OSError):  # none, or none that can be read and removed now: it is looked for again
            wanted = _number_in(self._folder / GROW)
            (self._folder / GROW).unlink()
            return _GROW + wanted
        with contextlib.suppress(OSError):
            if not only_ends:
                (self._folder / SAVE).unlink()
                return _SAVE
        return _NOTHING

    def lead_s(self, evaluates=False, saves=1, steps=1):
        """Seconds that the next step (`steps`), what follows it, saving and leaving may take."""
        parts = [self.longest["step"] * steps, self.longest["save"] * saves, self.longest["evaluation"] * evaluates]
        return _SPARE * sum(parts) + _MARGIN_S

    def _short_of_time(self, lead_s):
        if self.end is None:
            return False
        near = time.time() + lead_s + _ASK_EVERY_S > self.end
        if time.monotonic() - self._asked > (_ASK_EVERY_S if near else _ASK_SELDOM_S):
            self._find_end()  # somebody may have moved it
        return time.time() + lead_s > self.end

    def _find_end(self):
        if self._looks:
            self._asked = time.monotonic()
            self._told = self._ask(self._told)


def _number_in(path):
    """The whole number that the file holds, 0 where it holds something else. Raises FileNotFoundError."""
    with open(path, "rb") as file:
        words = file.read(100).split()
    known = len(words) == 1 and words[0].isdigit() and len(words[0]) < len(str(_MOST_RANKS))
    return int(words[0]) if known else 0


def stop_file(folder):
    """The file that keeps the run in `folder` from going on, if it is there; else None."""
    path = os.path.join(folder, STOP)
    return path if os.path.exists(path) else None
