"""How far all ranks together are, shown by root while it works itself; and a rank's failure stops the others.

Ranks send root small messages between pieces of work and never wait for each other until `finish`. On a terminal
root shows a bar, in a log it prints a line now and then. Not for training steps, which every rank ends together.
"""

import sys
import time
from datetime import timedelta

from .. import terminal

_REPORT_EVERY_S = 0.5
_LINE_EVERY_S = 30.0
_POLL_S = 0.005
_TO_ROOT, _FROM_ROOT = 7001, 7002


def meet(comm):
    """A barrier that sleeps instead of spinning, for waits of seconds on shared cores."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(_POLL_S)


class Progress:
    """Collective to make and to `finish`; between them `advance` talks to root without waiting.

    what: a word for the line; total_bytes: of all ranks together; counted: what is made of the bytes, in the words of
    the line, and how many of it are 1 there.
    """

    def __init__(self, comm, what, total_bytes, counted=("M tokens", 1e6)):
        self._comm, self._what, self._total = comm, what, total_bytes
        self._counted, self._scale = counted
        self._state = {comm.rank: (0, 0)}  # on root: rank -> (bytes, count) so far
        self._done = set()
        self._request = None
        self._told_to_stop = False
        self._began = self._reported = self._said = time.monotonic()
        self._bar = terminal.bar(what, total_bytes, in_bytes=True) if comm.rank == 0 else None

    def advance(self, done_bytes, count):
        """Tell how far this rank is, in all. Returns False once another rank has failed and work should stop."""
        self._state[self._comm.rank] = (done_bytes, count)
        now = time.monotonic()
        if now - self._reported < _REPORT_EVERY_S:
            return True
        self._reported = now
        if self._comm.rank == 0:
            self._listen()
            self._show()
            return not self._told_to_stop
        if self._request is None or self._request.test()[0]:
            self._request = self._comm.isend((done_bytes, count, None), 0, _TO_ROOT)
        return not self._comm.iprobe(0, _FROM_ROOT)

    def finish(self, failed=False, meanwhile=None):
        """Wait for every rank to finish, showing how far they are; a failed one makes the others' `advance` False.

        meanwhile: what root calls again and again as long as ranks work.
        """
        comm = self._comm
        if comm.rank == 0:
            if failed:
                self._stop_the_others()
            self._done.add(0)
            while len(self._done) < comm.size:
                if meanwhile is not None:
                    meanwhile()
                self._listen()
                self._show()
                time.sleep(_POLL_S)
            self._stop_the_others()
            self._show(last=not failed)
            for request in self._stops:
                request.wait()
            if self._bar is not None:
                self._bar.stop()
        else:
            if self._request is not None:
                self._request.wait()
            comm.isend((*self._state[comm.rank], failed), 0, _TO_ROOT).wait()
            while not comm.iprobe(0, _FROM_ROOT):
                time.sleep(_POLL_S)
            comm.recv(source=0, tag=_FROM_ROOT)

    def _listen(self):
        for rank in range(1, self._comm.size):
            while rank not in self._done and self._comm.iprobe(rank, _TO_ROOT):
                done_bytes, count, failed = self._comm.recv(source=rank, tag=_TO_ROOT)
                self._state[rank] = (done_bytes, count)
                if failed is not None:
                    self._done.add(rank)
                if failed:
                    self._stop_the_others()

    def _stop_the_others(self):
        # Each rank gets this message exactly once: in the middle when a rank failed, else when all are done.
        if not self._told_to_stop:
            self._told_to_stop = True
            self._stops = [self._comm.isend(None, rank, _FROM_ROOT) for rank in range(1, self._comm.size)]

    def _show(self, last=False):
        done = sum(state[0] for state in self._state.values())
        count = sum(state[1] for state in self._state.values())
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        digits = 1 if self._scale > 1 else 0
        text = f"{count / self._scale:.{digits}f} {self._counted}"
        rate = f"{count / self._scale / seconds:.{digits + 1}f}"
        if self._bar is not None:
            self._bar.update(0, completed=self._total if last else done, text=f"{text}, {rate}/s")
        elif last or now - self._said >= _LINE_EVERY_S:
            self._said = now
            share = 100 if last else 100 * done / self._total
            left = (
                f", {timedelta(seconds=round((self._total - done) / done * seconds))} left" if 0 < share < 100 else ""
            )
            print(
                f"{self._what}: {done / 1e6:.1f} of {self._total / 1e6:.1f} MB ({share:.0f} %), "
                f"{text}, {rate} {self._counted}/s on {self._comm.size} ranks{left}",
                file=sys.stderr,
                flush=True,
            )
