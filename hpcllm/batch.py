"""What the job scripts ask of a run and of their job, in a process without MPI and torch.

    python -m hpcllm.batch left                             seconds until the job is ended; nothing where nobody says
    python -m hpcllm.batch folder RUN_FILE [key=value ...]  run.output_dir
    python -m hpcllm.batch newest RUN_FILE [key=value ...]  step of the newest complete checkpoint there, 0 if none
    python -m hpcllm.batch starts RUN_FILE [key=value ...]  how often the run there has been started
    python -m hpcllm.batch over STARTS RUN_FILE [...]       yes if a start after so many has ended as it wanted, else no

Options among the arguments (--resume) are left out, so that those of `hpcllm train` can be given as they are.
"""

import sys
import time
from pathlib import Path

from . import config, deadline, records, stopping
from .errors import Refusal


def left(now=None):
    """Whole seconds until this job is ended, 0 after that; None where nobody says."""
    end = deadline.end_of_job()
    return None if end is None else max(0, int(end - (now or time.time())))


def folder(run_file, *settings):
    """run.output_dir of a run file with `settings`, key=value. Raises as `config.load`."""
    return _load(run_file, settings).run.output_dir


def _load(run_file, settings):
    return config.load(run_file, [each for each in settings if not each.startswith("-")])


def newest(run_file, *settings):
    """The step of the newest complete checkpoint in the folder of a run, 0 if there is none."""
    return max(map(records.step_of, records.checkpoints(folder(run_file, *settings))), default=0)


def starts(run_file, *settings):
    """How often the run in a folder has got as far as to say that it has started."""
    return records.Events(Path(folder(run_file, *settings)) / records.EVENTS).counts().get("start", 0)


def over(began, run_file, *settings):
    """Whether a run has ended as it wanted, not in the middle of something: "yes" or "no".

    began: what `starts` was before it was started last.
    """
    run = _load(run_file, settings)
    output = Path(run.run.output_dir)
    events = records.Events(output / records.EVENTS)
    if stopping.stop_file(output):
        return "yes"
    if events.counts().get("start", 0) > int(began):
        return "yes" if events.last()["event"] in ("end", "stop") else "no"
    # It has not got that far, or there was nothing to do.
    wanted = run.train.max_steps or (events.last("start", "max_steps") or {}).get("max_steps")
    done = wanted and newest(run_file, *settings) >= wanted and (output / "results.json").is_file()
    return "yes" if done else "no"


_ASKED = {"left": left, "folder": folder, "newest": newest, "starts": starts, "over": over}

if __name__ == "__main__":
    try:
        answer = _ASKED[sys.argv[1]](*sys.argv[2:])
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(refusal.code)
    if answer is not None:
        print(answer)
