"""Sharding: data-parallel ranks divide optimizer state, gradients and weights between them (ZeRO, arXiv 1910.02054).

By PyTorch's FSDP2, which keeps weights in pieces and has a rank see those of one block at a time. What the ZeRO stages
differ in is when pieces are put together and gradients taken apart:

    optimizer   (1)  weights are gathered once a step, gradients are summed and divided after the last micro-batch
    gradients   (2)  weights are gathered once a micro-batch, gradients divided after each
    full        (3)  weights are gathered block by block, in forward and again in backward
    hybrid           as full among the ranks of a host, whose like are replicas on the other hosts
"""

import warnings

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard


def stacks(model):
    """The repeated layers of a transformers model: those that it does not want split, of each list of modules."""
    whole = set(model._no_split_modules or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [[block for block in listed if type(block).__name__ in whole] for listed in lists]
    return [blocks for blocks in found if blocks]


def blocks(model):
    """All of `stacks`, in one list."""
    return [block for stack in stacks(model) for block in stack]


def shard(model, devices, sharding, reduce_dtype=None, offload=False):
    """Divide `model` over `devices` (DeviceMesh, one dim, or replicas x shards), in place.

    Backward leaves the *sum* of all ranks' gradients. reduce_dtype: what gradients travel as, None for their own;
    offload: pieces, and their gradients, stay in host memory, and only what is gathered is on the device.
    Collective when the model runs.
    """
    # It concerns in-place changes of what a block returns, which no model of transformers makes.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    arguments = {
        "mesh": devices,
        "reshard_after_forward": sharding in ("full", "hybrid"),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce_dtype),
    }
    if offload:
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=devices.device_type != "cpu")
    for block in blocks(model):
        fully_shard(block, **arguments)
    fully_shard(model, **arguments)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided once, by the global number of targets, so nothing else may divide.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def last_micro_batch(model, last, sharding):
    """Tell a sharded `model` whether the backward pass to come is the `last` of its step."""
    model.set_is_last_backward(last)
    if sharding == "optimizer":
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def reshard(model):
    """Take gathered weights apart again; a forward pass without a backward pass may have left them whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor):
    """The part of a parameter or gradient that this rank holds, as a plain tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def first_row(parameter):
    """Where along dim 0 this rank's part of a parameter starts."""
    if not hasattr(parameter, "to_local"):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0] if offset else 0
