"""The folder of a run: what is in it, whether a new run or a continued one may have it, which checkpoint stands for it.

All of it is root's: the others are told.
"""

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from pathlib import Path

from . import best, checkpoint, deadline, files, heartbeat, monitor, records, stopping
from .config import load
from .errors import CannotCreate, DataError, Fruitless, MissingInput, UsageError

_OURS = ("config.toml", records.METRICS, records.EVENTS, "results.json", heartbeat.NAME, stopping.SAVE, stopping.STOP,
         stopping.GROW)  # fmt: skip
_LOCK = "lock"
# The file system may take so long to learn that the node of a job that held the lock is dead.
_PATIENCE_S = 300.0
_held = {}  # {path of a lock: open file}
_REPORTS = [f"{part}_{name}" for part in ("eval", "test") for name in ("results.json", "report.txt", "confusion.png")]


def lock(output_dir, patience_s=None):
    """Have the run in this folder for this process alone, until `unlock` or its end; once is enough. Root only.

    patience_s: how long to wait for another one. Raises CannotCreate where that goes on, unless it is an earlier start
    of this very job, which is over: some file servers keep what a node that has died had locked.
    """
    path, told = Path(output_dir) / _LOCK, False
    if path in _held:  # to take it again would give it away for a moment
        return
    began = time.monotonic()
    while not _taken(path):
        holder = _read(path)
        if _is_over(holder):
            print(f"{output_dir}: {holder} is over, and has left its lock behind, which is removed", flush=True)
            path.unlink(missing_ok=True)
            continue
        if time.monotonic() - began >= (_PATIENCE_S if patience_s is None else patience_s):
            raise CannotCreate(
                f"run.output_dir: another job trains in {output_dir} ({holder or 'which has just begun'}); one at "
                f"a time. If that one is over, delete {path}"
            )
        if not told:
            print(f"{output_dir}: waits for another job that trains in it, or has just ended", flush=True)
            told = True
        time.sleep(0.2)


def _taken(path):
    """Whether this process has the lock now, which then says so."""
    file = open(path, "ab")  # noqa: SIM115 (closed by `unlock`)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return False
    except OSError as error:
        print(f"{path.parent} cannot be locked ({error.strerror}): start no second job for this run", flush=True)
    else:
        if not _is_still(path, file):  # somebody has removed it meanwhile
            file.close()
            return False
        with contextlib.suppress(OSError):  # a full disk, on which a run may still be asked what it has
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{_who()} on {socket.gethostname()} since {time.strftime('%FT%T')}\n".encode())
    _held[path] = file
    return True


def _is_still(path, file):
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _read(path):
    try:
        return path.read_text(errors="replace")[:200].strip()
    except FileNotFoundError:
        return ""


def _who():
    """How this process calls itself as the holder of a lock: its job, and which start of that, or its number."""
    job = deadline.job()
    return f"job {job}, start {'.'.join(map(str, _start()))}," if job else f"process {os.getpid()}"


def _start():
    """(how often Slurm has queued this job again, how often slurm/launch.sh has started its ranks again)."""
    told = (os.environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "HPCLLM_LAUNCH"))
    return tuple(int(one) if one.isdigit() else 0 for one in told)


def _is_over(holder):
    """Whether the holder of a lock is a start of this job before this one, which the next has waited for."""
    found = re.match(r"job (\S+), start (\d+)\.(\d+),", holder)
    return bool(found) and found[1] == deadline.job() and (int(found[2]), int(found[3])) < _start()


def unlock():
    """Leave the run to others."""
    while _held:
        _held.popitem()[1].close()


def find_start(config, resume, overwrite):
    """(checkpoint to continue from or None, its state, results of a run that is over or None). Root only.

    Refuses an output folder that is in the way, locks it, and verifies the checkpoint.
    """
    with files.failing_as_io(config.run.output_dir):
        return _find_start(config, Path(config.run.output_dir), resume, overwrite)


def _find_start(config, output, resume, overwrite):
    if resume and overwrite:
        raise UsageError("--resume continues a run and --overwrite deletes it; give one of them")
    if output.exists() and not output.is_dir():
        raise CannotCreate(f"run.output_dir: {output} is a file")
    if (resume or overwrite) and (output / records.EVENTS).is_file():
        lock(output)
    if resume:
        checkpoint.rescue(output)
    found = checkpoint.find(output)
    if output.is_dir() and any(path.name != _LOCK for path in output.iterdir()):
        if not (output / records.EVENTS).is_file():
            raise CannotCreate(
                f"run.output_dir: {output} is not empty and holds no run of hpcllm; choose another folder"
            )
        if not resume and not overwrite:
            raise CannotCreate(
                f"run.output_dir: {output} holds a run already (newest checkpoint: "
                f"{found[-1].name if found else 'none'}); "
                "continue it with --resume, replace it with --overwrite, or choose another folder"
            )
    started, fruitless, longest_save_s = monitor.history(output) if resume else (0, 0, 0.0)
    state = {"step": 0, "samples": 0, "restart": started, "useful_s": 0.0, "nonfinite": 0}
    state["longest_save_s"] = longest_save_s
    if file := resume and stopping.stop_file(output):
        print(f"{output}: nothing is done while there is a file {file}; delete it to go on", flush=True)
        return None, state, {"stopped": f"the file {stopping.STOP}"}
    if 0 < config.run.max_fruitless_starts <= fruitless:
        raise Fruitless(
            f"{output} was started {fruitless} times in a row without a new checkpoint (its log says why); once that "
            f"is mended, start it with run.max_fruitless_starts={fruitless + 1}"
        )
    if not resume or not found:
        return None, state, None
    state["damaged"] = _pass_over_damaged(found)
    state |= {**checkpoint.read_state(found[-1]), "restart": started}
    if f"checkpoint-{best.step(state)}" not in [path.name for path in found]:
        state["best"] = None  # it was moved away, or this is older
    if state["step"] > config.train.max_steps:
        raise UsageError(f"--resume: {found[-1]} is beyond train.max_steps ({config.train.max_steps})")
    file = output / "results.json"
    results = read_results(file)
    over = state["step"] == config.train.max_steps or results.get("stopped_early")
    if not over or results.get("step") != state["step"]:  # or those of a shorter run
        return found[-1], state, None
    print(f"{output}: the run is over, all {state['step']} steps of it; for more give train.max_steps", flush=True)
    return found[-1], state, results


