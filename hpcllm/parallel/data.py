"""Data parallelism: every rank holds the whole model and computes its part of the global batch."""

import inspect

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..mpi import hooks
from . import sharding


def replicate(model, group, reduce_dtype=None):
    """Wrap `model` so that root's weights are everybody's, and backward leaves the *sum* of all ranks' gradients.

    The sum, not DDP's mean: the loss is divided once, by the global number of targets, so nothing else may divide.
    reduce_dtype: what gradients travel as; None for their own.
    """
    # Buffers are constants in these models; sending them in every forward would be wasted.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    quiet = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}  # 2.13, before
    replica = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True, **quiet)
    replica.register_comm_hook(group, hooks.sum_gradients_as(reduce_dtype))
    return replica


def add_up(parameters, group, reduce_dtype=None, bytes_at_once=25 << 20):
    """Leave the sum over the ranks of `group` in the gradients of `parameters`, many in one message.

    For what no wrapper carries: stages of a pipeline, whose last backward pass is nobody's cue, and what ranks have of
    their slices of the sequences.
    """
    if dist.get_world_size(group) == 1:
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    gradients, count = [], 0
    for number, parameter in enumerate(parameters, 1):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(sharding.local(parameter.grad))
        count += gradients[-1].nbytes
        if count >= bytes_at_once or number == len(parameters):
            _add_up(gradients, group, reduce_dtype)
            gradients, count = [], 0


def _add_up(gradients, group, reduce_dtype):
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    travelling = flat if reduce_dtype is None else flat.to(reduce_dtype)
    dist.all_reduce(travelling, group=group)
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(
        travelling.split([gradient.numel() for gradient in gradients]), gradients, strict=True)])  # fmt: skip
