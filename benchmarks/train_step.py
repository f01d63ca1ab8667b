"""What does a data-parallel step cost on the CPU? hpcllm beside DistributedDataParallel over Gloo, and one rank alone.

    python -m benchmarks.train_step [--rows 1 4] [--rounds 5] [--precision bf16] [--ranks 2]

A GPT-2 of 27 M parameters, `rows` sequences of 256 tokens a rank, AdamW, no dropout but the model's own, one thread a
rank. Every round starts each way anew, one after the other, and takes 12 steps after 3; a way's figure of a round is
its best step, a ratio that of two figures of one round; medians of rounds (smallest to largest). "as documented" is
DDP and AdamW with what they do by themselves, "tuned" with gradient_as_bucket_view, static_graph and fused; "keep" has
the C library keep freed memory, as hpcllm does by itself, "large pages" has it and torch ask for them, as hpcllm and
slurm/site.sh do. DeepSpeed's bf16 is its own, weights and all, over Gloo. One rank alone is hpcllm with no other beside
it; all alone, at once, are as many jobs of one rank as there are ranks, which share nothing but the machine: what is
slower than one by itself is that. benchmarks/requirements.txt lists what peers need.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

from . import jobs

KEEP = jobs.KEEP
LARGE = {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# name: (ranks or None for all, arguments of step_of, environment)
WAYS = {
    "hpcllm": (None, ["hpcllm"], {}),
    "hpcllm, sharding none": (None, ["hpcllm", "--sharding", "none"], {}),
    "DDP + Gloo, tuned, keep": (None, ["ddp", "--tuned"], KEEP),
    "DDP + Gloo, tuned, keep, large pages": (None, ["ddp", "--tuned"], KEEP | LARGE),
    "DDP + Gloo, tuned": (None, ["ddp", "--tuned"], {}),
    "DDP + Gloo, as documented, keep": (None, ["ddp"], KEEP),
    "DDP + Gloo, as documented": (None, ["ddp"], {}),
    "DeepSpeed ZeRO-1, keep": (None, ["deepspeed"], KEEP | {"DS_ACCELERATOR": "cpu"}),
    "DeepSpeed ZeRO-1": (None, ["deepspeed"], {"DS_ACCELERATOR": "cpu"}),
    "one rank alone": (1, ["hpcllm"], {}),
    "all ranks alone, at once": (1, ["hpcllm"], {}),
}


def measure(name, ranks, rows, precision):
    if name == "all ranks alone, at once":
        with ThreadPoolExecutor(ranks) as pool:
            found = pool.map(lambda _: measure("one rank alone", ranks, rows, precision), range(ranks))
            return max(found, key=lambda one: min(one["seconds"]))
    few, arguments, environment = WAYS[name]
    arguments = [*arguments, "--rows", str(rows), "--precision", precision]
    if arguments[0] == "hpcllm":
        text = jobs.run(few or ranks, "-m", "benchmarks.step_of", *arguments).stdout
    else:
        text = jobs.torchrun(ranks, "-m", "benchmarks.step_of", *arguments, env=environment)
    return json.loads(next(line for line in text.splitlines() if line.startswith("{")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    arguments = parser.parse_args()
    if not importlib.util.find_spec("deepspeed"):
        print("DeepSpeed is not installed and left out", file=sys.stderr)
        arguments.ways = [way for way in arguments.ways if "deepspeed" not in WAYS[way][1]]
    print(f"{arguments.ranks} ranks, {arguments.precision}, {jobs.versions()}; {arguments.rounds} rounds", flush=True)
    for rows in arguments.rows:
        found = {name: [] for name in dict.fromkeys(["hpcllm", *arguments.ways])}
        for _ in range(arguments.rounds):
            for name in found:
                found[name].append(measure(name, arguments.ranks, rows, arguments.precision))
        best = {name: [1e3 * min(one["seconds"]) for one in rounds] for name, rounds in found.items()}
        print(f"\n{256 * rows} tokens a rank\n")
        print("| way | best step, ms | median step, ms | to hpcllm's | bytes a parameter | loss at the end |")
        print("|---|---:|---:|---:|---:|---:|")
        for name, rounds in found.items():
            ratios = [theirs / ours for theirs, ours in zip(best[name], best["hpcllm"], strict=True)]
            median = statistics.median(1e3 * statistics.median(one["seconds"]) for one in rounds)
            held = statistics.median(one["bytes"] for one in rounds) / 27.4e6
            ratio = jobs.spread(ratios)
            if name != "hpcllm":
                jobs.record(f"step, GPT-2 27 M, {256 * rows} tokens a rank: {name}", ratios)
            print(f"| {name} | {jobs.spread(best[name], '{:.0f}')} | {median:.0f} | {ratio} "
                  f"| {held:.0f} | {rounds[0]['losses'][-1]:.4f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
