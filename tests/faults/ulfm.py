"""Ranks of a training job are killed at random moments and the others go on: does that hold, how long does it take?

    python -m tests.faults.ulfm [--times 20] [--exact 1] [--two-hosts] [--spares 1] [CASE ...]

For each case, 4 ranks train a BERT of 60,000 parameters `--times` times under mpirun --with-ft ulfm, and at a random
moment some are killed. The table tells: runs that came to their end (exit code 0, all steps, a complete checkpoint);
steps that had been agreed on and were lost; steps whose loss is not that of a run that nothing happened to, to float
order; seconds from the kill to the next step that the others have agreed on. Of the first `--exact` runs of a case the
weights are compared, byte by byte, with those of a run that was continued, from the step in question, on as many ranks
as were left, each on the host it was on. Ends with 1 where something does not hold.

--spares: so many more ranks wait, and take the places of those that are killed (`resilience.spares`); one of these is
killed as well then, in the case "a spare".

--two-hosts (root): ranks 0 and 1, and 2 and 3, on two hosts, which are network namespaces of this machine with a link
between them. (When a host dies with mpirun's daemon on it, Open MPI 5.0's mpirun gives up, and the job with it.)
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

from benchmarks import jobs
from hpcllm import checkpoint
from hpcllm.errors import DataError
from tests.faults.matrix import Folder, differing, events
from tests.launching import clean_environment, find_mpirun

DYING = jobs.ROOT / "tests" / "dying.py"
RANKS, STEPS = 4, 40
CASES = {"a rank": (2,), "rank 0": (0,), "two ranks": (1, 2), "three ranks": (0, 1, 3), "all of a host": (2, 3)}
A_SPARE = {"a spare": (RANKS,)}
EVERY = CASES | A_SPARE
SURVIVING = ("--with-ft", "ulfm", "--mca", "coll", "^han")
# Float order: losses of about 6, of which sums of four and of three ranks round differently.
TOLERANCE = 1e-4

AGENT = """#!/bin/sh
# As ssh: run the command on host $1.
host=$1
shift
exec nsenter --net=/run/netns/hpcllm-$host unshare --uts --mount --propagation private sh -c '
    hostname "$1"
    mount --bind {hosts} /etc/hosts
    mount -t tmpfs tmpfs /dev/shm
    mkdir -p {folder}/$1
    export TMPDIR={folder}/$1
    shift
    eval "$*"' sh "$host" "$@"
