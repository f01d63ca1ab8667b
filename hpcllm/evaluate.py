"""How good a model is on held-out samples: each counted once, at any number of ranks."""

import contextlib
import math

import torch
import torch.distributed as dist


def arithmetic(precision, device):
    """Context in which forward runs: autocast to bfloat16, or plain fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@torch.no_grad()
def evaluate(net, source, world, width, precision):
    """Mean loss per target (nats), perplexity and accuracy of `net` over all samples of `source`. Collective.

    width: samples per forward. Each rank sums over its samples in fp64; sums and counts meet once at the end.
    """
    training = net.training
    net.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # loss, right, targets, samples
    for batch in source.validation(world.rank, world.size, width):
        if len(batch.input_ids) == 0:
            continue
        with arithmetic(precision, world.device):
            loss, right = source.task.loss_sum(
                net, batch.input_ids.to(world.device), batch.labels.to(world.device), score=True
            )
        sums += torch.tensor([loss.item(), right.item(), batch.targets, len(batch.input_ids)], dtype=torch.float64)
    dist.all_reduce(sums, group=world.group)
    net.train(training)
    loss, right, targets, samples = sums.tolist()
    mean = loss / max(targets, 1)
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(min(mean, 700.0)),
        "eval_accuracy": right / max(targets, 1),
        "eval_targets": int(targets),
        "eval_samples": int(samples),
    }
