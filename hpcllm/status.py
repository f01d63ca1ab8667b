"""How far a run is, told by its folder alone: for people on a login node, where there is neither MPI nor a GPU."""

import statistics
import time
import tomllib
from pathlib import Path

from . import records
from .errors import DataError, MissingInput
from .heartbeat import in_words

_TAIL_BYTES = 1 << 16  # of metrics.jsonl, which grows: more than enough for the newest steps
_FURTHER_BYTES = 1 << 22  # to look for an evaluation
_NEWEST = 20
_ENDED = {"stop": "stopped", "failed": "failed"}  # event -> what a run is whose last one it is
# Events of any run; all others are told of, by name and number.
_ORDINARY = {"start", "first_step", "checkpoint", "communication", "interval", "stop", "end"}
# A run that has told nothing for so long, and for so many steps, or before its first step, may be dead.
_SILENT_S, _SILENT_STEPS, _START_S = 600.0, 10, 1800.0


def status(folder, now=None):
    """A dict of what is known of the run in `folder`; times in seconds, moments in seconds since 1970.

    Raises MissingInput for a folder that holds no run, DataError for one whose records cannot be read.
    """
    folder, now = Path(folder), now or time.time()
    file, metrics = folder / records.EVENTS, folder / records.METRICS
    if not file.is_file():
        raise MissingInput(f"{folder} is no folder of a run: it has no events.jsonl")
    events, told = records.Events(file), records.tail(metrics, _TAIL_BYTES, "step", "restart", "time")
    counts, last, start = events.counts(), events.last(), events.last("start", "step", "ranks", "hosts")
    if last is None and file.stat().st_size:
        raise DataError(f"{file} holds no records")
    if not told and metrics.is_file() and metrics.stat().st_size > _TAIL_BYTES:
        raise DataError(f"{metrics} holds no records")
    if start is None:
        return {"run": str(folder), "state": "has not started yet", "starts": 0}
    evaluations = [record for record in told if "eval_loss" in record]
    if not evaluations and told:
        evaluations = records.tail(metrics, _FURTHER_BYTES, "step", "eval_loss", holding=b'"eval_loss"')
    steps = [record for record in told if "loss" in record and record.get("step_s") is not None]
    newest = steps[-1] if steps else None
    heard = max(last["time"], newest["time"] if newest else 0.0)
    lately = [record for record in steps if record["restart"] == start["restart"]][-_NEWEST:]
    step_s = statistics.median(record["step_s"] for record in lately) if lately else None
    found = {
        "run": str(folder),
        "task": _task(folder),
        "state": _state(last, now - heard, step_s),
        "silent_s": now - heard,
        "job": start.get("job"),
        "ranks": start["ranks"],
        "hosts": start["hosts"],
        "starts": counts["start"],
        "restarts": counts["start"] - 1,
        "fruitless_starts": events.count_since("start", "checkpoint"),
        "happened": {name: count for name, count in counts.items() if name not in _ORDINARY},
        "step": newest["step"] if lately else start["step"],
        "max_steps": start.get("max_steps"),
    }
    if lately:
        found |= {name: newest.get(name) for name in ("loss", "learning_rate", "tokens_per_s", "mfu", "memory_bytes")}
        found["step_s"] = step_s
        if "useful_s" in newest:
            found["goodput"] = newest["useful_s"] / max(heard - events.first("start")["time"], 1e-9)
    if found["state"] == "runs" and step_s and found["max_steps"]:
        found["left_s"] = (found["max_steps"] - found["step"]) * step_s
    if found["state"] == "runs" and start.get("ends"):
        found["job_left_s"] = start["ends"] - now
    if evaluations:
        found["eval"] = {name: value for name, value in evaluations[-1].items() if name.startswith("eval_")}
        found["eval"]["step"] = evaluations[-1]["step"]
    if saved := records.checkpoints(folder):  # what was written last may have been found to be damaged since
        path, step = saved[-1], records.step_of(saved[-1])
        told = next((event for event in events.newest("checkpoint", _NEWEST) if event.get("step") == step), {})
        found["checkpoint"] = {
            "step": step,
            "path": str(path),
            "time": told.get("time"),
            "seconds": told.get("seconds"),
        }
    return found


def _state(last, silent_s, step_s):
    """One of: finished, stopped (why), failed (why), runs, silent; by the last event."""
    if last["event"] == "end":
        return "finished"
    if last["event"] in _ENDED:
        return f"{_ENDED[last['event']]} ({last.get('why')})"
    patience_s = _START_S if step_s is None else max(_SILENT_S, _SILENT_STEPS * step_s)
    return "silent" if silent_s > patience_s else "runs"


def show(found):
    """The same in words, a fact a line."""
    if not found["starts"]:
        return f"{found['run']}: {found['state']}"
    silent = in_words(found["silent_s"])
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
    if found["restarts"]:
        lines.append(f"restarts    {found['restarts']}, {found['fruitless_starts']} since the newest checkpoint")
    if found["happened"]:
        lines.append(f"happened    {', '.join(f'{name} {count}' for name, count in found['happened'].items())}")
    if "eval" in found:
        told = {name: value for name, value in found["eval"].items() if isinstance(value, float)}
        numbers = " ".join(f"{name}={value:.4f}" for name, value in told.items())
        lines.append(f"evaluated   step {found['eval']['step']}: {numbers}")
    if "checkpoint" in found:
        saved = found["checkpoint"]
        took = f", written in {saved['seconds']:.1f} s" if saved["seconds"] is not None else ""
        lines.append(f"checkpoint  step {saved['step']}{took}: {saved['path']}")
    names = {"left_s": "to the last step", "job_left_s": "to the end of the job"}
    left = [f"{in_words(found[name])} {what}" for name, what in names.items() if name in found]
    if left:
        lines.append(f"left        {', '.join(left)}")
    return "\n".join(lines)


def _number(value, otherwise="-", form=".4f"):
    return otherwise if value is None else format(value, form)


def _task(folder):
    """The task that the run's config.toml names, None where that cannot be read."""
    try:
        return str(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))["model"]["task"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
