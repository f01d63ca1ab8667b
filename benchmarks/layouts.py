"""Does the loss depend on the layout, what does each cost? Every layout against one process, beside the same over Gloo.

    mpirun -np 4 python -m benchmarks.layouts [--family bert gpt2 llama t5] [--steps 10] [--time] [--layouts REGEX]

Tiny models, SGD, fp32, no dropout. For every product of data, pipeline (with every schedule), context (1, 2) and
tensor axes (with sequences whole and in slices) and every sharding that the ranks allow:
the largest relative difference of the loss and gradient norm of any step, and of the weights after the last step
(2-norm of the difference), to training in one process. --time: seconds a step of a larger BERT under each layout, over
this backend and over Gloo, in the same run, one after the other; median (smallest to largest) of the steps.
"""

import argparse
import contextlib
import functools
import itertools
import logging
import re
import statistics
import time
import warnings

import torch
import torch.distributed as dist
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import hpcllm.mpi
from hpcllm.config import Parallel
from hpcllm.errors import UsageError
from hpcllm.parallel import context, vocabulary
from hpcllm.parallel import mesh as meshes
from hpcllm.parallel.apply import apply, check
from hpcllm.parallel.runner import Work

from . import jobs

WORDS, LENGTH, ROWS, BATCHES = 1003, 32, 2, 8
ALONE = meshes.replicas()
SCHEDULES = (("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1))
SHARDINGS = ("none", "optimizer", "gradients", "full", "hybrid")
FAMILIES = {
    "bert": (
        AutoModelForMaskedLM,
        {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 130}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "gpt2": (
        AutoModelForCausalLM,
        {"n_embd": 64, "n_layer": 8, "n_head": 8, "n_positions": 64, "resid_pdrop": 0.0}
        | {"embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama": (
        AutoModelForCausalLM,
        {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
        | {"intermediate_size": 130},
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"d_model": 64, "d_kv": 8, "d_ff": 130, "num_layers": 4, "num_heads": 8, "dropout_rate": 0.0}
        # As T5 1.1. With relu, rounding may put a number on the other side of the kink, which is no fault of a layout.
        | {"feed_forward_proj": "gated-gelu"}
        | {"decoder_start_token_id": 0},
    ),
}
LARGER = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048}


def build(family, **changes):
    kind, given = FAMILIES[family]
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{"vocab_size": WORDS, **given, **changes})
    return kind.from_config(config, dtype=torch.float32).train()


def inputs(family, number):
    """(the model's keyword arguments, labels) of batch `number`."""
    draw = torch.Generator().manual_seed(number)
    input_ids, labels = (torch.randint(0, WORDS, (ROWS, LENGTH), generator=draw) for _ in range(2))
    more = {"decoder_input_ids": labels.roll(1, -1)} if family == "t5" else {}
    more |= {} if family == "bert" else {"use_cache": False}
    return {"input_ids": input_ids, **more}, labels


def loss(net, number, mesh=ALONE):
    """Summed over this rank's tokens of batch `number`. net: a model, or what calls its `module`."""
    model = getattr(net, "module", net)
    given, labels = inputs(model.config.model_type, number)
    words = vocabulary.words_of(model.get_output_embeddings())
    logits = net(**context.inputs(given, mesh)).logits
    return vocabulary.cross_entropy_sum(logits.flatten(0, -2), context.part(labels, mesh).flatten(), words)


def work(family, mesh):
    return Work(
        lambda number: context.inputs(inputs(family, number)[0], mesh),
        lambda net, number: loss(net, number, mesh),
        lambda number: None,
        contextlib.nullcontext,
    )


def train_alone(family, steps):
    model, told = build(family), []
    adjust = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        adjust.zero_grad()
        total = 0.0
        for number in range(step * BATCHES, (step + 1) * BATCHES):
            part = loss(model, number) / (BATCHES * ROWS * LENGTH)
            part.backward()
            total += part.item()
        told += [total, float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))]
        adjust.step()
    return told, {name: parameter.detach() for name, parameter in model.named_parameters()}


def train(placed, steps, adjust):
    """(loss and norm of each step, seconds of each step)."""
    told, seconds, data = [], [], placed.mesh.data
    for step in range(steps):
        began = time.perf_counter()
        adjust.zero_grad()
        mine = range(step * BATCHES + data.rank, (step + 1) * BATCHES, data.size)
        losses = placed.step(mine, work(placed.config.model_type, placed.mesh), BATCHES * ROWS * LENGTH)
        total = torch.tensor([float(sum(losses)) / (BATCHES * ROWS * LENGTH)], dtype=torch.float64)
        dist.all_reduce(total, group=placed.mesh.losses)
        told += [total.item(), placed.clip_gradients(1.0)]
        adjust.step()
        seconds.append(time.perf_counter() - began)
    return told, seconds


def distance(placed, weights):
    """2-norm of the difference of all weights, over that of the weights. Each element counts once."""
    sums = torch.zeros(2, dtype=torch.float64)
    for name, parameter in placed.named_parameters():
        piece = placed.pieces[name]
        copies, mine = placed.copies(name, piece)
        if copies and mine == 0:
            for box, values in placed.boxes(piece, parameter.detach()):
                sums += torch.stack([(values - weights[name][box]).double().square().sum(),
                                     weights[name][box].double().square().sum()])  # fmt: skip
    dist.all_reduce(sums)
    return float((sums[0] / sums[1]).sqrt())


def layouts(world, config, pattern):
    """(section, Layout) of all that these ranks and this model allow, no two alike, of which `pattern` is found in what
    the table calls them, as "data 2 x tensor 2 (sequence) full"."""
    sizes = range(1, world.size + 1)
    axes = itertools.product(sizes, (1, 2), sizes, (False, True), SHARDINGS, SCHEDULES)
    seen = set()
    for pipeline, shared, tensor, sequence, sharding, (schedule, stages_per_rank) in axes:
        try:
            section = Parallel(
                tensor=tensor,
                pipeline=pipeline,
                context=shared,
                sequence=sequence,
                sharding=sharding,
                pipeline_schedule=schedule,
                stages_per_rank=stages_per_rank,
            )
            made = meshes.layout(section, [world.host] * world.size)
            check(config, made, stages_per_rank, sequence)
        except (UsageError, ValidationError):
            continue
        if config.model_type == "t5" and made.shard > 1 and stages_per_rank > 1:
            continue  # refused: its stages share weights
        alike = made, sequence, sharding if made.shard > 1 else "none", schedule
        if alike not in seen and not (sharding == "hybrid" and made.replicate == 1):
            seen.add(alike)
            if re.search(pattern, f"{name(section, made)} {sharding}"):
                yield section, made


def name(section, made):
    """Of a layout, for the table."""
    schedule = f" ({section.pipeline_schedule})" if made.pipeline > 1 else ""
    slices = " (sequence)" if section.sequence else ""
    return made.describe().replace(f"pipeline {made.pipeline}", f"pipeline {made.pipeline}{schedule}") + slices


def compare(world, families, steps, pattern):
    print_root(world, "| model | layout | sharding | loss, norm | weights |\n|---|---|---|---:|---:|")
    count, worst = 0, 0.0
    for family in families:
        expected, weights = train_alone(family, steps)
        for section, made in layouts(world, build(family).config, pattern):
            placed = apply(build(family), meshes.build(made, world), section)
            told, _ = train(placed, steps, torch.optim.SGD(placed.parameters(), lr=0.1))
            off = max(abs(a - b) / abs(b) for a, b in zip(told, expected, strict=True))
            count, worst = count + 1, max(worst, off)
            away = distance(placed, weights)
            print_root(world, f"| {family} | {name(section, made)} | {section.sharding} | {off:.1e} | {away:.1e} |")
    print_root(world, f"\n{count} layouts, largest difference {worst:.1e}")


def measure(world, steps, pattern):
    """Seconds a step under each layout over this backend and over Gloo."""
    print_root(world, "| layout | sharding | hpcllm | Gloo | Gloo / hpcllm |\n|---|---|---:|---:|---:|")
    taken = {}
    for backend in ("mpi", "gloo", "mpi", "gloo"):
        group = hpcllm.mpi.init("cpu", backend)
        built = functools.cache(functools.partial(meshes.build, world=group))  # Gloo connects the same ranks once
        for section, made in layouts(world, build("bert", **LARGER).config, pattern):
            placed = apply(build("bert", **LARGER), built(made), section)
            _, seconds = train(placed, steps + 1, torch.optim.SGD(placed.parameters(), lr=0.01))
            slowest = torch.tensor(seconds[1:], dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            key = name(section, made), section.sharding
            taken.setdefault(key, {}).setdefault(backend, []).extend(slowest.tolist())
            del placed
        dist.destroy_process_group()
    for (layout, sharding), times in taken.items():
        cells = [jobs.spread(t, "{:.3f}") + " s" for t in (times["mpi"], times["gloo"])]
        ratio = statistics.median(times["gloo"]) / statistics.median(times["mpi"])
        print_root(world, f"| {layout} | {sharding} | {' | '.join(cells)} | {ratio:.2f} |")


def print_root(world, text):
    if world.is_root:
        print(text, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--time", action="store_true", help="seconds a step, beside Gloo")
    parser.add_argument("--layouts", metavar="REGEX", default="", help="those alone that it is found in the names of")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # tiny vocabularies have not its special words
    world = hpcllm.mpi.join()
    print_root(world, f"{world.size} ranks, {args.steps} steps, SGD, fp32, {world.library}, {jobs.versions()}\n")
    if args.time:
        measure(world, args.steps, args.layouts)
    else:
        compare(hpcllm.mpi.init("cpu"), args.family, args.steps, args.layouts)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
