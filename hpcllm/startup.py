"""Where the time goes between the launcher's start and the first step, part by part. Needs neither MPI nor torch."""

import os
import time

from .mpi import process


class Parts:
    """A stopwatch that has been running since the launcher's process on this host began, or else this one.

    seconds: {part: seconds of this process}, in order. "launch" ends where this process began, "python" where this
    object is made.
    """

    def __init__(self):
        began = process.look(os.getpid()).began_s
        self.seconds, self._last = {}, began
        above = next(process.ancestors(), None)
        if above is not None and above.name in process.LAUNCHERS:
            self.seconds["launch"] = began - above.began_s
        self.end("python")

    def end(self, part):
        """What has passed since the last part was `part`."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def describe(self):
        """In words: 3.21 s: python 0.10, mpi 0.50, and so on."""
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.2f} s: {parts}"


def age_s():
    """Seconds since this process began."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process.look(os.getpid()).began_s
