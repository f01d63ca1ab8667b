"""`apply`: a model becomes this rank's part of a layout. The one place where the order of things matters."""

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .. import weights
from ..config import Parallel
from ..errors import UsageError
from . import compiled, context, data, deferred, host, pipeline, sharding, tensor
from . import mesh as meshes
from .pieces import Piece
from .runner import Runner

_SUMMED_AT_ONCE = 1 << 16
_TRAVELS_AS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def apply(
    model,
    mesh,
    parallel,
    activation_checkpointing=False,
    device=None,
    targets=1.0,
    source=None,
    *,
    low_precision=False,
    compile_blocks=False,
):
    """Turn `model`, whole and the same on all ranks, into this rank's part of it; returns a `Placed`.

    mesh: mesh.Mesh; parallel: the run file's [parallel] section, "auto" decided; device: where the parts go; targets:
    fraction of the tokens that reach the output layer; source: where the weights come from (weights.Fresh,
    weights.Saved) of a model that has none yet, so that no rank needs memory for more than its part; low_precision:
    forward will run under torch.autocast in bfloat16; activation_checkpointing, compile_blocks: as in the run file.
    `model` is used up. Raises UsageError, the same on every rank, for a model that cannot be divided like that.
    Collective.
    """
    layout, pieces, device = mesh.layout, {}, device or torch.device("cpu")
    whole = {name: parameter.shape for name, parameter in model.named_parameters()}
    if layout.context > 1:
        # A name in the configuration, which all parts of the model take with them.
        context.share(model, mesh, device)
    if parallel.sequence:
        # While it is whole: a small one is made of its class and configuration.
        tensor.try_slices(model, mesh["tensor"], device)
    if layout.tensor > 1:
        # Before the rest: it needs modules and weights as transformers made them, and others see only smaller layers.
        pieces = tensor.split(model, mesh["tensor"], parallel.sequence, activation_checkpointing)
    if activation_checkpointing:
        # Then, so that the sums over the tensor axis are recomputed with what they belong to.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        puts_off = {"context_fn": deferred.contexts} if parallel.pipeline_schedule == "zero_bubble" else {}
        enable({"use_reentrant": False, **puts_off})
    if compile_blocks:
        # Then, so that what is computed again is compiled too, and FSDP2's hooks are outside of what is.
        compiled.compile_blocks(model)
    pieces = {name: pieces.get(name, Piece(shape)) for name, shape in whole.items()}
    sliced = _of_slices(model, pieces) if parallel.sequence else ()
    # Then layers are dealt out, as they are: a part is a model like the whole.
    stages = layout.pipeline * parallel.stages_per_rank
    parts, shared = pipeline.take(model, stages, mesh, whole, targets) if stages > 1 else ([pipeline.alone(model)], {})
    for part in parts if parallel.sequence else ():
        tensor.divide_blocks(part.model, mesh["tensor"])
        part.slices = mesh["tensor"]
    reduce_dtype, one_copy = _TRAVELS_AS[parallel.reduce_dtype], None
    if parallel.sharding == "host":
        # Last, and so are the others: whoever carries gradients must see the weights that are there in the end.
        one_copy = host.OneCopy(model, mesh.gradients, low_precision, reduce_dtype)
        pieces |= one_copy.pieces
    elif layout.shard > 1:
        for part in parts:
            sharding.shard(part.model, mesh.shards, parallel.sharding, reduce_dtype, parallel.offload)
    placed = Placed(parts, parts[0].model, mesh, parallel, model.config, pieces, shared, device, sliced, one_copy)
    if source is not None:
        # On the device are only parts, and nowhere was there ever more.
        weights.fill(placed, source, "cpu" if parallel.offload else device)
    if layout.shard == 1 and not one_copy:
        for part in parts:
            part.to(device)
        if stages == 1:
            return dataclasses.replace(placed, replica=data.replicate(model, mesh.gradients, reduce_dtype))
    return placed


def _of_slices(model, pieces):
    """Names of the parameters that are used on slices of sequences alone: those of blocks that are not cut."""
    inside = {id(parameter) for block in sharding.blocks(model) for parameter in block.parameters()}
    uncut = [name for name, piece in pieces.items() if piece.dim is None]
    parameters = dict(model.named_parameters())
    return [name for name in uncut if id(parameters[name]) in inside]


