"""The optimizer and its learning rate. The rate is a function of the step, so there is no scheduler to save."""

import math
import re

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def build(placed, train):
    """torch optimizer for the parameters of `placed` (parallel.apply.Placed, or a module) as the run file's [train]
    section says.

    Biases and norms (parameters of one dim) are exempt from weight decay. AdamW: Loshchilov and Hutter 2019, decoupled
    decay; SGD: decay added to the gradient. Both use torch's fused kernels where these can.
    """
    named = {name: p for name, p in placed.named_parameters() if p.requires_grad}
    parameters, layers = named.values(), getattr(getattr(placed, "config", None), "num_hidden_layers", 0)
    groups = {}
    for name, parameter in named.items():
        decay, scale = parameter.dim() >= 2, train.layerwise_lr_decay ** _depth(name, layers)
        key = (not decay, -scale)  # matrices first, and those near the output
        made = {"params": [], "weight_decay": train.weight_decay if decay else 0.0, "scale": scale}
        groups.setdefault(key, made)["params"].append(parameter)
    groups = [groups[key] for key in sorted(groups)]
    if train.optimizer == "sgd":
        # The fused kernel with momentum does not know the sharded tensors of FSDP2 (torch 2.13).
        sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
        return torch.optim.SGD(groups, lr=train.learning_rate, momentum=train.sgd_momentum, fused=not sharded)
    return torch.optim.AdamW(
        groups,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,
    )


def learning_rate(step, train):
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then linear, cosine or no decay.

    The last step of the warm-up has the full rate; the rate would reach zero at step max_steps.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    if train.lr_scheduler_type == "constant":
        return train.learning_rate
    if train.lr_scheduler_type == "linear":
        return train.learning_rate * max(0.0, 1.0 - progress)
    return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer, value):
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("scale", 1.0)


def share(optimizer, comm, group):
    """Make root's state of an optimizer for whole parameters everybody's, bit for bit. Collective.

    comm, group: mpi4py communicator and process group of the same ranks. Ranks that have no state yet get one.
    """
    parameters = [parameter for one in optimizer.param_groups for parameter in one["params"]]
    kinds = [{key: _kind(value) for key, value in optimizer.state.get(p, {}).items()} for p in parameters]
    for parameter, known in zip(parameters, comm.bcast(kinds), strict=True):
        state = optimizer.state[parameter]
        for key, (shape, dtype, beside, value) in known.items():
            if shape is None:
                state[key] = value
                continue
            if key not in state:
                like = parameter.detach() if shape == parameter.shape else parameter.new_empty(shape)
                state[key] = torch.empty_like(like, dtype=dtype, device=parameter.device if beside else "cpu")
            dist.broadcast(state[key], 0, group=group)


def _kind(value):
    """(shape, dtype, whether it is where a GPU's parameters are, None) of a tensor; (None, None, None, value) else."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, not value.is_cpu, None
    return None, None, None, value


def _depth(name, layers):
    """How many blocks a parameter lies below the output: 0 for what is behind the last, `layers` + 1 for embeddings.

    By its name, in which transformers' models number blocks (Clark et al. 2020, arXiv 2003.10555, count them so).
    """
    number = re.search(r"\.(\d+)\.", name)
    if number:
        return layers - int(number[1])
    return layers + 1 if re.search(r"embed|\bw[tp]e\b|\bshared\b", name) else 0
