"""What does hpcllm add to the start of a job? Seconds of `init()` after PyTorch and MPI are up, and of `hpcllm --help`.

    python -m benchmarks.startup [--ranks 2] [--rounds 11]

Every round starts one job, whose ranks import torch and torch.distributed, start MPI, and only then import hpcllm.mpi
and call `init()`, each step timed (the slowest rank counts), and one `hpcllm --help`. Medians over rounds.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np

from . import jobs

STEPS = ("import torch", "start MPI", "import hpcllm.mpi; init()", "first all_reduce")


def steps():
    """What each rank of a job runs; root prints the seconds of each step."""
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


def main():
    if sys.argv[1:] == ["--job"]:
        return steps()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    taken, help_s = [], []
    for _ in range(args.rounds):
        taken.append(json.loads(jobs.run(args.ranks, "-m", "benchmarks.startup", "--job").stdout.splitlines()[-1]))
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "hpcllm", "--help"], check=True, stdout=subprocess.DEVNULL)
        help_s.append(time.perf_counter() - began)
    print(f"{args.ranks} ranks, {jobs.versions()}; median (smallest to largest) of {args.rounds}, ms")
    print("| step | ms |\n|---|---:|")
    for step, values in zip((*STEPS, "hpcllm --help"), (*zip(*taken, strict=True), help_s), strict=True):
        values = 1e3 * np.array(values)
        print(f"| {step} | {np.median(values):.0f} ({values.min():.0f} to {values.max():.0f}) |")


if __name__ == "__main__":
    main()