def check(config, layout, stages_per_rank=1, sequence=False):
    """Raise UsageError for a transformers configuration whose model cannot be divided as `layout` says.

    stages_per_rank, sequence: as in the run file.
    """
    if getattr(config, "output_router_logits", False):
        for axis, size in (("pipeline", layout.pipeline * stages_per_rank), ("context", layout.context)):
            if size > 1:
                raise UsageError(
                    f"parallel: {axis} and model.config.output_router_logits: how evenly {config.model_type} uses its "
                    f"experts is one number of all layers and tokens; set {axis} to 1 or output_router_logits to false"
                )
    if layout.context > 1:
        context.check(config)
    if layout.tensor > 1:
        tensor.plan(config)
        tensor.check(config, layout.tensor, sequence)
    if layout.pipeline * stages_per_rank > 1:
        pipeline.check(config, layout.pipeline * stages_per_rank, stages_per_rank > 1 and layout.shard > 1)


def whole(model, world=None):
    """`model` as the `Placed` of ranks that hold it whole, each for itself: to evaluate, or to save.

    world: mpi.World, whose ranks share out samples; None: there is but one.
    """
    pieces = {name: Piece(parameter.shape) for name, parameter in model.named_parameters()}
    device = next(model.parameters()).device
    return Placed([pipeline.alone(model)], model, meshes.replicas(world), Parallel(), model.config, pieces, {}, device)


