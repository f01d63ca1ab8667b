"""When the batch system ends this job: Slurm and PBS are asked by their own commands, seldom until the end is near."""

import contextlib
import os
import re
import subprocess
import time

_PATIENCE_S = 10.0  # for a controller that is busy
_DURATION = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")


def seconds(text):
    """Seconds of a duration as batch systems write it: [[days-]hours:]minutes:seconds. Raises ValueError."""
    found = _DURATION.fullmatch(text.strip())
    if not found:
        raise ValueError(f'"{text}" is no time such as 12:00:00 (hours, minutes, seconds) or 1-12:00:00 (a day more)')
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def job(environment=os.environ):
    """What the batch system calls this job; None outside of one. Of a job array, the one of it that this is."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID") or environment.get("PBS_JOBID")


def end_of_job(known=None, environment=os.environ):
    """The time at which this job will be ended, in seconds since 1970; None where nobody says.

    HPCLLM_END_TIME counts first, which a site's profile may set. Then what squeue or qstat say now: limits are changed
    while jobs run, and a reservation may end before them. Then what was `known` before, since a controller may be too
    busy to answer, and SLURM_JOB_END_TIME, which is that of the job's start, for nodes without squeue.
    """
    with contextlib.suppress(KeyError, ValueError):
        return float(environment["HPCLLM_END_TIME"])
    found = None
    if "SLURM_JOB_ID" in environment:
        found = _slurm(job(environment))
    elif "PBS_JOBID" in environment:
        found = _pbs(environment["PBS_JOBID"])
    if found is None and known is None:
        with contextlib.suppress(KeyError, ValueError):
            return float(environment["SLURM_JOB_END_TIME"])
    return known if found is None else found


def _slurm(job):
    told = _ask("squeue", "--noheader", "--jobs", job, "--format", "%e", SLURM_TIME_FORMAT="standard")
    ends = []
    for line in told.split():  # one for each part of a heterogeneous job
        with contextlib.suppress(ValueError):  # N/A of a job without a limit
            ends.append(time.mktime(time.strptime(line, "%Y-%m-%dT%H:%M:%S")))
    return min(ends, default=None)


def _pbs(job):
    told = _ask("qstat", "-f", job)
    began = re.search(r"^\s*(?:stime|start_time) = (.+)$", told, re.MULTILINE)
    limit = re.search(r"^\s*Resource_List\.walltime = (\S+)$", told, re.MULTILINE)
    with contextlib.suppress(ValueError, TypeError):
        return time.mktime(time.strptime(began[1].strip())) + seconds(limit[1])
    return None


def _ask(*command, **environment):
    """What a command of the batch system prints; nothing where it is missing, fails, or does not answer."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        env = {**os.environ, "LC_ALL": "C", **environment}
        return subprocess.run(command, text=True, timeout=_PATIENCE_S, env=env, **how).stdout
    return ""
