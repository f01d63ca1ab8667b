"""The two borders of a region in which each rank of the tensor axis computes something else, and those of slices.

Inside each rank has its part of the heads, features or vocabulary (Shoeybi et al. 2019, arXiv 1909.08053, figure 3).
Outside all ranks of the axis hold the same activations: `enter` copies in and adds up the gradients that come out of
the parts; `leave` adds up the parts and lets the gradient in as it is. Or, between the blocks, each holds its slice of
the sequence (Korthikanti et al. 2022, arXiv 2205.05198, figure 5): `gather` and `scatter` are the borders of regions
then, `divide` and `join` those between slices and what all hold.

B: sequences, S: tokens of one, n: ranks of the axis; H: size of a token's activations.
"""

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from ..errors import UsageError
from ..mpi.device import gpus_in_use, reseed

# Older versions of torch have them under other names alone.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Border(torch.autograd.Function):
    """`there(tensor, group)`, whose gradient is `back` of the gradient."""

    @staticmethod
    def forward(ctx, tensor, group, there, back):
        ctx.group, ctx.back = group, back
        return there(tensor, group)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient, ctx.group), None, None, None


def _same(tensor, group):
    return tensor.view_as(tensor)


def _sum(tensor, group):
    # A copy: what arrives may be somebody else's as well.
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _all(part, group):
    """[B, S / n, H] of each rank to [B, S, H]; one copy, and none where B is 1."""
    parts = part.new_empty((dist.get_world_size(group), *part.shape))
    all_gather(parts.flatten(0, 1), part.contiguous(), group=group)
    return parts.movedim(0, 1).flatten(1, 2)


def _sum_of_mine(whole, group):
    """[B, S, H] of each rank to [B, S / n, H], this rank's slice of their sum; copies as `_all`."""
    parts = whole.unflatten(1, (dist.get_world_size(group), -1)).movedim(1, 0).contiguous()
    part = torch.empty_like(parts[0])
    reduce_scatter(part, parts.flatten(0, 1), group=group)
    return part


def _mine(whole, group):
    size, length = dist.get_world_size(group), whole.shape[1]
    if length % size:
        raise UsageError(
            f"parallel: sequence: tensor ({size}) does not divide a sequence of {length} tokens"
        ).known_to_all()
    return whole.chunk(size, 1)[dist.get_rank(group)].clone(memory_format=torch.contiguous_format)


def enter(tensor, group):
    """`tensor`, the same on all ranks of `group`, for use by parts: its gradients are added up over the ranks."""
    return _Border.apply(tensor, group, _same, _sum)


def leave(tensor, group):
    """The sum over the ranks of `group` of what each has computed, on every one of them."""
    return _Border.apply(tensor, group, _sum, _same)


def gather(part, group):
    """([B, S, H] of the slices [B, S / n, H] of all ranks, for use by parts, as `enter`; how autograd may keep it).

    Both in the precision that products are computed in: fewer bytes travel, and no product makes a copy of its own.
    """
    if torch.is_autocast_enabled(part.device.type):
        part = part.to(torch.get_autocast_dtype(part.device.type))
    whole = _Border.apply(part, group, _all, _sum_of_mine)
    return whole, _Kept(part.detach(), whole.detach(), group)


def scatter(whole, group):
    """This rank's slice [B, S / n, H] of the sum over the ranks of [B, S, H], as `leave`."""
    return _Border.apply(whole, group, _sum_of_mine, _all)


def divide(whole, group):
    """This rank's slice [B, S / n, H] of what all ranks hold, [B, S, H]. Raises UsageError unless n divides S."""
    return _Border.apply(whole, group, _mine, _all)


def join(part, group):
    """[B, S, H] on all ranks, of the slices [B, S / n, H] of each."""
    return _Border.apply(part, group, _all, _mine)


class _Kept:
    """Of what `gather` has made, backward keeps the slice and gathers it once more (section 4.2.2 of that paper).

    To be entered and left around what uses the whole, unless that is computed again in backward.
    """

    def __init__(self, part, whole, group):
        self._part, self._whole, self._group, self._uses = part, whole, group, 0

    def __enter__(self):
        # Their own object: in a circle of references the slice would stay until somebody collects garbage.
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def __exit__(self, *error):
        self._hooks.__exit__(*error)
        self._hooks = self._whole = None

    def _pack(self, tensor):
        if tensor.untyped_storage().data_ptr() != self._whole.untyped_storage().data_ptr():
            return tensor
        self._uses += 1
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed):
        if isinstance(packed, torch.Tensor):
            return packed
        whole = _all(self._part, self._group) if self._whole is None else self._whole
        self._uses -= 1
        self._whole = whole if self._uses else None
        return whole.as_strided(*packed)


class OwnRandomness:
    """Inside a region every rank draws its own random numbers (dropout of its heads), outside all draw the same.

    Where ranks have slices of the sequence, it is from the first block to the last that each draws its own.

    The seed of a region comes from the common numbers, so it is another one each time and the same after a restart.
    """

    def __init__(self, rank):
        self._rank = rank
        self._common = None

    def enter(self):
        seed = int(torch.randint(1 << 62, (), dtype=torch.int64))
        self._common = torch.get_rng_state(), [(gpu, gpu.get_rng_state()) for gpu in gpus_in_use()]
        reseed(seed + self._rank)

    def leave(self):
        if self._common is not None:
            cpu, devices = self._common
            torch.set_rng_state(cpu)
            for gpu, state in devices:
                gpu.set_rng_state(state)
            self._common = None