@dataclass(frozen=True)
class Placed:
    """A model on its mesh.

    parts: the pipeline.Part of each stage that this rank has; replica: what forward is called on where there is but one
    stage; parallel, config: the run file's section, transformers' configuration of the whole; pieces: parameter name ->
    pieces.Piece, what of the whole tensor is cut to this rank by the tensor axis, for all parameters of the model;
    shared: name -> (pipeline ranks, their process group) of parameters that several stages hold; sliced: names of those
    whose gradients are of this rank's slices of the sequences; one_copy: host.OneCopy where ranks of a host share the
    weights.
    """

    parts: list
    replica: Any
    mesh: Any
    parallel: Any
    config: Any
    pieces: dict
    shared: dict
    device: Any
    sliced: tuple = ()
    one_copy: Any = None

    @functools.cached_property
    def runner(self):
        return Runner(self, self.parallel.pipeline_schedule, self.device)

    def moved(self, mesh):
        """The same model, which its ranks hold whole, as it is, on another mesh of such ranks; this one is used up.

        Collective over the ranks of `mesh`.
        """
        (part,) = self.parts
        # Its hooks at the parameters would go on to speak to the ranks of before; they end with what made them.
        self.replica.reducer = self.replica.logger = None
        reduce_dtype = _TRAVELS_AS[self.parallel.reduce_dtype]
        for parameter in part.model.parameters():
            parameter.grad = None
        return dataclasses.replace(self, mesh=mesh, replica=data.replicate(part.model, mesh.gradients, reduce_dtype))

    @property
    def model(self):
        """The module of this rank's first stage: of the model's class, with some of its layers."""
        return self.parts[0].model

    @property
    def divided(self):
        """True where no rank computes a sample by itself, so that forward is a collective call."""
        return self.mesh.layout.size > self.mesh.layout.replicate

    def named_parameters(self):
        """(name in the whole model, parameter) of all that this rank has, or that it updates."""
        if self.one_copy:
            return self.one_copy.slices.items()
        return {name: p for part in self.parts for name, p in part.named_parameters_of_whole()}.items()

    def parameters(self):
        return [parameter for _, parameter in self.named_parameters()]

    def train(self, mode=True):
        for part in self.parts:
            part.train(mode)

    @contextlib.contextmanager
    def micro_batch(self, part, last):
        """Around forward and around backward of a micro-batch in `part`; the `last` of a step completes gradients."""
        if self.mesh.layout.shard > 1 and not self.one_copy:
            sharding.last_micro_batch(part.model, last, self.parallel.sharding)
        carries = isinstance(self.replica, DistributedDataParallel)
        with self.replica.no_sync() if carries and not last else contextlib.nullcontext():
            yield

    def step(self, batches, work, divisor):
        """Forward and backward of this rank's micro-batches; gradients are everybody's then. See `Runner.run`.

        Returns the losses, on ranks of the last stage. Collective.
        """
        losses = self.runner.run(batches, work, divisor)
        if self.one_copy:
            self.one_copy.add_up()
        if len(self.parts) * self.mesh.layout.pipeline > 1 and self.mesh.layout.shard == 1:
            data.add_up(self.parameters(), self.mesh.gradients, _TRAVELS_AS[self.parallel.reduce_dtype])
        held = dict(self.named_parameters()) if self.shared or self.sliced else {}
        data.add_up([held[name] for name in self.sliced if name in held], self.mesh["tensor"])
        for name in sorted(self.shared):  # in one order everywhere
            if held[name].grad is None:
                held[name].grad = torch.zeros_like(held[name])
            dist.all_reduce(sharding.local(held[name].grad), group=self.shared[name][1])
        return losses

    def ready(self):
        """Before weights are used: those that other ranks have updated are there."""
        if self.one_copy:
            self.one_copy.ready()

    def refill(self, source):
        """Weights from `source` (weights.Saved) instead of those that are there. No rank may be using them."""
        self.reshard()
        weights.refill(self, source)
        if self.one_copy:
            self.one_copy.changed()

    def reshard(self):
        """Every rank holds its shards alone again, as optimizer and checkpoints know them."""
        for part in self.parts:
            sharding.reshard(part.model)

    def places(self, piece, tensor):
        """Boxes of the whole tensor and of this rank's part of it, for a parameter or one of its moments."""
        start = sharding.first_row(tensor)
        rows = sharding.local(tensor).shape[0] if tensor.dim() else 0
        return piece.rows(start, start + rows)

    def boxes(self, piece, tensor):
        """(box of the whole tensor, what this rank has of it), for all boxes that it has."""
        mine = sharding.local(tensor)
        return [(outer, mine[inner]) for outer, inner in self.places(piece, tensor)]

    def copies(self, name, piece):
        """(how many ranks hold the same `piece` of the parameter `name`, or of a moment of it; the number of this one).

        (0, 0) where ranks of an earlier stage hold it too.
        """
        layout, place = self.mesh.layout, self.mesh.place
        if not self._first_holder(name):
            return 0, 0
        copies, mine = layout.replicate * layout.context, place["replicate"] * layout.context + place["context"]
        if piece.dim is None:
            copies, mine = copies * layout.tensor, mine * layout.tensor + place["tensor"]
        if not piece.shape:  # a number, which FSDP2 does not divide
            copies, mine = copies * layout.shard, mine * layout.shard + place["shard"]
        return copies, mine

    def _first_holder(self, name):
        """False where a rank of an earlier stage has the parameter too."""
        return name not in self.shared or self.shared[name][0][0] == self.mesh.place["pipeline"]

    @torch.no_grad()
    def clip_gradients(self, bound):
        """Scale gradients down to a 2-norm of `bound` over the whole model; returns the norm before, a float.

        Every element counts once, whoever holds it. Collective.
        """
        gradients = {n: sharding.local(p.grad) for n, p in self.named_parameters() if p.grad is not None}
        first = self.mesh.place["tensor"] == 0  # what is not cut is the same on all of the axis
        mine = [g for n, g in gradients.items() if self._first_holder(n) and (first or self.pieces[n].dim is not None)]
        # In pieces: over millions of numbers torch's fp32 sum is off by 1e-4, and by something else in each layout.
        pieces = [piece for gradient in mine for piece in gradient.flatten().split(_SUMMED_AT_ONCE)]
        norms = torch._foreach_norm(pieces) if pieces else []
        total = torch.stack([norm.double() for norm in norms]).square().sum() if norms else torch.zeros(())
        total = total.double().cpu()
        if self.divided:
            dist.all_reduce(total, group=self.mesh.replica)
        norm = float(total.sqrt())
        if bound and norm > bound:
            torch._foreach_mul_(list(gradients.values()), bound / (norm + 1e-6))
        return norm
