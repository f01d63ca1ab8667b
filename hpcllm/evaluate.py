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
def evaluate(net, source, ranks, width, precision, divided=False):
    """Mean loss per target (nats), perplexity and accuracy of `net` over all samples of `source`. Collective.

    ranks: whoever shares out the samples, with rank, size and group (mpi.World or mesh.Mesh.data). width: samples per
    forward. divided: `net` communicates in forward, so all ranks call it equally often. Each rank sums over its samples
    in fp64; sums and counts meet once at the end.
    """
    training, device = net.training, next(net.parameters()).device
    net.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # loss, right, targets, samples
    for batch in source.validation(ranks.rank, ranks.size, width):
        input_ids, labels, count = batch.input_ids.to(device), batch.labels.to(device), len(batch.input_ids)
        if count == 0:
            if not divided:
                continue
            input_ids = torch.zeros((1, source.sequence_length), dtype=torch.int64, device=device)
            labels = torch.full_like(input_ids, -100)  # nothing that counts
        with arithmetic(precision, device):
            loss, right = source.task.loss_sum(net, input_ids, labels, score=True)
        sums += torch.tensor([loss.item(), right.item(), batch.targets, count], dtype=torch.float64)
    dist.all_reduce(sums, group=ranks.group)
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
