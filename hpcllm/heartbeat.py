"""The file `heartbeat` in a run's folder: one line that a person can watch, rewritten while steps are made.

    2026-11-26T22:40:01 step 18250 of 50000, loss 3.1274, 1.204 s a step, 10 h 37 min left

Its time of change tells when the last step was: `watch cat`, or `find -mmin +10` in a script of one's own.
"""

import collections
import contextlib
import os
import statistics
import time

NAME = "heartbeat"
_EVERY_S = 1.0
_WIDTH = 120  # of the line: always as long, so that one write replaces it and nobody reads half of two


class Heartbeat:
    """Written by root in `folder`, at most once a second; a disk that cannot take it is for others to tell of."""

    def __init__(self, folder):
        self._path = os.path.join(folder, NAME)
        self._wrote, self._max_steps = float("-inf"), None
        self._lately = collections.deque(maxlen=20)

    def step(self, record):
        """A step has been made; `record` is that of metrics.jsonl."""
        if "step_s" in record:
            self._lately.append(record["step_s"])
        if time.monotonic() - self._wrote >= _EVERY_S:
            self._write(self._describe(record))

    def event(self, name, details):
        """A start, stop or end is told at once; other events are none of steps."""
        if name == "start":
            self._max_steps = details.get("max_steps")
        told = {"start": "has started", "stop": f"stopped ({details.get('why')})", "end": "the run is over"}
        if name in told:
            self._write(f"step {details.get('step')}{self._of()}: {told[name]}")

    def _of(self):
        return f" of {self._max_steps}" if self._max_steps else ""

    def _describe(self, record):
        parts = [f"step {record['step']}{self._of()}"]
        parts.append(f"loss {record['loss']:.4f}")
        if self._lately:
            step_s = statistics.median(self._lately)
            parts.append(f"{step_s:.3f} s a step")
            if self._max_steps:
                parts.append(f"{in_words((self._max_steps - record['step']) * step_s)} left")
        return ", ".join(parts)

    def _write(self, text):
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}"[: _WIDTH - 1].replace("\n", " ").ljust(_WIDTH - 1)
        self._wrote = time.monotonic()
        with contextlib.suppress(OSError):
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(file, f"{line}\n".encode("ascii", errors="replace"), 0)
            finally:
                os.close(file)


def in_words(seconds):
    """A duration: 12 s, 5 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{max(seconds, 0.0):.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
