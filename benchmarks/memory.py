"""How much memory does each rank need under each layout? Measured, beside what the planner says.

    python -m benchmarks.memory [--ranks 4] [--layout full ...] [--large]

A GPT-2 of 65 M parameters, AdamW, fp32, is made, trained for two steps and measured under each layout, each in a job of
its own: bytes of a rank beyond those that the started program takes, at the worst moment, as the kernel accounts them
(PSS of /proc/PID/smaps_rollup, memory that ranks share counted in equal parts, looked at a fifth of the time). --large:
a Llama of 1.2 B parameters under full sharding instead, SGD with momentum, also saved: does it fit in 24 GiB in all?
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time

from . import jobs

TOKENS, WIDTH = 128, 2
SMALL = {"model_type": "gpt2", "n_embd": 512, "n_layer": 18, "n_head": 8, "vocab_size": 16384}
SMALL |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LARGE = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}
LARGE |= {"num_key_value_heads": 16, "intermediate_size": 5504, "vocab_size": 16000, "tie_word_embeddings": True}
LAYOUTS = {
    "none": {"sharding": "none"},
    "host": {"sharding": "host"},
    "optimizer": {"sharding": "optimizer"},
    "gradients": {"sharding": "gradients"},
    "full": {"sharding": "full"},
    "full, recomputed": {"sharding": "full"},
    "none, recomputed": {"sharding": "none"},
    "tensor": {"tensor": 0},
    "sequence": {"tensor": 0, "sequence": True},
    "pipeline": {"pipeline": 0},
    "zero_bubble": {"pipeline": 0, "pipeline_schedule": "zero_bubble"},
}


class Watch:
    """The largest memory of this process while it is open, in bytes."""

    def __enter__(self):
        self.most, self._open = jobs.held(), True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._open = False
        self._thread.join()

    def _look(self):
        while self._open:
            began = time.perf_counter()
            self.most = max(self.most, jobs.held())
            time.sleep(max(0.005, 4 * (time.perf_counter() - began)))  # looking takes time from those who work


def one(name, large):
    """What every rank does in one layout; root prints a line of JSON."""
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig, AutoModelForCausalLM

    import hpcllm.mpi
    from hpcllm import optimizer, saving, weights
    from hpcllm.config import Parallel, Train
    from hpcllm.model import outline
    from hpcllm.parallel import mesh
    from hpcllm.parallel.apply import apply
    from hpcllm.parallel.runner import Work
    from hpcllm.plan import cost, count
    from hpcllm.tasks import causal_lm

    logging.getLogger("transformers").setLevel(logging.ERROR)
    world = hpcllm.mpi.init("cpu")
    given = {key: value or world.size for key, value in LAYOUTS[name].items()}
    again = name.endswith("recomputed")  # train.activation_checkpointing
    section = Parallel(**given)
    layout = mesh.layout(section, [world.host] * world.size)
    tokens, width = (16, 1) if large else (TOKENS, WIDTH)
    train = Train(
        max_steps=2,
        global_batch_size=width * world.size * (1 if large else 4),
        micro_batch_size=width,
        sequence_length=tokens,
        learning_rate=1e-4,
        optimizer="sgd" if large else "adamw",
        sgd_momentum=0.9,
    )
    made = AutoConfig.for_model(**(LARGE if large else SMALL))

    def inputs(number):
        draw = torch.Generator().manual_seed(number)
        return {"input_ids": torch.randint(made.vocab_size, (width, tokens), generator=draw), "use_cache": False}

    def loss(net, number):
        given = inputs(number)
        return causal_lm.loss_sum(net, given, given["input_ids"])[0]

    work = Work(inputs, loss, lambda number: None, contextlib.nullcontext)
    devices = mesh.build(layout, world)
    dist.barrier()
    began, seconds = jobs.held(), time.perf_counter()
    with Watch() as watch:
        net = outline(made, "causal_lm")
        placed = apply(net, devices, section, again, source=weights.Fresh(net, 1))
        del net
        parameters = sum(piece.shape.numel() for piece in placed.pieces.values())
        adjust = optimizer.build(placed, train)
        for step in range(train.max_steps):
            adjust.zero_grad()
            mine = range(
                step * 1000 + placed.mesh.data.rank, step * 1000 + train.global_batch_size // width, layout.data
            )
            placed.step(mine, work, train.global_batch_size * tokens)
            placed.clip_gradients(1.0)
            adjust.step()
        trained = watch.most
        if large:
            folder = world.comm.bcast(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")) if world.is_root else None)
            path = saving.save(world.comm, folder, 2, placed, adjust, folder, {}, 1)
    everybody = world.comm.gather((trained - began, watch.most - began, watch.most))
    if world.is_root:
        shapes = count.count(lambda: AutoModelForCausalLM.from_config(made, dtype=torch.float32), tokens, gpu=False)
        planned = cost.Work(layout, world.size, width, train.accumulation(layout.data), section.sharding,
                            schedule=section.pipeline_schedule, state=4 if large else 8, pooled=True,
                            sequence=section.sequence, checkpointing=again)  # fmt: skip
        said = [cost.memory(shapes, planned, rank).total for rank in range(layout.pipeline)]
        told = {"parameters": parameters, "planned": said * (world.size // len(said)), "ranks": everybody}
        if large:
            told["saved"] = sum(file.stat().st_size for file in path.iterdir())
            shutil.rmtree(folder)
        print(json.dumps({**told, "seconds": time.perf_counter() - seconds}))
    dist.destroy_process_group()


def table(args):
    large = ["--large"] if args.large else []
    names = ["full"] if args.large else args.layout
    print(
        f"{args.ranks} ranks, {'SGD with momentum' if args.large else 'AdamW'}, fp32, {jobs.versions()}\n", flush=True
    )
    print("| layout | MB a rank: planned | measured | planned / measured |\n|---|---|---|---:|", flush=True)
    for name in names:
        done = jobs.run(args.ranks, "-m", "benchmarks.memory", "--one", name, *large)
        told = json.loads(done.stdout.strip().splitlines()[-1])
        trained = [trained for trained, _, _ in told["ranks"]]
        ratios = [said / seen for said, seen in zip(told["planned"], trained, strict=True)]
        off = max(ratios, key=lambda ratio: abs(ratio - 1))
        cells = [", ".join(f"{value / 1e6:.0f}" for value in values) for values in (told["planned"], trained)]
        print(f"| {name} | {cells[0]} | {cells[1]} | {off:.2f} |", flush=True)
        if args.large:
            whole = sum(everything for _, _, everything in told["ranks"])
            ranks = ", ".join(f"{everything / 2**30:.2f}" for _, _, everything in told["ranks"])
            print(
                f"\n{told['parameters'] / 1e9:.2f} B parameters, made, trained 2 steps and saved "
                f"({told['saved'] / 1e9:.1f} GB) in {told['seconds']:.0f} s; the most that each rank had, program and "
                f"saving included: {ranks} GiB, {whole / 2**30:.1f} GiB in all"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--large", action="store_true", help="1.2 B parameters under full sharding")
    parser.add_argument("--one", choices=LAYOUTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    # The C library's default, and every large block given back at once: what is counted is what is in use.
    os.environ |= {"HPCLLM_MALLOC": "default", "MALLOC_MMAP_THRESHOLD_": "65536"}
    sys.exit(one(args.one, args.large) if args.one else table(args))


if __name__ == "__main__":
    main()
