"""What a run tells: a record a step in metrics.jsonl, events, and a bar on a terminal or plain lines in a log.

Root writes; the numbers of all ranks meet in one small reduction a step (`Clock.collect`).
"""

import json
import math
import os
import resource
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from . import files, records, terminal
from .heartbeat import Heartbeat
from .mpi import work
from .mpi.device import gpus_in_use

_LATELY = 5  # checkpoints that tell how long the next one may take


class Clock:
    """Where the time of a step goes on this rank: waiting for data, computing, communicating.

    group: process group of all ranks; losses: that over which losses add up. compute_s: of this rank in the last step.
    """

    def __init__(self, group, losses):
        self._group, self._losses = group, losses
        self.start()

    def start(self):
        self._began = time.perf_counter()
        self._communicated = work.communication_s()
        self.data_s = 0.0

    @contextmanager
    def waiting_for_data(self):
        began = time.perf_counter()
        yield
        self.data_s += time.perf_counter() - began

    def collect(self, loss_sum, *others):
        """(loss summed over ranks, dict of times and memory, `others`). Collective; ends the step.

        Of times, memory and `others`, whole numbers, the largest over ranks. imbalance: the largest compute_s over the
        mean of all ranks', 1 where all compute equally long.
        """
        step_s = time.perf_counter() - self._began
        communication_s = work.communication_s() - self._communicated
        self.compute_s = step_s - self.data_s - communication_s
        total = torch.tensor([float(loss_sum)], dtype=torch.float64)
        computed = torch.tensor([self.compute_s], dtype=torch.float64)
        dist.all_reduce(total, group=self._losses)
        slowest = self.largest(step_s, self.data_s, self.compute_s, communication_s, memory_bytes(), *others)
        dist.all_reduce(computed, group=self._group)
        names = ("step_s", "data_s", "compute_s", "communication_s", "memory_bytes")
        values = dict(zip(names, slowest, strict=False))
        values["memory_bytes"] = int(values["memory_bytes"])
        values["imbalance"] = values["compute_s"] * self._group.size() / computed.item()
        return total.item(), values, *map(int, slowest[len(names) :])

    def largest(self, *numbers):
        """The largest of each number over ranks. Collective."""
        everybodys = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(everybodys, op=dist.ReduceOp.MAX, group=self._group)
        return everybodys.tolist()


def memory_bytes():
    """Largest memory this rank has used: device memory on a GPU, resident memory otherwise."""
    for gpus in gpus_in_use():
        return gpus.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Progress:
    """A bar for `total` steps on a terminal; in a log, lines. quiet: neither (every rank but root)."""

    def __init__(self, what, total, done=0, quiet=False):
        self._bar = None if quiet else terminal.bar(what, total, done)
        self.quiet = quiet

    def update(self, done, line, short):
        """Show `done` steps: `short` beside the bar, `line` (None: none this time) in a log."""
        if self._bar is not None:
            self._bar.update(0, completed=done, text=short)
        elif line is not None:
            self.say(line)

    def say(self, text):
        """A line that stays: above the bar, or in the log."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif not self.quiet:
            print(text, flush=True)

    def close(self):
        if self._bar is not None:
            self._bar.stop()


def history(output_dir):
    """Of the run in `output_dir`, by its events.jsonl: how often it has been started, how often since its newest
    checkpoint, and the most seconds that one of the newest checkpoints took; zeros where nothing is told."""
    events = records.Events(Path(output_dir) / records.EVENTS)
    seconds = [event.get("seconds") or 0.0 for event in events.named("checkpoint")]
    longest = max(seconds[-_LATELY:], default=0.0)  # a file system that was slow once is not so for ever
    return events.counts().get("start", 0), events.count_since("start", "checkpoint"), longest


class Journal:
    """metrics.jsonl and events.jsonl of a run, appended to on root, and its heartbeat; silent elsewhere.

    A record is one line, written at once. After a restart the steps since the checkpoint come again; of several
    records of a step the last counts (`restart` tells them apart).
    """

    def __init__(self, output_dir, restart, is_root):
        self._folder = Path(output_dir) if is_root else None
        self._heartbeat = Heartbeat(output_dir) if is_root else None
        self._restart = restart

    def metrics(self, record):
        self._append(records.METRICS, {**record, "restart": self._restart})
        if self._heartbeat and "loss" in record:
            self._heartbeat.step(record)

    def event(self, name, **details):
        self._append(records.EVENTS, {"event": name, **details, "restart": self._restart})
        if self._heartbeat:
            self._heartbeat.event(name, details)

    def _append(self, name, record):
        if self._folder is None:
            return
        # JSON has no NaN and no infinity.
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        line = json.dumps({**record, "time": round(time.time(), 3)}, allow_nan=False) + "\n"
        with files.failing_as_io(self._folder / name):
            files.patiently(_append, self._folder / name, line)


def _append(path, line):
    with open(path, "ab+") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            line = f"\n{line}"  # a full disk, or a kill, has cut the last record
        file.write(line.encode())