def read_results(file):
    """What results.json says; nothing where it is not there or cannot be read: it can be made again."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return results if isinstance(results, dict) else {}


def _pass_over_damaged(found):
    """Take checkpoints that are not what was written off the end of `found`, and return them. Raises DataError."""
    damaged = []
    while True:
        try:
            checkpoint.verify(found[-1])
        except DataError as error:
            damaged.append(found.pop())
            if not found:
                raise DataError(f"{error}, and there is no older one; move it away to begin from the start") from None
            print(
                f"{error}; it will be called damaged-{damaged[-1].name}; continuing from {found[-1].name}", flush=True
            )
        else:
            return damaged


def open_output(config, resume, overwrite, damaged=()):
    """Make the output folder, emptied of an older run where that was asked for, and write config.toml. Root only.

    damaged: checkpoints that are to have other names from now on.
    """
    output = Path(config.run.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock(output, 0)
        if overwrite:
            for old in checkpoint.find(output):
                files.remove_folder(old, checkpoint.COMPLETE)
            for name in (*_OURS, *_REPORTS):
                (output / name).unlink(missing_ok=True)
        checkpoint.remove_unfinished(output)
        checkpoint.set_aside(damaged)
        checkpoint.point(output)
        (output / records.EVENTS).touch()  # what says that this folder is a run of ours
    except OSError as error:
        raise CannotCreate(f"run.output_dir: {output} cannot be created: {error.strerror}") from None
    files.write_text(output / "config.toml", config.toml())


def newest_good(output_dir):
    """Path of the newest checkpoint that is what was written, None where there is none. Root only.

    Newer ones get other names. Raises DataError where all are damaged.
    """
    with files.failing_as_io(output_dir):
        found = checkpoint.find(output_dir)
        checkpoint.set_aside(_pass_over_damaged(found) if found else [])
        return found[-1] if found else None


def go_back(output_dir, first):
    """(newest good checkpoint of a step before `first`, its state), where newer ones are deleted. Root only.

    (None, None), and nothing deleted, where there is none. Raises IOFailure where a folder cannot be changed.
    """
    with files.failing_as_io(output_dir):
        return _go_back(output_dir, first)


def _go_back(output_dir, first):
    found = checkpoint.find(Path(output_dir))
    older = [path for path in found if checkpoint.step_of(path) < first]
    try:
        damaged = _pass_over_damaged(older) if older else []
    except DataError:
        older = []
    if not older:
        return None, None
    # A run that is killed meanwhile goes on from the newest that is left, and comes to the same place again.
    for newer in reversed(found):
        if checkpoint.step_of(newer) >= first:
            checkpoint.forget(newer)
    checkpoint.set_aside(damaged)
    checkpoint.point(output_dir)
    state = checkpoint.read_state(older[-1])
    if f"checkpoint-{best.step(state)}" not in [path.name for path in older]:
        state["best"] = None
    return older[-1], state


def best_there_is(output_dir, wanted):
    """`wanted`, a best of `best`, if its checkpoint is there; else what the newest one knows, or None. Root only."""
    with files.failing_as_io(output_dir):
        found = checkpoint.find(output_dir) if wanted else []
    names = [path.name for path in found]
    if wanted and f"checkpoint-{wanted['step']}" in names:
        return wanted
    known = found and checkpoint.read_state(found[-1]).get("best")
    return known if known and f"checkpoint-{known['step']}" in names else None


def run_config(path):
    """(config.Config, checkpoint folder) of a checkpoint, or of a run the best, else the newest one. Root only."""
    with files.failing_as_io(path):
        return _run_config(Path(path))


def _run_config(folder):
    if folder.is_symlink():  # `latest`, which leads elsewhere the next moment
        folder = folder.resolve()
    if not (folder / "trainer_state.json").is_file():
        found = checkpoint.find(folder)
        if not found:
            raise MissingInput(f"{folder} is neither a checkpoint nor a run folder with a complete checkpoint")
        step = best.step(checkpoint.read_state(found[-1]))
        folder = next((path for path in found if path.name == f"checkpoint-{step}"), found[-1])
    checkpoint.verify(folder)
    settings = checkpoint.read_state(folder).get("config")
    if not isinstance(settings, dict):
        raise DataError(f"{folder}: trainer_state.json does not say of which run it is")
    return load(settings), folder
