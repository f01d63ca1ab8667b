"""How far a run is, told by its folder alone: for people on a login node, where there is neither MPI nor a GPU."""

import contextlib
import json
import os
import statistics
import time
import tomllib
from pathlib import Path

from .errors import DataError, MissingInput

_TAIL_BYTES = 1 << 16  # of metrics.jsonl, which grows: more than enough for the newest steps
_FURTHER_BYTES = 1 << 22  # to look for an evaluation
_NEWEST = 20
# What records must have to be told of; one that has it otherwise is as good as cut. None is what is not known.
_RECORD = {"restart": int, "time": float}
_EVENT = {"event": str, **_RECORD}
_EVENTS = {"start": {"step": int, "ranks": int, "hosts": list}, "stop": {"why": str}}
_EVENTS |= {"checkpoint": {"step": int, "path": str}}
_STEP = {"step": int, **_RECORD, "step_s": float}
_EVALUATION = {"step": int, **_RECORD}
_MAYBE = dict.fromkeys(("learning_rate", "tokens_per_s", "mfu", "memory_bytes", "useful_s", "loss"), float)
_MAYBE |= {"seconds": float, "ends": float, "max_steps": int}
# A run that has told nothing for so long, and for so many steps, or before its first step, may be dead.
_SILENT_S, _SILENT_STEPS, _START_S = 600.0, 10, 1800.0


def status(folder, now=None):
    """A dict of what is known of the run in `folder`; times in seconds, moments in seconds since 1970.

    Raises MissingInput for a folder that holds no run, DataError for one whose records cannot be read.
    """
    folder, now = Path(folder), now or time.time()
    if not (folder / "events.jsonl").is_file():
        raise MissingInput(f"{folder} is no folder of a run: it has no events.jsonl")
    events = _records(folder / "events.jsonl", _is_event)
    records = _records(folder / "metrics.jsonl", _is_metrics, _TAIL_BYTES)
    evaluations = [record for record in records if "eval_loss" in record]
    if not evaluations and records:
        evaluations = [r for r in _records(folder / "metrics.jsonl", _is_metrics, _FURTHER_BYTES) if "eval_loss" in r]
    starts = [event for event in events if event["event"] == "start"]
    steps = [record for record in records if "loss" in record]
    if not starts:
        return {"run": str(folder), "state": "has not started yet", "starts": 0}
    start, last = starts[-1], events[-1]
    newest = steps[-1] if steps else None
    heard = max(last["time"], newest["time"] if newest else 0.0)
    lately = [record for record in steps if record["restart"] == start["restart"]][-_NEWEST:]
    step_s = statistics.median(record["step_s"] for record in lately) if lately else None
    found = {
        "run": str(folder),
        "task": _task(folder),
        "state": _state(events, now - heard, step_s),
        "silent_s": now - heard,
        "job": start.get("job"),
        "ranks": start["ranks"],
        "hosts": start["hosts"],
        "starts": len(starts),
        "step": newest["step"] if lately else start["step"],
        "max_steps": start.get("max_steps"),
    }
    if lately:
        found |= {name: newest.get(name) for name in ("loss", "learning_rate", "tokens_per_s", "mfu", "memory_bytes")}
        found["step_s"] = step_s
        if "useful_s" in newest:
            found["goodput"] = newest["useful_s"] / max(heard - starts[0]["time"], 1e-9)
    if found["state"] == "runs" and step_s and found["max_steps"]:
        found["left_s"] = (found["max_steps"] - found["step"]) * step_s
    if found["state"] == "runs" and start.get("ends"):
        found["job_left_s"] = start["ends"] - now
    if evaluations:
        found["eval"] = {name: value for name, value in evaluations[-1].items() if name.startswith("eval_")}
        found["eval"]["step"] = evaluations[-1]["step"]
    saved = [event for event in events if event["event"] == "checkpoint"]
    if saved:
        found["checkpoint"] = {name: saved[-1].get(name) for name in ("step", "path", "time", "seconds")}
    return found