"""


class OneHost:
    """Jobs on this machine."""

    environment, cases = types.MappingProxyType({}), ("a rank", "rank 0", "two ranks", "three ranks")

    def command(self, ranks, words, gone=()):
        """Words that start `python WORDS` on `ranks` ranks, on the places of those that are not in `gone`."""
        where = self._places(gone)
        return [*find_mpirun(), *SURVIVING, *where, "-np", str(ranks), sys.executable, *map(str, words)]

    def _places(self, gone):
        return ()

    def kill(self, case, pids):
        for rank in EVERY[case]:
            os.kill(pids[rank], signal.SIGKILL)


class TwoHosts(OneHost):
    """Jobs on f1 and f2, two hosts that are network namespaces; mpirun runs on f1."""

    cases = tuple(CASES)

    def __init__(self, folder):
        self._agent, hosts = Path(folder) / "agent", Path(folder) / "hosts"
        hosts.write_text("127.0.0.1 localhost\n10.78.0.1 f1\n10.78.0.2 f2\n")
        self._agent.write_text(AGENT.format(hosts=hosts, folder=folder))
        self._agent.chmod(0o755)
        self.environment = {"PRTE_MCA_plm_ssh_agent": str(self._agent)}
        self.down()
        for number in (1, 2):
            _ip("netns", "add", f"hpcllm-f{number}")
        _ip("-n", "hpcllm-f1", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", "hpcllm-f2")
        for number in (1, 2):
            _ip("-n", f"hpcllm-f{number}", "addr", "add", f"10.78.0.{number}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", f"hpcllm-f{number}", "link", "set", link, "up")

    def command(self, ranks, words, gone=()):
        return [str(self._agent), "f1", "exec", *super().command(ranks, words, gone)]

    def _places(self, gone):
        left = {host: sum(rank not in gone for rank in its) for host, its in (("f1", (0, 1)), ("f2", (2, 3)))}
        return "--host", ",".join(f"{host}:{count}" for host, count in left.items() if count)

    def down(self):
        for number in (1, 2):
            subprocess.run(["ip", "netns", "del", f"hpcllm-f{number}"], capture_output=True)


def _ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Notes:
    """What dying.py has noted of a job: numbers of its processes by rank, and when each has committed which step."""

    def __init__(self, path, ranks):
        self.pids, self.commits = {}, {}
        for rank in range(ranks):
            file = path.with_name(f"{path.name}-{rank}")
            lines = file.read_text().splitlines() if file.exists() else []
            records = [json.loads(line) for line in lines if line.endswith("]")]
            if records:
                self.pids[rank] = records[0][1]
            self.commits[rank] = [tuple(record) for record in records[1:]]


def once(hosts, folder, case, number, draw, spares=0):
    """One run in which some are killed; returns a dict of what came of it."""
    name, ranks = f"{case.replace(' ', '-')}-{number}", RANKS + spares
    run_file, note = folder.run_file(name, STEPS, 10), folder.base / f"{name}.note"
    command = hosts.command(ranks, [DYING, "--", "train", run_file, f"resilience.spares={spares}"])
    environment = clean_environment(DYING_NOTE=str(note), **hosts.environment)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, cwd=jobs.ROOT, **pipes) as job:
        said = ""
        for line in job.stdout:
            said += line
            if line.startswith("step 3/"):
                break
        time.sleep(draw.uniform(0.0, 1.0))
        killed = time.time()
        hosts.kill(case, Notes(note, ranks).pids)
        try:
            said += job.communicate(timeout=90)[0]
        except subprocess.TimeoutExpired:
            job.terminate()
            said += job.communicate()[0]
    return {"name": name, "rc": job.returncode, "said": said, "killed": killed, "notes": Notes(note, ranks)}


def uninterrupted(folder):
    """{step: loss} of a run that nothing happens to."""
    if not (folder.base / "reference").exists():
        folder.train(folder.run_file("reference", STEPS, 0), "parallel.sharding=none", check=True)
    return {record["step"]: record["loss"] for record in jobs.metrics(folder.base / "reference")}


def judge(folder, result, reference):
    """What holds of a run: finished, steps lost, wrong steps, seconds to the next committed step, step gone on from."""
    run = folder.base / result["name"]
    finished, died = result["rc"] == 0, events(run, "died") if (run / "events.jsonl").exists() else []
    try:
        checkpoint.verify(run / f"checkpoint-{STEPS}")
    except DataError:
        finished = False
    losses = {record["step"]: record["loss"] for record in jobs.metrics(run) if "loss" in record}
    wrong = sum(abs(loss - reference[step]) > TOLERANCE for step, loss in losses.items())
    if not died:
        return {"finished": False, "lost": None, "wrong": wrong, "seconds": None, "from": None}
    commits = [one for some in result["notes"].commits.values() for one in some]
    before = max((step for step, when in commits if when < result["killed"]), default=0)
    after = min((when for _, when in commits if when > died[0]["time"]), default=float("nan"))
    return {
        "finished": finished,
        "lost": max(0, before - died[-1]["goes_on_from"]),
        "wrong": wrong,
        "seconds": after - result["killed"],
        "from": died[-1]["goes_on_from"],
        "left": died[-1]["left"],
    }


def compared(hosts, folder, result, found, gone):
    """Bytes in which the run differs from one that was continued without the ranks `gone` from the step in question."""
    name = f"{result['name']}-steady"
    how = ["--resume", "parallel.sharding=none", "checkpoint.every_steps=0"]
    for ranks, dead, step in ((RANKS, (), found["from"]), (found["left"], gone, STEPS)):
        command = hosts.command(ranks, ["-m", "hpcllm", "train", folder.run_file(name, step, 10), *how], dead)
        environment, pipes = clean_environment(**hosts.environment), {"capture_output": True, "text": True}
        done = subprocess.run(command, env=environment, cwd=jobs.ROOT, timeout=600, **pipes)
        if done.returncode:
            sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return differing(folder.base / result["name"], folder.base / name, STEPS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--times", type=int, default=20, help="runs of each case")
    parser.add_argument("--exact", type=int, default=1, help="runs of each case whose weights are compared")
    parser.add_argument("--two-hosts", action="store_true", help="two network namespaces; needs root")
    parser.add_argument("--spares", type=int, default=0, help="so many more ranks wait for one to die")
    parser.add_argument("--keep", help="a folder for the runs, which stay there")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        base = args.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="hpcllm-ulfm-"))
        Path(base).mkdir(parents=True, exist_ok=True)
        hosts = OneHost()
        if args.two_hosts:
            hosts = TwoHosts(base)
            stack.callback(hosts.down)
        sys.exit(not table(hosts, Folder(base, RANKS, 0, 0), args))


def table(hosts, folder, args):
    """Print a row for each case; returns whether everything holds."""
    draw, holds, reference = random.Random(5), True, uninterrupted(folder)
    spares = f" and {args.spares} spare{'s' * (args.spares > 1)}" if args.spares else ""
    print(f"{RANKS} ranks{spares} on {'two hosts' if args.two_hosts else 'one host'}, {jobs.versions()}\n")
    print("| killed | runs | finished | steps lost, most | wrong steps | s to the next step: median (range) | bytes |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for case in args.cases or (*hosts.cases, *(A_SPARE if args.spares else ())):
        found, differences = [], []
        for number in range(args.times):
            result = once(hosts, folder, case, number, draw, args.spares)
            found.append(judge(folder, result, reference))
            if not found[-1]["finished"]:
                print(f"{case}, run {number}: exit code {result['rc']}\n{result['said'][-4000:]}", file=sys.stderr)
            elif number < args.exact and not (args.two_hosts and args.spares):  # a spare is on a host of its own
                differences.append(compared(hosts, folder, result, found[-1], EVERY[case]))
        seconds = [one["seconds"] for one in found if one["seconds"] is not None]
        lost = max((one["lost"] for one in found if one["lost"] is not None), default="-")
        finished, wrong = sum(one["finished"] for one in found), sum(one["wrong"] for one in found)
        told = [
            len(found),
            finished,
            lost,
            wrong,
            jobs.spread(seconds) if seconds else "-",
            max(differences, default="-"),
        ]
        print(f"| {case} | {' | '.join(map(str, told))} |", flush=True)
        holds = holds and finished == len(found) and not wrong and not any(differences) and lost in (0, 1)
    return holds


if __name__ == "__main__":
    main()
