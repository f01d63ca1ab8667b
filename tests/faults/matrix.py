"""What goes wrong in the life of a job, done on purpose to real processes: what holds, and in figures.

    python -m tests.faults.matrix [F1 F4 ...] [--kills 200] [--minutes 0] [--ranks 4]

Prints a table and ends with 1 where something does not hold. Jobs train a BERT of 60,000 parameters. F8 and F9 mount
file systems, so they need root. F13, F15 and F21 are tests on a Slurm cluster (`make test-slurm`), which are named;
F22 and F22u take `--minutes` each (0 leaves them out). F2 and F3 are `python -m tests.faults.ulfm`.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import faults as collectives
from benchmarks import jobs
from benchmarks.restart import differing_bytes
from hpcllm import checkpoint
from hpcllm.errors import DataError
from tests.launching import clean_environment

JOB = jobs.ROOT / "tests" / "faults" / "job.py"
RUN = """
[run]
output_dir = "{output}"
seed = 7
[data]
train = "{data}/train"
[model]
task = "masked_lm"
[model.config]
model_type = "bert"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 64
[train]
max_steps = {steps}
global_batch_size = 12
micro_batch_size = 1
sequence_length = 32
learning_rate = 1e-3
lr_scheduler_type = "constant"
log_every_steps = 1
[checkpoint]
every_steps = {every}
keep = 4
"""
LARGE = ("model.safetensors", "optimizer.safetensors")
ON_A_CLUSTER = {
    "F13": ("time limit", "test_a_job_whose_time_is_up_is_saved_queued_again_and_repeats_an_uninterrupted_one"),
    "F15": ("a node dies", "test_a_job_goes_on_from_its_last_checkpoint_on_other_nodes_after_a_node_has_died"),
    "F21": ("srun and MPI do not know each other", "test_a_launcher_that_mpi_does_not_know_is_refused_with_the_cure"),
}
SAID = {True: "yes", False: "NO", None: "-"}
FAULTS = {}


def fault(number, what):
    """Puts a function in the table: it is given a Folder and returns (what holds: bool, figures: str)."""

    def take(function):
        FAULTS[number] = what, function
        return function

    return take


class Folder:
    """A folder for jobs, with shards to train from."""

    def __init__(self, base, ranks, kills, minutes):
        self.base, self.ranks, self.kills, self.minutes = Path(base), ranks, kills, minutes
        draw = random.Random(1)
        words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(300)]
        lines = [" ".join(draw.choices(words, k=30)) for _ in range(1500)]
        (self.base / "text.txt").write_text("\n\n".join(lines))
        how = ["--tokenizer-kind", "wordpiece", "--vocab-size", "400"]
        jobs.run(1, "-m", "hpcllm", "prepare", "--input", self.base / "text.txt", "--output", self.base / "data", *how)

    def run_file(self, name, steps=12, every=4, output=None):
        """A run file; its run's folder is `name` beside it, or `output`."""
        path = self.base / f"{name}.toml"
        path.write_text(
            RUN.format(output=output or self.base / name, data=self.base / "data", steps=steps, every=every)
        )
        return path

    def train(self, run_file, *options, ranks=None, fault=(), check=False):
        """A job, with `fault` (arguments of job.py) in it; returns its CompletedProcess."""
        begin = [JOB, *fault, "--"] if fault else ["-m", "hpcllm"]
        return jobs.run(ranks or self.ranks, *begin, "train", run_file, *options, check=check, timeout_s=600)

    def whole(self):
        """The folder of a run that nothing has happened to: 12 steps, checkpoints of 4, 8 and 12."""
        if not (self.base / "whole").exists():
            self.train(self.run_file("whole"), check=True)
        return self.base / "whole"

    def since(self, note):
        """Seconds since what has been noted in the file `note`."""
        return time.time() - float((self.base / note).read_text())


def differing(ours, theirs, step):
    """Bytes of weights and optimizer state in which two runs' checkpoints of a step differ."""
    where = f"checkpoint-{step}"
    return sum(differing_bytes(ours / where / name, theirs / where / name)[0] for name in LARGE)


def events(run, name):
    records = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == name]


def newest_is_right(run):
    """True where there is a complete checkpoint and each is what was written."""
    found = checkpoint.find(run)
    for path in found:
        checkpoint.verify(path)
    return bool(found)