def _state(events, silent_s, step_s):
    """One of: finished, stopped (why), runs, silent."""
    last = events[-1]
    if last["event"] == "end":
        return "finished"
    if last["event"] == "stop":
        return f"stopped ({last['why']})"
    patience_s = _START_S if step_s is None else max(_SILENT_S, _SILENT_STEPS * step_s)
    return "silent" if silent_s > patience_s else "runs"


def show(found):
    """The same in words, a fact a line."""
    if not found["starts"]:
        return f"{found['run']}: {found['state']}"
    silent = _long(found["silent_s"])
    says = {
        "silent": f"no word for {silent}: it was ended, hangs, or evaluates",
        "runs": f"runs, heard of {silent} ago",
    }
    job, hosts = f"job {found['job']}, " if found["job"] else "", len(found["hosts"])
    where = f"{job}{found['ranks']} ranks on {hosts} host{'s' * (hosts > 1)}, start {found['starts']}"
    of = f" of {found['max_steps']} ({found['step'] / found['max_steps']:.0%})" if found["max_steps"] else ""
    lines = [f"{found['run']}: {says.get(found['state'], found['state'])}", f"task        {found['task']}, {where}"]
    lines.append(f"step        {found['step']}{of}")
    if "loss" in found:
        loss, rate = _number(found["loss"], "not a number"), _number(found["learning_rate"], form=".3e")
        lines.append(f"loss        {loss}, learning rate {rate}")
        tokens, mfu = _number(found["tokens_per_s"], form=".0f"), _number(found["mfu"], form=".3f")
        memory = _number(found["memory_bytes"] and found["memory_bytes"] / 2**30, form=".1f")
        lines.append(f"rate        {found['step_s']:.3f} s a step, {tokens} tokens/s, MFU {mfu}, {memory} GiB a rank")
    if "goodput" in found:
        lines.append(f"goodput     {found['goodput']:.3f}")
    if "eval" in found:
        told = {name: value for name, value in found["eval"].items() if isinstance(value, float)}
        numbers = " ".join(f"{name}={value:.4f}" for name, value in told.items())
        lines.append(f"evaluated   step {found['eval']['step']}: {numbers}")
    if "checkpoint" in found:
        saved = found["checkpoint"]
        took = f", written in {saved['seconds']:.1f} s" if saved["seconds"] is not None else ""
        lines.append(f"checkpoint  step {saved['step']}{took}: {saved['path']}")
    names = {"left_s": "to the last step", "job_left_s": "to the end of the job"}
    left = [f"{_long(found[name])} {what}" for name, what in names.items() if name in found]
    if left:
        lines.append(f"left        {', '.join(left)}")
    return "\n".join(lines)


def _number(value, otherwise="-", form=".4f"):
    return otherwise if value is None else format(value, form)


def _long(seconds):
    """A duration in words: 12 s, 5 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{max(seconds, 0.0):.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _task(folder):
    """The task that the run's config.toml names, None where that cannot be read."""
    try:
        return str(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))["model"]["task"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_event(record):
    return _has(record, _EVENT) and _has(record, _EVENTS.get(record["event"], {}))


def _is_metrics(record):
    return _has(record, _STEP if "loss" in record else _EVALUATION)


def _has(record, wanted):
    """Whether a record has these values, and of those that it may have none of another kind."""
    may = {name: kind for name, kind in _MAYBE.items() if record.get(name) is not None}
    return all(_is(record.get(name), kind) for name, kind in (wanted | may).items())


def _is(value, kind):
    if kind in (int, float):
        numbers = (int,) if kind is int else (int, float)
        return type(value) in numbers and -1e15 < value < 1e15
    return isinstance(value, kind)


def _records(path, sound, tail=None):
    """The records of a file of JSON lines, or of its last `tail` bytes; a line that is being written is left out, and
    one that is not `sound`."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - tail) if tail else 0
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
    found = []
    for line in lines[1 if start else 0 :]:
        with contextlib.suppress(ValueError, RecursionError):  # cut by a full disk, or a kill
            record = json.loads(line)
            if isinstance(record, dict) and sound(record):
                found.append(record)
    if lines and not found:
        raise DataError(f"{path} holds no records")
    return found
