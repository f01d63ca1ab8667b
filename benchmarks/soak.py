"""Does every start end cleanly? Many jobs of a few random collectives, one after the other, and what they leave behind.

    python -m benchmarks.soak [--runs 200] [--ranks 4]

Each job starts, checks 20 collectives of random kind, size and dtype against the answer, and stops. Then counted:
clean ends, processes of the jobs that still live, files left in /dev/shm and the temporary folder. At the end one job
reduces the same numbers 100 times and counts distinct results.
"""

import argparse
import hashlib
import os
import random
import sys
import tempfile
import time

from . import jobs

FOLDERS = ("/dev/shm", tempfile.gettempdir())
MARK = "HPCLLM_SOAK"  # a variable by which processes of these jobs are known


def collectives(seed):
    """What each rank of a job runs: 20 random collectives, each checked."""
    import torch
    import torch.distributed as dist

    import hpcllm.mpi

    world = hpcllm.mpi.init("cpu")
    draw = random.Random(seed)
    ranks = range(world.size)
    for _ in range(20):
        kind = draw.choice(("all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "barrier"))
        dtype = draw.choice((torch.float32, torch.bfloat16, torch.int64))
        length = draw.choice((1, 100, 10_000, 300_000))
        blocks = [torch.full((world.size, length), rank + 1, dtype=dtype) for rank in ranks]
        mine = blocks[world.rank].clone()
        total = sum(rank + 1 for rank in ranks)
        if kind == "all_reduce":
            dist.all_reduce(mine)
            right = mine.eq(total).all()
        elif kind == "broadcast":
            root = draw.randrange(world.size)
            dist.broadcast(mine, root)
            right = mine.eq(root + 1).all()
        elif kind == "all_gather":
            out = torch.empty((world.size, length), dtype=dtype)
            dist.all_gather_into_tensor(out, mine[0])
            right = torch.equal(out, torch.stack([block[0] for block in blocks]))
        elif kind == "reduce_scatter":
            out = torch.empty(length, dtype=dtype)
            dist.reduce_scatter_tensor(out, mine.view(-1))
            right = out.eq(total).all()
        elif kind == "all_to_all":
            out = torch.empty_like(mine)
            dist.all_to_all_single(out, mine)
            right = torch.equal(out, torch.stack([block[0] for block in blocks]))
        else:
            dist.barrier()
            right = True
        if not right:
            raise AssertionError(f"{kind} of {length} {dtype} is wrong")
    dist.destroy_process_group()


def repeated():
    """100 reductions of the same numbers at each of some sizes; root prints the number of distinct results."""
    import torch
    import torch.distributed as dist

    import hpcllm.mpi

    world = hpcllm.mpi.init("cpu")
    distinct = []
    for length in (1, 1000, 1_000_003):
        start = torch.randn(length, generator=torch.Generator().manual_seed(world.rank))
        results = set()
        for _ in range(100):
            tensor = start.clone()
            dist.all_reduce(tensor)
            results.add(hashlib.sha256(tensor.numpy()).hexdigest())
        distinct.append(len(set().union(*world.comm.allgather(results))))
    if world.is_root:
        print(f"100 reductions of 1, 1000 and 1000003 numbers: {distinct} distinct results over all ranks")


def alive():
    """Processes, other than this one, that carry the mark."""
    found = []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if int(name) != os.getpid() and f"{MARK}={os.getpid()}".encode() in file.read().split(b"\0"):
                    found.append(int(name))
        except (OSError, ValueError):
            continue
    return found


def main():
    if sys.argv[1:2] == ["--job"]:
        return collectives(int(sys.argv[2]))
    if sys.argv[1:2] == ["--repeated"]:
        return repeated()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    os.environ[MARK] = str(os.getpid())
    before = {folder: set(os.listdir(folder)) for folder in FOLDERS}
    clean, orphans, began = 0, 0, time.monotonic()
    for run in range(args.runs):
        done = jobs.run(args.ranks, "-m", "benchmarks.soak", "--job", run, check=False, timeout_s=300)
        clean += done.returncode == 0
        if done.returncode:
            print(f"run {run}: exit code {done.returncode}\n{done.stderr[-2000:]}", flush=True)
        orphans += len(alive())
    left = {folder: sorted(set(os.listdir(folder)) - before[folder]) for folder in FOLDERS}
    seconds = time.monotonic() - began
    print(f"{args.ranks} ranks, {jobs.versions()}; {seconds / args.runs:.1f} s a run")
    print(f"{clean} of {args.runs} clean ends, {orphans} processes left, files left: {left}")
    print(jobs.run(args.ranks, "-m", "benchmarks.soak", "--repeated").stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
