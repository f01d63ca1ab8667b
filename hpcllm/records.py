"""The records of a run, read: events.jsonl and metrics.jsonl, a line of JSON each, as `monitor.Journal` writes them;
and which checkpoints there are.

Everybody who reads them does it here. A line that a kill or a full disk has cut, and bytes that are no text, are left
out. Without torch, and quick on long runs: what nobody asks for is not parsed.
"""

import bisect
import json
import os
from pathlib import Path

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
COMPLETE = ".complete"  # the file that a checkpoint has last
_BEGINS = b'{"event": "'
# What is read must be of these kinds, where it is there; a line that has it otherwise is as good as cut.
_KINDS = {"event": str, "why": str, "path": str, "hosts": list, "restart": int, "step": int}
_FLOATS = ("time", "step_s", "learning_rate", "tokens_per_s", "mfu", "memory_bytes", "useful_s", "loss", "ends")
_KINDS |= dict.fromkeys((*_FLOATS, "max_steps"), float)
_LARGEST = 1e15
_LONGEST_SAVE_S = 1e6


def parse(line, *names):
    """The record of a line (bytes), a dict that has the keys `names`; None for a line that is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # cut, or no text
        return None
    if not isinstance(record, dict) or not all(name in record for name in names):
        return None
    for name in _KINDS.keys() & record.keys():
        # What is no number, a loss perhaps, is None in a record.
        missing = record[name] is None and _KINDS[name] is float and name not in names
        if not missing and not _is(record[name], _KINDS[name]):
            return None
    return record


def _is(value, kind):
    if kind in (int, float):
        return type(value) in ((int,) if kind is int else (int, float)) and -_LARGEST < value < _LARGEST
    return isinstance(value, kind)


def tail(path, size, *names, holding=b""):
    """The records in the last `size` bytes of a file that have the keys `names`; of lines that hold `holding` alone.

    What follows the last line break is being written, and is left out. Nothing where there is no file.
    """
    lines = [line for line in _lines(path, size) if holding in line]
    return [record for line in lines if (record := parse(line, *names)) is not None]


def _lines(path, size=None):
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - size) if size is not None else 0
        file.seek(max(0, start - 1))
        read = file.read()
    lines = read.split(b"\n")[:-1]
    return lines[1:] if start else lines  # the first one may be a piece, or is what is before the line break


def checkpoints(folder):
    """Complete checkpoints in the folder of a run, oldest step first (never by time stamps: clocks lie)."""
    found = [file.parent for file in Path(folder).glob(f"checkpoint-*/{COMPLETE}") if file.is_file()]
    return sorted((path for path in found if path.name.removeprefix("checkpoint-").isdecimal()), key=step_of)


def step_of(path):
    """The step of the checkpoint folder `path`, by its name."""
    return int(path.name.removeprefix("checkpoint-"))


class Events:
    """The events of events.jsonl in their order, each a dict with at least event, restart and time.

    Iterating parses them one by one; the rest of what is asked looks at their names, and parses what it gives.
    """

    def __init__(self, path):
        self._lines, self._where = [line for line in _lines(path) if line.endswith(b"}")], {}
        for number, line in enumerate(self._lines):
            self._where.setdefault(_name(line), []).append(number)
        self._where.pop(None, None)

    def __iter__(self):
        return filter(None, map(_event, self._lines))

    def named(self, name):
        """All of one name, in order, parsed as they are taken."""
        return self._parsed(self._where.get(name, ()))

    def first(self, name):
        """The first one of a name; None if there is none."""
        return next(self.named(name), None)

    def last(self, name=None, *having):
        """The last one, of a name or of all, that has the keys `having`; None if there is none."""
        numbers = self._where.get(name, []) if name else range(len(self._lines))
        return next((event for event in self._parsed(reversed(numbers)) if all(key in event for key in having)), None)

    def newest(self, name, most):
        """The last `most` of a name, the newest first, parsed as they are taken."""
        return self._parsed(reversed(self._where.get(name, [])[-most:]))

    def counts(self):
        """{name: how many}, in the order in which the names first came."""
        return {name: len(numbers) for name, numbers in self._where.items()}

    def count_since(self, name, other):
        """How many of `name` came after the last one of `other`; all where there is none."""
        numbers, since = self._where.get(name, []), self._where.get(other, [-1])[-1]
        return len(numbers) - bisect.bisect_right(numbers, since)

    def _parsed(self, numbers):
        return filter(None, (_event(self._lines[number]) for number in numbers))


def _event(line):
    event = parse(line, "event", "restart", "time")
    if event and event["event"] == "checkpoint" and (seconds := event.get("seconds")) is not None:
        return event if _is(seconds, float) and 0.0 <= seconds < _LONGEST_SAVE_S else None
    return event


def _name(line):
    """The event's name by the line's first bytes, where it stands as Journal writes it; None for what is no event."""
    end = line.find(b'"', len(_BEGINS))
    if line.startswith(_BEGINS) and end > 0:
        return line[len(_BEGINS) : end].decode(errors="replace")
    return (_event(line) or {}).get("event")
