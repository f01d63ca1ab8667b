"""Data parallelism: every rank holds the whole model and computes its part of the global batch."""

import inspect

from torch.nn.parallel import DistributedDataParallel

from ..mpi import hooks


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