@fault("F1", "SIGKILL of a rank: the job ends, and goes on")
def killed(folder):
    run_file, run = folder.run_file("killed"), folder.base / "killed"
    note = folder.base / "killed.note"
    done = folder.train(run_file, fault=("kill", "rank=2", "step=7", f"note={note}"))
    over, left = folder.since("killed.note"), jobs.ranks_with(run_file)
    lost = 7 - 1 - max(int(path.name.split("-")[1]) for path in checkpoint.find(run))
    again = folder.train(run_file, "--resume")
    holds = done.returncode not in (0, None) and not left and over < 10 and lost <= 4 and again.returncode == 0
    return holds, f"over after {over:.1f} s, exit code {done.returncode}, {len(left)} processes left, {lost} steps lost"


def outlived(folder, cases):
    """Ranks of jobs under mpirun --with-ft ulfm are killed, five times in each of `cases` of tests.faults.ulfm."""
    from tests.faults import ulfm

    reference, draw = ulfm.uninterrupted(folder), random.Random(4)
    found = [ulfm.judge(folder, ulfm.once(ulfm.OneHost(), folder, case, number, draw), reference)
             for case in cases for number in range(5)]  # fmt: skip
    finished, wrong = sum(one["finished"] for one in found), sum(one["wrong"] for one in found)
    lost = max((one["lost"] for one in found if one["lost"] is not None), default=0)
    seconds = [one["seconds"] for one in found if one["seconds"] is not None]
    return (
        finished == len(found) and not wrong and lost <= 1,
        f"{finished} of {len(found)} finished, at most {lost} steps lost, {wrong} wrong, next step after "
        f"{jobs.spread(seconds)} s",
    )


@fault("F2", "SIGKILL of a rank under ULFM: the others go on")
def outlives_one(folder):
    return outlived(folder, ["a rank"])


@fault("F3", "rank 0, and two ranks at once, under ULFM")
def outlives_root_and_two(folder):
    return outlived(folder, ["rank 0", "two ranks"])


@fault("F4", "the run of F1 against one that nothing happened to")
def killed_and_whole(folder):
    if not (folder.base / "killed" / "checkpoint-12").exists():
        killed(folder)
    count = differing(folder.base / "killed", folder.whole(), 12)
    return count == 0, f"{count} bytes of weights and optimizer state differ"


