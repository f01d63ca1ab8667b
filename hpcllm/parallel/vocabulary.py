"""Embedding, output layer and cross entropy over a vocabulary that the ranks of a group share (arXiv 1909.08053, 3).

No rank ever holds all logits: they meet in the largest one, the sum of exponentials and the logit of the target.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from .regions import enter, leave


@dataclass(frozen=True)
class Words:
    """The ids start to stop of a vocabulary, which are this rank's. group: of all that share it."""

    start: int
    stop: int
    group: Any

    def inside(self, ids):
        """(ids counted from `start`, 0 for others; which are this rank's)."""
        mine = (ids >= self.start) & (ids < self.stop)
        return torch.where(mine, ids - self.start, 0), mine


def embed(module, words):
    """Make an nn.Embedding whose weight has been cut to the rows of `words` look up the whole vocabulary."""
    padding = module.padding_idx
    padding = padding - words.start if padding is not None and words.start <= padding < words.stop else None

    def forward(input_ids):
        local, mine = words.inside(input_ids)
        rows = functional.embedding(local, module.weight, padding)
        return leave(rows.masked_fill(~mine.unsqueeze(-1), 0.0), words.group)

    module.padding_idx = padding
    module.forward = forward


def classify(module, words):
    """Make a linear layer whose rows have been cut to those of `words` give the logits of these words."""
    module.register_forward_pre_hook(lambda _, arguments: (enter(arguments[0], words.group), *arguments[1:]))
    module.words = words


def words_of(head):
    """The Words that the output layer `head` gives logits of; None for all of them."""
    return getattr(head, "words", None)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, words):
        largest = logits.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=words.group)
        local, mine = words.inside(targets)
        shifted = logits - largest.unsqueeze(-1)
        of_targets = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~mine, 0.0)
        exponentials = shifted.exp_()
        meeting = torch.stack([exponentials.sum(-1), of_targets])
        dist.all_reduce(meeting, group=words.group)
        ctx.save_for_backward(exponentials.div_(meeting[0].unsqueeze(-1)), local, mine)
        return (meeting[0].log() - meeting[1]).sum()

    @staticmethod
    def backward(ctx, gradient):
        probabilities, local, mine = ctx.saved_tensors
        probabilities = probabilities.scatter_add(-1, local.unsqueeze(-1), -mine.to(probabilities).unsqueeze(-1))
        return probabilities * gradient, None, None


def cross_entropy_sum(logits, targets, words=None):
    """Cross entropy in nats, summed over `targets` (int64 [n]). logits: [n, this rank's words], floating point."""
    if words is None:
        return functional.cross_entropy(logits, targets, reduction="sum")
    return _CrossEntropy.apply(logits, targets, words)


@torch.no_grad()
def best(logits, words=None):
    """The id with the largest of the `logits` [n, this rank's words]: int64 [n], the lowest one of equals."""
    if words is None:
        return logits.argmax(-1)
    largest, place = logits.max(-1)
    everywhere = largest.clone()
    dist.all_reduce(everywhere, dist.ReduceOp.MAX, group=words.group)
    ids = torch.where(largest == everywhere, place + words.start, torch.iinfo(torch.int64).max)
    dist.all_reduce(ids, dist.ReduceOp.MIN, group=words.group)
    return ids
