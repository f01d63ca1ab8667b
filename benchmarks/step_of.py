"""One way to train, for `benchmarks.train_step`, which starts it. Prints a line of JSON on rank 0. Not a command."""

import argparse
import contextlib
import json
import os
import time
from types import SimpleNamespace

import torch

from . import jobs

WARM_UP, TIMED = 3, 12


def build():
    """The model of this benchmark, the same for all ways: a GPT-2 of 27 M parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=512, n_head=8, vocab_size=16384, n_positions=256)).train()


def batch(number, rank, size, rows):
    """Rows of tokens of one rank in one step: int64 [rows, 256], and the next tokens."""
    draw = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 16384, (size * rows, 257), generator=draw)[rank * rows : (rank + 1) * rows]
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def hpcllm(arguments):
    from hpcllm import mpi, optimizer, train
    from hpcllm.config import Parallel, Train
    from hpcllm.data.batches import MicroBatch
    from hpcllm.parallel import host
    from hpcllm.parallel import mesh as meshes
    from hpcllm.parallel.apply import apply
    from hpcllm.quicken import quicken
    from hpcllm.tasks import TASKS

    world = mpi.init("cpu")
    before = jobs.held()
    settings = {"max_steps": WARM_UP + arguments.timed, "sequence_length": 256, "precision": arguments.precision}
    settings |= {"global_batch_size": arguments.rows * world.size, "micro_batch_size": arguments.rows}
    plan = Train(**settings, learning_rate=1e-4, weight_decay=0.01, max_grad_norm=0.0)
    source = SimpleNamespace(task=TASKS["causal_lm"], loss_options={})
    parallel = host.resolve(Parallel(sharding=arguments.sharding), world)
    mesh = meshes.build(meshes.layout(parallel, world.comm.allgather(world.host)), world)
    net = build()
    quicken(net, world.device)
    placed = apply(net, mesh, parallel, low_precision=plan.precision == "bf16")
    adjust = optimizer.build(placed, plan)

    def step(number, micro_batches=None):
        if micro_batches is None:
            ids, labels = batch(number, world.rank, world.size, arguments.rows)
            micro_batches = [MicroBatch(ids, labels, 1, len(ids))]
        loss, targets, *_ = train.one_step(placed, adjust, micro_batches, plan.learning_rate, source, plan)
        return loss.item() * world.size / targets

    return world.rank, world.size, world.comm.Barrier, step, before


def ddp(arguments):
    import torch.distributed as dist
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    before = jobs.held()
    rank, size = dist.get_rank(), dist.get_world_size()
    tuned = {"gradient_as_bucket_view": True, "static_graph": True} if arguments.tuned else {}
    model = DistributedDataParallel(build(), **tuned)
    adjust = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, **({"fused": True} if tuned else {}))
    low = arguments.precision == "bf16"

    def step(number):
        ids, labels = batch(number, rank, size, arguments.rows)
        with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
            logits = model(input_ids=ids, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        adjust.step()
        adjust.zero_grad()
        return loss.item()

    return rank, size, dist.barrier, step, before


def deepspeed(arguments):
    import deepspeed
    import torch.distributed as dist
    from torch.nn.functional import cross_entropy

    deepspeed.init_distributed("gloo", verbose=False)
    before = jobs.held()
    rank, size = dist.get_rank(), dist.get_world_size()
    # torch's own AdamW: DeepSpeed's for CPUs would be compiled at first use.
    adjust = {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01, "torch_adam": True}}
    settings = {
        "train_micro_batch_size_per_gpu": arguments.rows,
        "optimizer": adjust,
        "zero_allow_untested_optimizer": True,
    }
    settings |= {"zero_optimization": {"stage": 1}, "bf16": {"enabled": arguments.precision == "bf16"}}
    engine, *_ = deepspeed.initialize(model=build(), config=settings)

    def step(number):
        ids, labels = batch(number, rank, size, arguments.rows)
        logits = engine(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        engine.backward(loss)
        engine.step()
        return loss.item()

    return rank, size, dist.barrier, step, before


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("hpcllm", "ddp", "deepspeed"))
    parser.add_argument("--sharding", default="auto")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--timed", type=int, default=TIMED, help="steps that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, size, meet, step, before = {"hpcllm": hpcllm, "ddp": ddp, "deepspeed": deepspeed}[arguments.way](arguments)
    seconds, losses = [], []
    for number in range(WARM_UP + arguments.timed):
        meet()
        began = time.perf_counter()
        losses.append(step(number))
        meet()  # a step takes as long as its slowest rank
        seconds.append(time.perf_counter() - began)
    held = torch.tensor([float(jobs.held() - before)])
    if size > 1:
        torch.distributed.all_reduce(held)
    if rank == 0:
        print(json.dumps({"seconds": seconds[WARM_UP:], "losses": losses, "bytes": held.item()}), flush=True)
    if arguments.way != "hpcllm":
        jobs.end_gloo()


if __name__ == "__main__":
    main()