@fault("F5", "4 ranks, then 2, 3 and 4 again, 4 steps each")
def other_sizes(folder):
    seen = {}
    for name, sizes in (("steady", (4,)), ("changing", (4, 2, 3, 4))):
        samples = []
        for part, ranks in enumerate(sizes):
            note = folder.base / f"{name}-{part}"
            run_file = folder.run_file(name, steps=16 * (part + 1) // len(sizes), every=0)
            folder.train(run_file, "--resume", ranks=ranks, fault=("samples", f"note={note}"), check=True)
            for file in folder.base.glob(f"{name}-{part}-*"):
                samples += [tuple(one) for line in file.read_text().splitlines() for one in json.loads(line)]
        seen[name] = samples
    twice = len(seen["changing"]) - len(set(seen["changing"]))
    missing = set(seen["steady"]) - set(seen["changing"])
    losses = [[record["loss"] for record in jobs.metrics(folder.base / name)] for name in ("steady", "changing")]
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    holds = not twice and not missing and len(seen["steady"]) == 16 * 12 and worst < 1e-5
    return (
        holds,
        f"{len(seen['changing'])} samples, {twice} twice, {len(missing)} left out, losses differ by {worst:.1e}",
    )


@fault("F6", "SIGKILL while checkpoints are written, at random times")
def killed_in_saves(folder):
    run_file, run = folder.run_file("saves", steps=100_000, every=1), folder.base / "saves"
    draw, lost, steps, began = random.Random(3), 0, [], time.monotonic()
    for _ in range(folder.kills):
        job = jobs.start(2, "-m", "hpcllm", "train", run_file, "--resume", "run.max_fruitless_starts=0")
        while job.poll() is None:  # from its first checkpoint on
            line = job.stdout.readline()
            if line.startswith("step "):
                break
        time.sleep(draw.uniform(0.0, 0.3))
        victims = jobs.ranks_with(run_file)
        for victim in draw.sample(victims, len(victims)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        job.communicate(timeout=60)
        try:
            checkpoint.rescue(run)  # as the next start does
            found = checkpoint.find(run)
            if steps or found:  # the first kills may come before there is one
                checkpoint.verify(found[-1])
                steps.append(int(found[-1].name.split("-")[1]))
        except (DataError, IndexError) as error:
            lost += 1
            print(f"F6: after step {steps[-1:]}: {error}", file=sys.stderr)
    back = sum(b < a for a, b in itertools.pairwise(steps))
    holds = lost == 0 and back == 0
    seconds = (time.monotonic() - began) / max(folder.kills, 1)
    return (
        holds,
        f"{len(steps)} of {folder.kills} whole, {folder.kills - lost - len(steps)} before the first, {lost} lost, "
        f"{back} went back; {seconds:.1f} s each",
    )


@fault("F7", "checkpoints cut, and a bit flipped, at every 1/64 of every file")
def damaged(folder):
    copy = folder.base / "damaged"
    shutil.copytree(folder.whole(), copy)
    tried, missed, unnamed = 0, 0, 0
    newest = checkpoint.find(copy)[-1]
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        places = sorted({len(content) * part // 64 for part in range(64)} - {len(content)})
        for place in places:
            flipped = bytearray(content)
            flipped[place] ^= 1 << (place % 8)
            for changed in (bytes(flipped), content[:place]):
                file.write_bytes(changed)
                tried += 1
                try:
                    checkpoint.verify(newest)
                    missed += 1
                except DataError as error:
                    # A marker that can still be read says something else of another file.
                    unnamed += file.name not in str(error) and file.name != checkpoint.COMPLETE
        file.write_bytes(content)
    checkpoint.verify(newest)
    return not missed and not unnamed, f"{tried - missed} of {tried} found, {unnamed} without the file's name"


@contextlib.contextmanager
def mounted(folder, *arguments):
    """A mount in `folder`, for as long as this lasts; False without the right to make one."""
    folder.mkdir()
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@fault("F8", "the disk is full at a checkpoint")
def full(folder):
    size = sum(file.stat().st_size for file in (folder.whole() / "checkpoint-12").iterdir())
    disk = folder.base / "small"
    with mounted(disk, "-t", "tmpfs", "-o", f"size={int(2.5 * size) >> 12 << 12}", "tmpfs") as there:
        if not there:
            return None, "needs root"
        run_file = folder.run_file("full", every=2, output=disk / "run")
        began = time.monotonic()
        done = folder.train(run_file, "checkpoint.keep=9")
        seconds, right = time.monotonic() - began, newest_is_right(disk / "run")
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(disk)], check=True)
        again = folder.train(run_file, "checkpoint.keep=9", "--resume")
        count = differing(disk / "run", folder.whole(), 12)
    holds = done.returncode == 74 and right and again.returncode == 0 and count == 0
    return (
        holds,
        f"exit code {done.returncode} after {seconds:.1f} s, with room again {count} bytes differ at the end",
    )


@fault("F9", "the folder of the run cannot be written, or vanishes")
def no_folder(folder):
    with mounted(folder.base / "read-only", "-t", "tmpfs", "-o", "ro", "tmpfs") as there:
        if not there:
            return None, "needs root"
        began = time.monotonic()
        done = folder.train(folder.run_file("refused", output=folder.base / "read-only" / "run"))
        seconds = time.monotonic() - began
    run_file, run = folder.run_file("vanished"), folder.base / "vanished"
    given = ("vanish", "rank=1", "step=6", f"folder={run}", f"note={folder.base}/vanished.note")
    gone = folder.train(run_file, fault=given)
    over = folder.since("vanished.note")
    holds = done.returncode == 73 and "step 1" not in done.stdout and gone.returncode == 74 and over < 30
    return holds, f"exit code {done.returncode} after {seconds:.1f} s; vanished: {gone.returncode} after {over:.1f} s"


def blamed(kind, code, timeout_s=10):
    """A fault within collectives, of benchmarks.faults."""
    os.environ["HPCLLM_TIMEOUT_S"] = str(timeout_s)
    seconds, status, who, orphans, left = collectives.measure(kind)
    del os.environ["HPCLLM_TIMEOUT_S"]
    holds = status == code and who != "nobody" and not orphans and not left and float(seconds) < 1.1 * timeout_s
    over = f"over after {seconds} s (timeout {timeout_s} s), exit code {status}"
    return holds, f"{over}, rank named by {who}, {orphans} processes left"


@fault("F10", "a rank hangs: SIGSTOP")
def hangs(folder):
    return blamed("stop", 124)


@fault("F11", "a rank hangs and holds the GIL")
def hangs_in_c(folder):
    return blamed("holds_gil", 124)


@fault("F12", "an exception on one rank")
def raises(folder):
    return blamed("exception", 1)


@fault("F14", "SIGTERM twice, to each rank at another step")
def terminated(folder):
    run_file, run = folder.run_file("terminated", steps=100_000, every=0), folder.base / "terminated"
    job = jobs.start(folder.ranks, "-m", "hpcllm", "train", run_file)
    while not (line := job.stdout.readline()).startswith("step 5/"):
        if not line:
            return False, "the job did not come to step 5"
    began = time.time()
    for _ in range(2):
        for rank in jobs.ranks_with(run_file):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGTERM)
            time.sleep(0.02)
    job.communicate(timeout=120)
    stops, saved = events(run, "stop"), events(run, "checkpoint")
    holds = job.returncode == 75 and len(stops) == len(saved) == 1 and stops[0]["step"] == saved[0]["step"]
    seconds = saved[0]["time"] - began if saved else float("nan")
    return holds, f"exit code {job.returncode}, {len(stops)} stop, {len(saved)} checkpoint, saved after {seconds:.2f} s"


@fault("F16", "a rank that is twice as slow as others")
def crawls(folder):
    run_file, run = folder.run_file("slow", steps=52, every=0), folder.base / "slow"
    seconds = ",".join(["0.4"] * (folder.ranks - 1) + ["0.8"])
    done = folder.train(run_file, fault=("paced", f"seconds={seconds}"))
    told = events(run, "slow")
    ratios = [(event["rank"], event["ratio"]) for event in told]
    named = f"rank {folder.ranks - 1} on {told[0]['host']}" in done.stdout if told else False
    # What a step computes beside its pauses is not nothing on a small machine.
    slowest, imbalance = (statistics.median(record[name] for record in jobs.metrics(run)[:50])
                          for name in ("compute_s", "imbalance"))  # fmt: skip
    expected = slowest * (folder.ranks - 1) / (folder.ranks * slowest / imbalance - slowest)
    right = len(ratios) == 1 and ratios[0][0] == folder.ranks - 1 and abs(ratios[0][1] / expected - 1) < 0.1
    said = ", ".join(f"rank {rank}, {ratio:.2f} times as long" for rank, ratio in ratios) or "none"
    return bool(named and right), f"named: {said} (by the steps' own times {expected:.2f})"


@fault("F18", "a bit of one replica's weights is flipped")
def flipped(folder):
    run_file, run, note = folder.run_file("flipped", every=2), folder.base / "flipped", folder.base / "flipped.note"
    how = ["train.check_replicas_every_steps=4", "parallel.sharding=none", "checkpoint.every_steps=4"]
    done = folder.train(run_file, *how, fault=("flip", "rank=1", "step=6", f"note={note}"))
    told = events(run, "corrupted")
    named = [(rank, name) for event in told for rank, _, name in event["ranks"]]
    found = told[0]["step"] if told else None
    newest = checkpoint.find(run)[-1].name
    again = folder.train(run_file, *how, "--resume")
    whole = folder.base / "flipped-not"
    folder.train(folder.run_file("flipped-not", every=4), "parallel.sharding=none", check=True)
    count = differing(run, whole, 12)
    right = named == [(1, note.read_text())] and found == 8 and newest == "checkpoint-4"
    holds = done.returncode == 75 and right and again.returncode == 0 and count == 0
    return (
        holds,
        f"exit code {done.returncode}, found in step {found} (flipped in 6, compared every 4), named: {named}, newest "
        f"checkpoint then {newest}, continued: {count} bytes differ",
    )


@fault("F17", "a gradient of one rank is no number")
def not_a_number(folder):
    run_file, run = folder.run_file("nan", every=1), folder.base / "nan"
    done = folder.train(run_file, "checkpoint.keep=20", fault=("nan", "rank=1", "step=6"))
    told = [(event["step"], event["left_out"]) for event in events(run, "nonfinite")]
    unchanged = (run / "checkpoint-5" / LARGE[0]).read_bytes() == (run / "checkpoint-6" / LARGE[0]).read_bytes()
    holds = done.returncode == 0 and told == [(6, True)] and unchanged
    return (
        holds,
        f"exit code {done.returncode}, left out: {[step for step, _ in told]}",
    )


@fault("F19", "a job that is started again and again and gets nowhere")
def in_circles(folder):
    run_file, starts = folder.run_file("circles"), 0
    while starts < 20:
        done = folder.train(run_file, "--resume", fault=("nan", "rank=0", "step=0"))
        if "in a row without a new checkpoint" in done.stderr:
            break
        starts += 1
    return (
        starts == 5 and done.returncode == 93,
        f"refused after {starts} starts (5 allowed), exit code {done.returncode}",
    )


@fault("F20", "the file system answers a rank with an error at the second checkpoint")
def broken_disk(folder):
    run_file, run, note = folder.run_file("broken"), folder.base / "broken", f"note={folder.base}/broken.note"
    done = folder.train(run_file, fault=("no_disk", "rank=1", "times=1000", note))
    over, right = folder.since("broken.note"), newest_is_right(run)
    again = folder.train(run_file, "--resume")
    count = differing(run, folder.whole(), 12)
    passing, note = folder.base / "passing", f"note={folder.base}/passing.note"
    passed = folder.train(folder.run_file("passing"), fault=("no_disk", "rank=1", "times=3", note))
    unharmed = passed.returncode == 0 and differing(passing, folder.whole(), 12) == 0
    holds = done.returncode == 74 and right and again.returncode == 0 and count == 0 and over < 30 and unharmed
    return (
        holds,
        f"exit code {done.returncode} after {over:.1f} s, older checkpoint whole, continued: {count} bytes differ; "
        f"three errors that pass: exit code {passed.returncode}",
    )


def soaked(folder, name, start, survives=False):
    """A random rank of a job is killed every minute, and the job started again where that has ended it.

    start: called with a run file and options, returns a Popen; survives: ranks that are left go on.
    """
    if not folder.minutes:
        return None, "not run: give --minutes"
    run_file, run = folder.run_file(name, steps=10_000_000, every=0), folder.base / name
    deadline, kills, job, draw = time.monotonic() + 60 * folder.minutes, 0, None, random.Random(5)
    while (left := deadline - time.monotonic()) > 0:
        if job is None or job.poll() is not None:
            how = "checkpoint.every_steps=auto", "checkpoint.mtbf=00:01:00", "parallel.sharding=none"
            job = start(run_file, "--resume", *how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.communicate(timeout=min(60.0, left))
            continue
        victims = jobs.ranks_with(run_file)
        if left <= 60.0:
            for victim in victims:
                os.kill(victim, signal.SIGTERM)
        else:
            os.kill(draw.choice(victims), signal.SIGKILL)
            kills += 1
        if left <= 60.0 or not survives or len(victims) == 1:
            job.communicate(timeout=120)
    told = jobs.run(1, "-m", "hpcllm", "status", run, "--json").stdout
    status = json.loads(told[told.index("{") :])
    died = status["happened"].get("died", 0)
    holds = status["state"].startswith("stopped") and newest_is_right(run)
    return (
        holds,
        f"{kills} kills in {folder.minutes:g} min, {died} of them outlived, {status['restarts']} restarts, "
        f"step {status['step']}, goodput {status['goodput']:.3f}",
    )


@fault("F22", "a random rank is killed every minute, and the job started again")
def soak(folder):
    return soaked(folder, "soak", lambda *words: jobs.start(folder.ranks, "-m", "hpcllm", "train", *words))


@fault("F22u", "the same under ULFM: started again when no rank is left")
def soak_survived(folder):
    from tests.faults import ulfm

    def start(*words):
        command = ulfm.OneHost().command(folder.ranks, ["-m", "hpcllm", "train", *words])
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = clean_environment(HPCLLM_PROGRESS="lines", OMP_NUM_THREADS="1")
        return subprocess.Popen(command, env=environment, cwd=jobs.ROOT, **pipes)

    return soaked(folder, "soak-survived", start, survives=True)


def number(name):
    return int(re.search(r"\d+", name)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="all by default")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=200, help="of F6")
    parser.add_argument("--minutes", type=float, default=0, help="of F22")
    args = parser.parse_args()
    print(f"{args.ranks} ranks, {jobs.versions()}\n\n| | fault | holds | figures |\n|---|---|---|---|", flush=True)
    broken = 0
    with tempfile.TemporaryDirectory() as base:
        folder = Folder(base, args.ranks, args.kills, args.minutes)
        for name in sorted(FAULTS.keys() | ON_A_CLUSTER, key=number):
            if args.faults and name not in args.faults:
                continue
            if name in ON_A_CLUSTER:
                what, test = ON_A_CLUSTER[name]
                holds, figures = None, f"on a Slurm cluster: `{test}`"
            else:
                what, function = FAULTS[name]
                holds, figures = function(folder)
            broken += holds is False
            print(f"| {name} | {what} | {SAID[holds]} | {figures} |", flush=True)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
