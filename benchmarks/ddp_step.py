"""What does communication cost a training step? DistributedDataParallel over this backend, over Gloo, and silent.

    mpirun -np 2 python -m benchmarks.ddp_step [--model 14M 110M] [--rounds 9]

A BERT of each size, one sequence of 128 tokens a rank, forward, backward and fused AdamW in fp32. Every round takes one
step each way, one after the other; "hook" is this backend with `hpcllm.mpi.hooks.average_gradients`, which lets the
ranks of a host sum the buckets where they lie; "no communication" is DDP with a hook that does nothing, so that what
DDP does itself, copying gradients into buckets, is in all of them. Exposed communication is what a step takes longer
than that one, of the same round; a step takes as long as its slowest rank. Medians over rounds.
"""

import argparse
import time

import numpy as np
import torch
from mpi4py import MPI
from torch.nn.parallel import DistributedDataParallel

from hpcllm.mpi.hooks import average_gradients

from . import jobs
from .collectives import start

MODELS = {
    "14M": {"hidden_size": 312, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1200},
    "110M": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
WAYS = ("hpcllm", "hpcllm, hook", "Gloo", "no communication")


def build(size):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**MODELS[size], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def nothing(_, bucket):
    """A communication hook that leaves each rank's gradients as they are."""
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def step_s(replica, adjust, tokens, comm):
    """Seconds of one step, of the slowest rank."""
    comm.Barrier()
    began = time.perf_counter()
    replica(input_ids=tokens, labels=tokens).loss.backward()
    adjust.step()
    adjust.zero_grad()
    return comm.allreduce(time.perf_counter() - began, op=MPI.MAX)


def measure(size, comm, groups, rounds):
    """{way: seconds of a step in each round}."""
    taken = {way: [] for way in WAYS}
    made, hooks = {}, {"hpcllm, hook": average_gradients, "no communication": nothing}
    for way, group in groups.items():
        replica = DistributedDataParallel(build(size), process_group=group, gradient_as_bucket_view=True)
        if way in hooks:
            replica.register_comm_hook(group, hooks[way])
        made[way] = replica, torch.optim.AdamW(replica.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(30_000, (1, 128), generator=torch.Generator().manual_seed(comm.rank))
    for turn in range(-3, rounds):  # the first ones warm up: DDP sorts its buckets anew after the first step
        for way in WAYS:
            seconds = step_s(*made[way], tokens, comm)
            if turn >= 0:
                taken[way].append(seconds)
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    world, gloo = start()
    if world.is_root:
        print(f"{world.size} ranks, {world.library}, {jobs.versions()}; median (smallest to largest) of {args.rounds}")
        print("| model | way | step, ms | exposed communication, ms | share of Gloo's |\n|---|---|---:|---:|---:|")
    for size in args.model:
        groups = {way: gloo if way == "Gloo" else world.group for way in WAYS}
        taken = measure(size, world.comm, groups, args.rounds)
        silent = np.array(taken["no communication"])
        exposed = {way: float(np.median(np.array(taken[way]) - silent)) for way in WAYS}
        for way in WAYS if world.is_root else ():
            values = 1e3 * np.array(taken[way])
            share = f"{exposed[way] / exposed['Gloo']:.2f}" if exposed["Gloo"] > 0 else ""
            spread = jobs.spread(values, "{:.1f}")
            print(f"| {size} | {way} | {spread} | {1e3 * exposed[way]:.1f} | {share} |", flush=True)
            if way not in ("Gloo", "no communication"):
                jobs.record(f"DDP step, BERT {size}, {way}: Gloo", np.divide(taken["Gloo"], taken[way]))


if __name__ == "__main__":
    main()
