"""The two borders of a region in which each rank of the tensor axis computes something else.

Outside of it all ranks of the axis hold the same activations; inside, each has its part of the heads, features or
vocabulary (Shoeybi et al. 2019, arXiv 1909.08053, figure 3). `enter` copies in and adds up the gradients that come out
of the parts; `leave` adds up the parts and lets the gradient in as it is.
"""

import torch
import torch.distributed as dist

from ..mpi.device import gpus_in_use


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        # A copy: what arrives may be somebody else's as well.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def enter(tensor, group):
    """`tensor`, the same on all ranks of `group`, for use by parts: its gradients are added up over the ranks."""
    return _Enter.apply(tensor, group)


def leave(tensor, group):
    """The sum over the ranks of `group` of what each has computed, on every one of them."""
    return _Leave.apply(tensor, group)


class OwnRandomness:
    """Inside a region every rank draws its own random numbers (dropout of its heads), outside all draw the same.

    The seed of a region comes from the common numbers, so it is another one each time and the same after a restart.
    """

    def __init__(self, rank):
        self._rank = rank
        self._common = None

    def enter(self):
        seed = int(torch.randint(1 << 62, (), dtype=torch.int64))
        self._common = torch.get_rng_state(), [(gpu, gpu.get_rng_state()) for gpu in gpus_in_use()]
        torch.manual_seed(seed + self._rank)

    def leave(self):
        if self._common is not None:
            cpu, devices = self._common
            torch.set_rng_state(cpu)
            for gpu, state in devices:
                gpu.set_rng_state(state)
            self._common = None
