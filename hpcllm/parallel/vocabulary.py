"""Embedding, output layer and cross entropy over a vocabulary that the ranks of a group share (arXiv 1909.08053, 3).

No rank ever holds all logits: they meet in the largest one, the sum of exponentials and the logit of the target. Nor
are those of all targets ever there: `linear_cross_entropy` makes them, and what follows from them, some rows at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from ..mpi.reduce import shares
from .regions import all_gather, enter, leave

LOGITS_AT_ONCE = 1 << 24  # that exist: enough rows for a matrix product to run at full speed on a CPU
ROUNDED_AT_ONCE = 1 << 18  # that are fp32 on a CPU


@dataclass(frozen=True)
class Words:
    """The ids start to stop of a vocabulary of `count`, which are this rank's. group: of all that share it."""

    start: int
    stop: int
    count: int
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


def gather(module):
    """Make a linear layer that `classify` has changed give the logits of all words, on every rank. No gradients."""
    words, module.words = module.words, None
    size = dist.get_world_size(words.group)
    lengths = shares(words.count, size)

    def all_words(_, __, part):
        # As many on every rank, of which some have a word more.
        part = functional.pad(part, (0, max(lengths) - part.shape[-1]))
        parts = part.new_empty((size, *part.shape))
        all_gather(parts.flatten(0, 1), part, group=words.group)
        return torch.cat([each[..., :length] for each, length in zip(parts, lengths, strict=True)], -1)

    module.register_forward_hook(all_words)


def words_of(head):
    """The Words that the output layer `head` gives logits of; None for all of them."""
    return getattr(head, "words", None)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, words):
        loss, probabilities, local, mine = _shared_cross_entropy(logits, targets, words)
        ctx.save_for_backward(probabilities, local, mine)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        probabilities, local, mine = ctx.saved_tensors
        probabilities = probabilities.scatter_add(-1, local.unsqueeze(-1), -mine.to(probabilities).unsqueeze(-1))
        return probabilities * gradient, None, None


def _shared_cross_entropy(logits, targets, words):
    """(the sum over `targets`, probabilities of this rank's words, where among them targets are, which are)."""
    largest = logits.amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=words.group)
    local, mine = words.inside(targets)
    shifted = logits - largest.unsqueeze(-1)
    of_targets = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~mine, 0.0)
    exponentials = shifted.exp_()
    meeting = torch.stack([exponentials.sum(-1), of_targets])
    dist.all_reduce(meeting, group=words.group)
    return (meeting[0].log() - meeting[1]).sum(), exponentials.div_(meeting[0].unsqueeze(-1)), local, mine


def cross_entropy_sum(logits, targets, words=None):
    """Cross entropy in nats, summed over `targets` (int64 [n]). logits: [n, this rank's words], floating point."""
    if words is None:
        return functional.cross_entropy(logits, targets, reduction="sum")
    return _CrossEntropy.apply(logits, targets, words)


def linear_cross_entropy(hidden, weight, bias, targets, words=None, score=False):
    """(`cross_entropy_sum` of the logits that a linear layer gives for `hidden` [n, features], targets that are best).

    Only a few rows have logits at a time, in the precision of autocast; their gradients are computed with them, so that
    nothing is computed twice. score: False spares the second result, which is then None.
    """
    train = torch.is_grad_enabled() and any(of is not None and of.requires_grad for of in (hidden, weight, bias))
    loss, right = _LinearCrossEntropy.apply(hidden, weight, bias, targets, words, score, train)
    return loss, right if score else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, words, score, train):
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        states, used = hidden.to(dtype), weight.to(dtype)
        added = None if bias is None else bias.to(dtype)
        losses, right, of_states, of_weight, of_bias = [], targets.new_zeros(()), [], None, None
        # As many on each rank of a group, of which some have a word more.
        width = len(weight) if words is None else words.count // dist.get_world_size(words.group)
        # A GPU, which multiplies faster, must have more to do for each sum of the weight's gradients.
        most = LOGITS_AT_ONCE if device == "cpu" else 16 * LOGITS_AT_ONCE
        parts = min(-(-len(states) * width // most), len(states)) or 1
        for some, wanted in zip(states.tensor_split(parts), targets.tensor_split(parts), strict=True):
            logits = functional.linear(some, used, added)
            if score:
                right += (best(logits, words) == wanted).sum()
            losses.append(_to_gradients(logits, wanted, words))
            if not train:
                continue
            of_states.append(logits @ used)
            if weight.requires_grad and parts > 1:
                if of_weight is None:
                    of_weight = logits.t() @ some
                elif dtype.itemsize >= 4:
                    of_weight.addmm_(logits.t(), some)
                else:
                    of_weight = of_weight.float().add_(logits.t() @ some)
            if bias is not None and bias.requires_grad:
                summed = logits.sum(0, dtype=torch.float32)
                of_bias = summed if of_bias is None else of_bias.add_(summed)
        if train:
            ctx.gradients = torch.cat(of_states), of_weight, of_bias
            ctx.left = (logits, hidden.detach()) if weight.requires_grad and parts == 1 else None
            ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(right)
        return torch.stack(losses).sum(), right

    @staticmethod
    def backward(ctx, gradient, _):
        found = [part if part is None else part.to(dtype).mul_(gradient)
                 for part, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)]  # fmt: skip
        if ctx.left is not None:
            # To scale the smaller factor spares a pass over what is as large as the weight.
            logits, hidden = ctx.left
            found[1] = (logits.t() @ (hidden * gradient).to(logits.dtype)).to(ctx.dtypes[1])
        ctx.gradients = ctx.left = None  # they become what is asked for, and can be asked for once
        return *found, *[None] * 4


def _to_gradients(logits, targets, words):
    """Cross entropy summed over `targets`, in fp32; `logits`, [n, this rank's words], become its gradients by them."""
    if words is not None:
        loss, probabilities, local, mine = _shared_cross_entropy(logits.float(), targets, words)
        logits.copy_(probabilities.scatter_add_(-1, local.unsqueeze(-1), -mine.to(probabilities).unsqueeze(-1)))
        return loss
    losses = []
    # Few enough rows that what is fp32 stays in a core's cache.
    rows = max(1, ROUNDED_AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for some, wanted in zip(logits.split(rows), targets.unsqueeze(-1).split(rows), strict=True):
        logs = functional.log_softmax(some, -1, dtype=torch.float32)
        losses.append(logs.gather(-1, wanted).sum())
        probabilities = logs.exp_()
        some.copy_(probabilities.scatter_add_(-1, wanted, torch.full_like(wanted, -1.0, dtype=torch.float32)))
    return -torch.stack(losses).sum()


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
