"""How long does training wait for a checkpoint? hpcllm beside torch.save and torch.distributed.checkpoint.

    python -m benchmarks.save_speed [--ranks 2] [--rounds 5] [--folder DIR]

A BERT of 110 M parameters with AdamW's moments, 1.32 GB in fp32, the same on all ranks. Ways, taking turns, each
durable (fsync) and in a new folder of DIR, which is removed again:

    hpcllm                 `hpcllm.saving.Saver`, waited for: each rank writes its part, and reads its part for digests
    torch.save             one rank writes all, and fsync
    DCP                    torch.distributed.checkpoint.save: ranks share out what they all have
    hpcllm, ahead          what a step waits: `begin` and, with no forward and backward to hide it, the whole copy
    DCP, async_save        what its call takes, in a process of its own for the writing (async_checkpointer_type)
    a forward and backward of 256 tokens a rank, of another copy of the model; nothing is saved
    ..., beside it         the same two, with that before the optimizer may step: what it takes longer by than it alone

Seconds of the slowest rank: medians (and least to most) of the rounds. "until complete" of those that go on beside
training: from the call to the checkpoint's end, nothing else running.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from . import jobs

ALONE = "a forward and backward"
SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


def child(folder, rounds):
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    import transformers

    import hpcllm.mpi
    from hpcllm import config, optimizer, saving
    from hpcllm.parallel import mesh as meshes
    from hpcllm.parallel.apply import apply

    world = hpcllm.mpi.init("cpu", "gloo")
    torch.manual_seed(0)
    net = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    made = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 8, "learning_rate": 1e-3}
    plan = config.Train(**made)
    theirs = torch.optim.AdamW(net.parameters(), fused=True)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    theirs.step()
    parallel = config.Parallel(sharding="none", backend="gloo")
    placed = apply(net, meshes.build(meshes.layout(parallel, world.comm.allgather(world.host)), world), parallel)
    ours = optimizer.build(placed, plan)
    for parameter in placed.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ours.step()
    other = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    names = [name for name, _ in net.named_parameters()]
    moments = dict(zip(names, theirs.state.values(), strict=True))
    state = {"model": dict(net.named_parameters()), "optimizer": moments}
    saver = saving.Saver(world.comm, placed, ours, folder, folder, 1)
    batch = torch.randint(net.config.vocab_size, (4, 64))

    def hpcllm_waits(path, step):
        saver.begin(step, {}, copy=False)
        saver.finish()
        return saver.newest

    def torch_save(path, step):
        if world.is_root:
            with open(path, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        return path

    def dcp_save(path, step):
        dcp.save(state, checkpoint_id=path)
        return path

    def hpcllm_ahead(path, step):
        saver.begin(step, {})
        saver.hold()
        return saver.finish

    def dcp_ahead(path, step):
        return dcp.async_save(state, checkpoint_id=path).result

    def compute(path, step):
        other(input_ids=batch, labels=batch).loss.backward()

    def hpcllm_beside(path, step):
        saver.begin(step, {})
        compute(path, step)
        saver.hold()
        return saver.finish

    def dcp_beside(path, step):
        rest = dcp_ahead(path, step)
        compute(path, step)
        return rest

    ways = {"hpcllm": hpcllm_waits, "torch.save": torch_save, "DCP": dcp_save}
    ways |= {"hpcllm, ahead": hpcllm_ahead, "DCP, async_save": dcp_ahead, ALONE: compute}
    ways |= {"hpcllm, ahead, beside it": hpcllm_beside, "DCP, async_save, beside it": dcp_beside}
    waited, complete = ({way: [] for way in ways} for _ in range(2))
    for turn in range(rounds + 1):  # the first warms up
        for number, (way, run) in enumerate(ways.items()):
            path = Path(folder) / f"{number}-{turn}"
            os.sync()
            dist.barrier()
            began = time.perf_counter()
            rest = run(path, turn * len(ways) + number + 1)
            took = time.perf_counter() - began
            if callable(rest):
                rest()
            whole = time.perf_counter() - began
            slowest = torch.tensor([took, whole], dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if turn:
                waited[way].append(slowest[0].item())
                complete[way].append(slowest[1].item())
            saver.settle()  # reads back what nobody waits for
            dist.barrier()
            if world.is_root:
                for left in Path(folder).iterdir():
                    shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            dist.barrier()
    if world.is_root:
        count = sum(parameter.numel() for parameter in net.parameters())
        print(f"{count / 1e6:.0f} M parameters, {12 * count / 1e9:.2f} GB, {world.size} ranks, {jobs.versions()}\n")
        print("| way | training waits, s | to hpcllm's | until complete, s |\n|---|---:|---:|---:|")
        alone = statistics.median(waited[ALONE])
        for way in (way for way in ways if way.endswith("beside it")):
            waited[way] = [took - alone for took in waited[way]]
        base = None
        for way in ways:
            if way.startswith(("hpcllm", ALONE)):  # those that follow are compared with it
                base = statistics.median(waited[way])
            ratio = f"{statistics.median(waited[way]) / base:.2f}"
            print(f"| {way} | {jobs.spread(waited[way])} | {ratio} | {jobs.spread(complete[way])} |")


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the file system to measure (default: the temporary folder)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.ranks)))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        done = jobs.run(args.ranks, "-m", "benchmarks.save_speed", "--child", folder, args.rounds)
    print(done.stdout, end="")


if __name__ == "__main__":
    main()
