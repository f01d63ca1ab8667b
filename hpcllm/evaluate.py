"""How good a model is on held-out samples: each counted once, at any number of ranks."""

import contextlib
import itertools
import math

import torch
import torch.distributed as dist

from . import attention
from .parallel import context
from .parallel.runner import Work


def arithmetic(precision, device):
    """Context in which forward runs: autocast to bfloat16, or plain fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def of_task(task, placed, precision, score=False):
    """The Work (parallel.runner) of a task (module of hpcllm.tasks) on micro-batches (data.batches.MicroBatch).

    placed: parallel.apply.Placed that it is for, whose ranks may have parts of the sequences.

    Its loss is `task.loss_sum`'s first value; with `score` it is both.
    """

    device, mesh = placed.device, placed.mesh

    def inputs(batch):
        given = attention.inputs(task.inputs(batch.input_ids.to(device)), batch.positions, device)
        return context.inputs(given, mesh)

    def loss(net, batch):
        found = task.loss_sum(net, inputs(batch), context.part(batch.labels.to(device), mesh), score)
        return found if score else found[0]

    return Work(inputs, loss, lambda batch: None if score else batch.seed, lambda: arithmetic(precision, device))


def evaluate(placed, source, width, precision):
    """Mean loss per target (nats), perplexity and accuracy of `placed` (parallel.apply.Placed) over all of `source`.

    width: samples per forward. Each rank sums over its samples in fp64; sums and counts meet once at the end.
    Collective.
    """
    data, nothing = placed.mesh.data, source.nothing()
    work = of_task(source.task, placed, precision, score=True)
    sums = torch.zeros(4, dtype=torch.float64)  # loss, right, targets, samples
    once = placed.mesh.place["context"] == 0  # what a batch counts, not its parts
    placed.train(False)
    batches = source.validation(data.rank, data.size, width)
    # Enough at a time to keep a pipeline full.
    while window := list(itertools.islice(batches, 4 * placed.mesh.layout.pipeline)):
        window = [batch if batch.samples else nothing for batch in window if batch.samples or placed.divided]
        results = placed.runner.run(window, work)
        for batch, (loss, right) in zip(window, results, strict=False):  # no results but of the last stage
            counts = [once * batch.targets, once * batch.samples]
            sums += torch.tensor([loss.item(), right.item(), *counts], dtype=torch.float64)
    dist.all_reduce(sums, group=placed.mesh.losses)
    placed.train()
    placed.reshard()
    loss, right, targets, samples = sums.tolist()
    mean = loss / max(targets, 1)
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(min(mean, 700.0)),
        "eval_accuracy": right / max(targets, 1),
        "eval_targets": int(targets),
        "eval_samples": int(samples),
    }
