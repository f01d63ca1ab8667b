"""What DistributedDataParallel can do with its gradients over this backend, as communication hooks.

    from hpcllm.mpi.hooks import average_gradients

    replica = DistributedDataParallel(model)
    replica.register_comm_hook(None, average_gradients)

The mean is DDP's own. What the hooks add: buckets are moved to where the ranks of a host reach them, so that gradients
are summed where they lie, without a copy in and out (`peers`); and where nothing travels during the backward pass
(`overlap`), all buckets go at its end, since each on its own would be one more place where ranks wait for each other.
"""

import torch
import torch.distributed as dist

from . import overlap, shared

# Smaller buckets are not summed where they lie (`shared`).
SMALLEST_BYTES = shared.LOOK_BYTES
_waiting = {}  # group: (what travels, gradients, future) of the buckets of a backward pass under way


def average_gradients(group, bucket):
    """The mean over the ranks of `group` (None: all of them): the hook whose state is `group`."""
    return _reduce(group, bucket, dist.ReduceOp.AVG)


def sum_gradients(group, bucket):
    """The sum over the ranks of `group` (None: all of them), for losses that are divided by a global count."""
    return _reduce(group, bucket, dist.ReduceOp.SUM)


def sum_gradients_as(dtype):
    """A hook as `sum_gradients`, whose gradients travel as `dtype`, as bfloat16 for example.

    They are rounded to it, added up in float32, and the sum is rounded once more. Half of the bytes move within a
    host, three quarters between hosts, whose partial sums stay in float32.
    """

    def sum_rounded_gradients(group, bucket):
        return _reduce(group, bucket, dist.ReduceOp.SUM, dtype)

    return sum_rounded_gradients


def forget():
    """Drop the buckets of a backward pass that has been broken off."""
    _waiting.clear()


def _reduce(group, bucket, op, dtype=None):
    gradients, group = bucket.buffer(), group or dist.group.WORLD
    ours = hasattr(group, "settle")
    pooled = ours and gradients.nbytes >= SMALLEST_BYTES
    sent = gradients
    if dtype not in (None, gradients.dtype):
        empty = group.allocate_tensor if pooled and gradients.is_cpu else torch.empty
        sent = empty(gradients.numel(), dtype=dtype, device=gradients.device).copy_(gradients)
    elif pooled:
        group.settle(gradients)
    if overlap.active() or not ours:
        work = dist.all_reduce(sent, op, group=group, async_op=True)
        return work.get_future().then(lambda future: _arrived(future.value()[0], gradients))
    future = torch.futures.Future(devices=[gradients.device] if not gradients.is_cpu else [])
    _waiting.setdefault(group, []).append((sent, gradients, future))
    if bucket.is_last():
        for sent, gradients, done in _waiting.pop(group):
            dist.all_reduce(sent, op, group=group)
            done.set_result(_arrived(sent, gradients))
    return future


def _arrived(sent, gradients):
    return gradients if sent is gradients else gradients.copy_(sent)
