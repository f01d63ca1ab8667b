"""What torch.compile of each block costs and gains: seconds a step of GPT-2 with and without, and of the first one.

    python -m benchmarks.compiled [--steps 10] [--precision bf16]

27 M parameters (6 layers, hidden size 512, 16,384 words), 4 micro-batches of 2 x 256 tokens, AdamW, one process; both
in turns, twice; median (smallest to largest) of the steps. The first step is timed with an empty cache, and again in
a process that finds it filled.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hpcllm.mpi
from hpcllm.config import Parallel
from hpcllm.evaluate import arithmetic
from hpcllm.parallel import mesh as meshes
from hpcllm.parallel.apply import apply
from hpcllm.parallel.runner import Work
from hpcllm.tasks import causal_lm

from . import jobs

SHAPE = {"n_layer": 6, "n_embd": 512, "n_head": 8, "vocab_size": 16384, "n_positions": 256}
ROWS, BATCHES = 2, 4


def build(compiled):
    world = hpcllm.mpi.init("cpu")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0))
    return apply(model, meshes.replicas(world), Parallel(), compile_blocks=compiled)


def train(placed, steps, precision):
    """(loss, seconds) of each step."""
    adjust, told, device = torch.optim.AdamW(placed.parameters(), lr=1e-4, fused=True), [], torch.device("cpu")
    work = Work(
        causal_lm.inputs,
        lambda net, ids: causal_lm.loss_sum(net, causal_lm.inputs({"input_ids": ids}, None, None), ids.roll(-1, 1))[0],
        lambda ids: int(ids.sum()),
        lambda: arithmetic(precision, device),
    )
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batches = torch.randint(0, SHAPE["vocab_size"], (BATCHES, ROWS, SHAPE["n_positions"]), generator=draw)
        began = time.perf_counter()
        adjust.zero_grad()
        losses = placed.step(list(batches), work, batches.numel())
        adjust.step()
        told.append((float(sum(losses)) / batches.numel(), time.perf_counter() - began))
    return told


def first_step(precision):
    """Print the seconds that the first step of this process takes with compiled blocks."""
    print(train(build(True), 1, precision)[0][1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first:
        return first_step(args.precision)
    print(f"{args.precision}, {torch.get_num_threads()} threads, {jobs.versions()}\n")
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.compiled", "--first", "--precision", args.precision]
        for kind in ("empty", "filled"):
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            taken = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()[-1]
            print(f"first step, {kind} cache: {float(taken):.1f} s")
    placed, told = {kind: build(kind) for kind in (False, True)}, {False: [], True: []}
    for _ in range(2):
        for kind in (False, True):
            told[kind].append(train(placed[kind], args.steps + 1, args.precision)[1:])
    print("\n| blocks | a step | loss at the end |\n|---|---:|---:|")
    for kind, runs in told.items():
        times = [seconds for run in runs for _, seconds in run]
        cell = jobs.spread(times, "{:.3f}") + " s"
        print(f"| {'compiled' if kind else 'as they are'} | {cell} | {runs[-1][-1][0]:.4f} |")


if __name__ == "__main__":
    main()
