"""`apply`: a model becomes this rank's part of a layout. The one place where the order of things matters."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from . import data, sharding, tensor
from . import mesh as meshes
from .pieces import Piece


def apply(model, mesh, parallel, activation_checkpointing=False, device=None):
    """Turn `model`, whole and the same on all ranks, into this rank's part of it; returns a `Placed`.

    mesh: mesh.Mesh; parallel: the run file's [parallel] section; device: where the parts go. Raises UsageError, the
    same on every rank, for a model that cannot be divided like that. Collective.
    """
    pieces = {}
    if mesh.layout.tensor > 1:
        # First: it needs modules and weights as transformers made them, and what follows sees only smaller layers.
        pieces = tensor.split(model, mesh["tensor"])
    if activation_checkpointing:
        # Then, so that the sums over the tensor axis are recomputed with what they belong to.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    reduce_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[parallel.reduce_dtype]
    pieces = {name: pieces.get(name, Piece(parameter.shape)) for name, parameter in model.named_parameters()}
    if mesh.layout.shard == 1:
        # Last: whoever carries gradients must see the weights that are there in the end. On the device are only parts.
        model = model if device is None else model.to(device)
        replica = data.replicate(model, mesh["data"], reduce_dtype)
    else:
        devices = mesh.devices["replicate", "shard"] if mesh.layout.replicate > 1 else mesh.devices["shard"]
        replica = sharding.shard(model, devices, parallel.sharding, reduce_dtype)
    return Placed(model, replica, mesh, parallel.sharding, pieces)


def check(config, layout):
    """Raise UsageError for a transformers configuration whose model cannot be divided as `layout` says."""
    if layout.tensor > 1:
        tensor.plan(config)
        tensor.check(config, layout.tensor)


def whole(model):
    """`model` as the `Placed` of one rank by itself."""
    pieces = {name: Piece(parameter.shape) for name, parameter in model.named_parameters()}
    return Placed(model, model, meshes.alone(), "none", pieces)


@dataclass(frozen=True)
class Placed:
    """A model on its mesh.

    model: the module with this rank's parameters; replica: what forward is called on; pieces: parameter name ->
    pieces.Piece, what of the whole tensor is cut to this rank by the tensor axis.
    """

    model: Any
    replica: Any
    mesh: Any
    sharding: str
    pieces: dict

    @contextlib.contextmanager
    def micro_batch(self, last):
        """Around forward and backward of one micro-batch; gradients are everybody's after the `last` of a step."""
        if self.mesh.layout.shard == 1:
            with contextlib.nullcontext() if last else self.replica.no_sync():
                yield
        else:
            sharding.last_micro_batch(self.replica, last, self.sharding)
            yield

    def reshard(self):
        """Every rank holds its shards alone again, as optimizer and checkpoints know them."""
        sharding.reshard(self.model)

    def places(self, piece, tensor):
        """Boxes of the whole tensor and of this rank's part of it, for a parameter or one of its moments."""
        start = sharding.first_row(tensor)
        rows = sharding.local(tensor).shape[0] if tensor.dim() else 0
        return piece.rows(start, start + rows)

    def boxes(self, piece, tensor):
        """(box of the whole tensor, what this rank has of it), for all boxes that it has."""
        mine = sharding.local(tensor)
        return [(outer, mine[inner]) for outer, inner in self.places(piece, tensor)]

    def writes(self, piece, number):
        """True on one of the ranks that hold the same part of the tensor number `number`: they take turns."""
        layout, place = self.mesh.layout, self.mesh.place
        copies, mine = layout.replicate, place["replicate"]
        if piece.dim is None:
            copies, mine = copies * layout.tensor, mine * layout.tensor + place["tensor"]
        if not piece.shape:  # a number, which FSDP2 does not divide
            copies, mine = copies * layout.shard, mine * layout.shard + place["shard"]
        return number % copies == mine

    @torch.no_grad()
    def clip_gradients(self, bound):
        """Scale gradients down to a 2-norm of `bound` over the whole model; returns the norm before, a float.

        Every element counts once, whoever holds it. Collective.
        """
        gradients = {n: sharding.local(p.grad) for n, p in self.model.named_parameters() if p.grad is not None}
        first = self.mesh.place["tensor"] == 0  # what is not cut is the same on all of the axis
        mine = [g for n, g in gradients.items() if first or self.pieces[n].dim is not None]
        norms = torch._foreach_norm(mine) if mine else []
        total = torch.stack([norm.double() for norm in norms]).square().sum() if norms else torch.zeros(())
        total = total.double().cpu()
        dist.all_reduce(total, group=self.mesh.replica)
        norm = float(total.sqrt())
        if bound and norm > bound:
            torch._foreach_mul_(list(gradients.values()), bound / (norm + 1e-6))
        return norm
