"""How long does a job take to start? hpcllm beside torchrun and Gloo, what `init()` adds, and which files it asks for.

    python -m benchmarks.startup [--ranks 2] [--rounds 11]

Every round starts, one after the other:

    a job whose ranks import torch and torch.distributed, start MPI, and only then import hpcllm.mpi and call `init()`,
        each step timed (the slowest rank counts);
    `hpcllm --help`;
    to the first all_reduce: a script of hpcllm.mpi under mpirun and the same of Gloo under torchrun, from the start of
        the launcher to the end of the all_reduce on the last rank;
    to the end of the first step: `hpcllm train` of a small BERT, and a loop with the same model from transformers,
        DistributedDataParallel and Gloo under torchrun, on tokens that are made up.

Then, where strace is installed, the system calls that look for or open files in one rank of `hpcllm train`, beside
`from transformers import BertForMaskedLM` alone. Medians over rounds.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from . import jobs

STEPS = ("import torch", "start MPI", "import hpcllm.mpi; init()", "first all_reduce")
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}


# --- what ranks run ----------------------------------------------------------------------------------------------


def steps():
    """Each step of a start, timed; root prints the seconds of each."""
    times = [time.perf_counter()]
    import torch
    import torch.distributed as dist

    times.append(time.perf_counter())
    import mpi4py

    mpi4py.rc.thread_level = "multiple"
    from mpi4py import MPI

    MPI.COMM_WORLD.Barrier()
    times.append(time.perf_counter())
    import hpcllm.mpi

    hpcllm.mpi.init("cpu")
    times.append(time.perf_counter())
    dist.all_reduce(torch.ones(1))
    times.append(time.perf_counter())
    slowest = [MPI.COMM_WORLD.allreduce(float(taken), op=MPI.MAX) for taken in np.diff(times)]
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(slowest))


def reduce_over(backend):
    """The first all_reduce; every rank prints when it has ended."""
    import torch
    import torch.distributed as dist

    if backend == "mpi":
        import hpcllm.mpi

        hpcllm.mpi.init("cpu")
    else:
        dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    print(f"at {time.time()}", flush=True)
    if backend != "mpi":
        jobs.end_gloo()


def train_peer():
    """The first step of a usual loop."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import BertConfig, BertForMaskedLM

    dist.init_process_group("gloo")
    model = DistributedDataParallel(BertForMaskedLM(BertConfig(**SIZES, vocab_size=1000)))
    adjust = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, 1000, (4, 64))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    adjust.step()
    dist.all_reduce(torch.ones(1))
    print(f"at {time.time()}", flush=True)
    jobs.end_gloo()


# --- what is started ---------------------------------------------------------------------------------------------


def prepare(folder):
    """Shards."""
    words = [f"word{n}" for n in range(3000)]
    lines = [" ".join(words[(line * 37 + n * n) % len(words)] for n in range(60)) for line in range(600)]
    (folder / "text.txt").write_text("\n".join(lines))
    make = ["--input", folder / "text.txt", "--output", folder / "data", "--vocab-size", 1000]
    jobs.run(1, "-m", "hpcllm", "prepare", *make)


def under_mpirun(ranks, *arguments):
    """Seconds from the launcher's start to the last rank's word."""
    began = time.time()
    return last_word(jobs.run(ranks, "-m", "benchmarks.startup", *arguments).stdout) - began


def under_torchrun(ranks, *arguments):
    began = time.time()
    return last_word(jobs.torchrun(ranks, "-m", "benchmarks.startup", *arguments)) - began


def last_word(text):
    return max(float(word) for word in re.findall(r"at ([\d.]+)", text))


def train(folder, ranks):
    """(seconds to the end of the first step, its parts as the run tells them)."""
    began = time.time()
    jobs.train(
        ranks,
        folder,
        data={"train": str(folder / "data" / "train")},
        model={"task": "masked_lm", "config": {"model_type": "bert", **SIZES}},
        train={
            "max_steps": 1,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "sequence_length": 64,
            "learning_rate": 1e-4,
            "device": "cpu",
        },
    )
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    (event,) = (event for event in events if event["event"] == "first_step")
    return event["time"] - began, event["seconds"]


def file_calls(command):
    """{"stat": n, "open": n} of a process and its threads."""
    with tempfile.NamedTemporaryFile("r") as log:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HPCLLM_PROGRESS": "lines"}
        trace = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", log.name]
        subprocess.run([*trace, *map(str, command)], check=True, env=env, cwd=jobs.ROOT, stdout=subprocess.DEVNULL)
        names = Counter(re.findall(r"^\d+ +(\w+)\(", log.read(), re.MULTILINE))
    opened = sum(count for name, count in names.items() if name.startswith("open"))
    asked = sum(count for name, count in names.items() if "stat" in name or "access" in name)
    return {"stat": asked, "open": opened}


def measure(folder, ranks):
    """{what: seconds} of one round, and the parts of a training's start."""
    told = jobs.run(ranks, "-m", "benchmarks.startup", "--job", "steps").stdout.splitlines()[-1]
    found = dict(zip(STEPS, json.loads(told), strict=True))
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hpcllm", "--help"], check=True, stdout=subprocess.DEVNULL)
    found["hpcllm --help"] = time.perf_counter() - began
    found["first all_reduce, mpirun, hpcllm.mpi"] = under_mpirun(ranks, "--job", "mpi")
    found["first all_reduce, torchrun, Gloo"] = under_torchrun(ranks, "--job", "gloo")
    found["first step, mpirun, hpcllm train"], parts = train(folder, ranks)
    found["first step, torchrun, DDP and Gloo"] = under_torchrun(ranks, "--job", "peer")
    return found, parts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--job", choices=("steps", "mpi", "gloo", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return {"steps": steps, "peer": train_peer}.get(args.job, lambda: reduce_over(args.job))()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        rounds = [measure(folder, args.ranks) for _ in range(args.rounds)]
        print(f"{args.ranks} ranks, {jobs.versions()}; median (smallest to largest) of {args.rounds}")
        print("\n| | ms |\n|---|---:|")
        times = {what: np.array([found[what] for found, _ in rounds]) for what in rounds[0][0]}
        for what, values in times.items():
            print(f"| {what} | {jobs.spread(1e3 * values, '{:.0f}')} |")
        for what, ours, theirs in (
            ("first all_reduce", "mpirun, hpcllm.mpi", "torchrun, Gloo"),
            ("first step", "mpirun, hpcllm train", "torchrun, DDP and Gloo"),
        ):
            ratios = times[f"{what}, {theirs}"] / times[f"{what}, {ours}"]
            jobs.record(f"{what}: {theirs}", ratios)
            print(f"\n{what}: torchrun takes {jobs.spread(ratios)} times as long as mpirun")
        parts = {part: np.median([told.get(part, 0.0) for _, told in rounds]) for part in rounds[0][1]}
        print("parts of the first step: " + ", ".join(f"{part} {1e3 * taken:.0f} ms" for part, taken in parts.items()))
        if shutil.which("strace"):
            command = [sys.executable, "-m", "hpcllm", "train", folder / "run.toml", "--overwrite"]
            ours = file_calls(command)
            theirs = file_calls([sys.executable, "-c", "from transformers import BertForMaskedLM"])
            print("\n| system calls on names of files, one rank | stat, access | open |\n|---|---:|---:|")
            print(f"| hpcllm train, one step and a checkpoint | {ours['stat']} | {ours['open']} |")
            print(f"| from transformers import BertForMaskedLM | {theirs['stat']} | {theirs['open']} |")


if __name__ == "__main__":
    main()
