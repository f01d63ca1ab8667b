"""One step: forward and backward of this rank's part of a global batch, gradients that meet, and the update."""

import math

import torch
import torch.distributed as dist

from . import evaluate, optimizer


def one_step(placed, adjust, micro_batches, rate, source, plan, commit=None):
    """Forward and backward of this rank's micro-batches of `source` and one optimizer step.

    Returns (loss summed over this rank's targets; targets, tokens, and pairs of tokens that attend, of all ranks;
    gradient norm before clipping). Each rank's loss is a sum, divided by the global number of targets; gradients are
    summed over ranks. commit: called before anything changes that the next step depends on.
    """
    placed.train()
    counts = [[batch.targets, batch.tokens, batch.pairs] for batch in micro_batches]
    count = torch.tensor(counts, dtype=torch.float64).sum(0)  # exact for whole numbers, and weights may be none
    dist.all_reduce(count, group=placed.mesh["data"])
    targets, tokens, pairs = count.tolist()
    targets = targets or 1.0
    optimizer.set_learning_rate(adjust, rate)
    adjust.zero_grad()
    work = evaluate.of_task(source, placed, plan.precision)
    losses = placed.step(micro_batches, work, targets)
    loss_sum = torch.stack(losses).double().sum() if losses else 0.0
    grad_norm = placed.clip_gradients(plan.max_grad_norm)
    if commit:
        commit()
    if math.isfinite(grad_norm):  # the same on all ranks
        adjust.step()
    return loss_sum, targets, tokens, pairs, grad_norm
