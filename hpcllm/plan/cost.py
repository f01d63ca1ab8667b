"""What a layout costs: bytes on the fullest rank, bytes on each axis, seconds of a step. Formulas; imports no torch.

Seconds are a sum of what takes turns, each from bytes or operations over a rate (a roofline, added up and not the
larger of the two, for kernels that compute and kernels that move take turns as well):

    products     operations / (share x peak); forward, twice that backward, forward once more under checkpointing
    traffic      bytes that operations read and write / (MEMORY x bandwidth); weights once a micro-batch
    tensor       all-reduces of activations, 2 (t-1)/t of their bytes (Shoeybi et al. 2019, arXiv 1909.08053); with
                 slices of sequences gathers and scatters, (t-1)/t (Korthikanti et al. 2022, arXiv 2205.05198)
    context      keys and values of all parts of a sequence, their gradients back (arXiv 2407.21783, 3.3.2)
    pipeline     activations from stage to stage (Narayanan et al. 2021, arXiv 2104.04473)
    bubble       (p-1) micro-batches; interleaved (p-1)/v (same paper), zero bubble a third (arXiv 2401.10241)
    data         gradients and weights, as docs/layouts.md counts them (Rajbhandari et al. 2020, arXiv 1910.02054),
                 where they take longer than OVERLAP of the computing that goes on beside them
    optimizer    bytes of weights, gradients and state / (MEMORY x bandwidth)

Fitted, once for all, on the ten rows of arXiv 2104.04473's table 1 (`python -m benchmarks.plan` says how well):
machines.Machine.products of the A100 and LINK. Assumed, from usual experience: MEMORY, OVERLAP, LATENCY_S, CALL_S.
"""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass

from ..parallel.balance import balance
from .shapes import Part

LINK = 0.65
"""Part of a link's bandwidth that collectives reach. Fitted."""
MEMORY = 0.85
"""Part of the memory's bandwidth that kernels reach."""
OVERLAP = 0.5
"""Part of the time of forward or backward behind which the data axis can hide."""
LATENCY_S = 10e-6
"""Of a collective, for each doubling of its ranks."""
CALL_S = 6e-6
"""To tell a GPU one operation; where operations are small this is what takes the time."""
LOGITS_BYTES = 8
"""A logit at the worst moment: itself, which becomes its gradient, and its probability in fp32."""
LOGITS_AT_ONCE = 1 << 28
"""Logits that exist at once, on a GPU; a sixteenth of them on a CPU (parallel.vocabulary)."""
LOGITS_TRAFFIC = 16
"""A logit in forward: read, written as fp32, read again, the log of the softmax written."""


@dataclass(frozen=True)
class Work:
    """How ranks share a step.

    layout: mesh.Layout; node: ranks a node; sharding, schedule, stages_per_rank, checkpointing, precision, sequence: as
    in the run file; micro_batch: sequences; micro_batches: a step and data-parallel rank; weight, gradient, state:
    bytes a parameter of what is held (state: by the optimizer); travelling: bytes of a gradient on its way; balanced:
    stages get blocks so that the heaviest is as light as can be, otherwise equally many; pooled: what shards travel in
    is kept from one use to the next, beside all else, as hpcllm.mpi does with CPU memory that ranks of a host share.
    """

    layout: object
    node: int
    micro_batch: int
    micro_batches: int = 1
    sharding: str = "none"
    checkpointing: bool = False
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    precision: str = "bf16"
    weight: int = 4
    gradient: int = 4
    state: int = 8
    travelling: int = 4
    balanced: bool = True
    pooled: bool = False
    sequence: bool = False


def work(config, layout, node, pooled=False):
    """The Work of a run file on a Layout of `node` ranks a node."""
    parallel, train = config.parallel, config.train
    state = 8 if train.optimizer == "adamw" else 4 * (train.sgd_momentum > 0)
    return Work(
        layout,
        node,
        train.micro_batch_size,
        train.accumulation(layout.data),
        parallel.sharding,
        train.activation_checkpointing,
        parallel.pipeline_schedule,
        parallel.stages_per_rank,
        train.precision,
        state=state,
        travelling={"fp32": 4, "bf16": 2}[parallel.reduce_dtype],
        pooled=pooled,
        sequence=parallel.sequence,
    )


# --- stages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What a rank of the pipeline axis has. blocks: sum; block: the largest; count: of blocks; outside: first, last."""

    blocks: Part
    block: Part
    count: int
    outside: Part
    logits: float

    def held(self, ranks):
        """As `Part.held`."""
        return self.blocks.held(ranks) + self.outside.held(ranks)

    def trained(self, ranks):
        """As `Part.trained`."""
        return self.blocks.trained(ranks) + self.outside.trained(ranks)


@functools.lru_cache(maxsize=256)
def stages(shapes, ranks, chunks=1, balanced=True):
    """The Stage of each of `ranks` pipeline ranks that has `chunks` pieces of the model, dealt out in turn."""
    if ranks == 1:
        once = Part(parameters=-shapes.tied, cut=-shapes.tied)
        return (_stage(shapes.blocks, shapes.first + shapes.last + once, shapes.logits),)
    if balanced:
        costs = [(block.flops, block.parameters) for block in shapes.blocks]
        for at, outside in ((0, shapes.first), (-1, shapes.last)):
            flops, parameters = costs[at]
            costs[at] = flops + outside.flops, parameters + outside.parameters
        bounds = balance(costs, ranks * chunks)
    else:
        even, more = divmod(len(shapes.blocks), ranks * chunks)
        ends = list(itertools.accumulate(even + (number < more) for number in range(ranks * chunks)))
        bounds = list(itertools.pairwise([0, *ends]))
    made = []
    for rank in range(ranks):
        mine = [block for start, stop in bounds[rank::ranks] for block in shapes.blocks[start:stop]]
        outside = {0: shapes.first, ranks - 1: shapes.last}.get(rank, Part())
        made.append(_stage(mine, outside, shapes.logits if rank == ranks - 1 else 0))
    return tuple(made)


def _stage(blocks, outside, logits):
    largest = max(blocks, key=lambda block: (block.parameters, block.saved + block.saved_cut))
    return Stage(functools.reduce(Part.__add__, blocks), largest, len(blocks), outside, logits)


# --- memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its fullest moment.

    weights: whole ones, shards and gathered ones; gradients; optimizer: its state; activations: what forward keeps for
    backward, copies of weights in bf16 among them; logits: with what the loss makes of them.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self):
        return sum(dataclasses.astuple(self))


def memory(shapes, work, rank=None):
    """Memory of the pipeline rank `rank`, by default of the one that needs most.

    Parameters as docs/layouts.md counts them, activations as `count` does (the sum of Korthikanti et al. 2022, arXiv
    2205.05198, in the precisions that hpcllm computes in), for as many micro-batches as are under way at once. What
    libraries, caches and a fragmented heap take comes on top.
    """
    held = stages(shapes, work.layout.pipeline, work.stages_per_rank, work.balanced)
    numbers = range(len(held)) if rank is None else [rank]
    first_of = {held[number]: number for number in reversed(numbers)}  # of like ones the first has most under way
    return max((_memory(shapes, stage, work, number) for stage, number in first_of.items()), key=lambda one: one.total)


def under_way(work, rank):
    """Micro-batches whose activations the pipeline rank `rank` holds at once, in all its stages (see schedules.py)."""
    ranks = work.layout.pipeline
    if ranks == 1:
        return 1
    many = {
        "1f1b": ranks - rank,
        "zero_bubble": ranks + 2,
        "interleaved": ranks - rank + (ranks - 1) / work.stages_per_rank,
    }[work.schedule]
    return min(many, work.micro_batches)


def _memory(shapes, stage, work, rank):
    tensor, shard = work.layout.tensor, work.layout.shard
    held, trained = stage.held(tensor), stage.trained(tensor)
    root, block = work.weight * stage.outside.held(tensor), work.weight * stage.block.held(tensor)
    weights, gradients, state = work.weight * held, work.gradient * trained, work.state * trained
    activations = _activations(stage, work, rank)
    at_once = LOGITS_AT_ONCE // (16 if work.pooled else 1)
    logits = LOGITS_BYTES * min(stage.logits * work.micro_batch / tensor / work.layout.context, at_once)
    before = work.micro_batches > 1  # gradients of earlier micro-batches
    if work.sharding == "host":
        # Weights, and their copies in bf16, once for all ranks of a node; each has whole gradients of its own.
        neighbours = min(work.node, work.layout.data)
        copies = stage.blocks.weights(tensor) + stage.outside.weights(tensor)
        activations -= copies * (1 - 1 / neighbours)
        return Memory(weights / neighbours, gradients, state / work.layout.data, activations, logits)
    if shard == 1 and work.layout.pipeline == 1:
        # DDP's buckets stay from step to step. What micro-batches before the last one give lies beside them: gradients
        # are views of the buckets only from the time that they are summed to that at which they are set to None.
        return Memory(weights, gradients * (1 + before), state, activations, logits)
    if shard == 1:
        # There is no DDP in a pipeline: gradients come with the first backward pass, which frees activations.
        many = under_way(work, rank)
        full = Memory(weights, gradients * (work.micro_batches > many), state, activations, logits)
        freed = Memory(weights, gradients, state, activations * (many - 1) / many, 0)
        return max(full, freed, key=lambda one: one.total)
    whole = work.sharding in ("optimizer", "gradients")
    kept = (gradients if work.sharding == "optimizer" else gradients / shard) * before
    # Whole gradients that are there are added to in place; a block's are copied to be sent.
    new = block if work.sharding == "optimizer" and before else root + 2 * block
    own = weights / shard
    if work.pooled and work.sharding != "optimizer":
        activations += root + 2 * block
    moments = (  # the loss; the first block to go backward; what is outside of the blocks, last
        Memory(own + (weights if whole else root + block), kept, state / shard, activations, logits),
        Memory(own + (weights if whole else root + 2 * block), kept + new, state / shard, activations, 0),
        Memory(own + (weights if whole else root + block), gradients / shard + 2 * root, state / shard, 0, 0),
    )
    return max(moments, key=lambda one: one.total)


def _activations(stage, work, rank):
    tensor, width, many = work.layout.tensor, work.micro_batch, under_way(work, rank)
    parts = work.layout.context
    outside = width * stage.outside.kept(tensor, parts) + stage.outside.weights(tensor)
    if work.checkpointing:
        again = width * stage.block.kept(tensor, parts, work.sequence, again=True) + stage.block.weights(tensor)
        entering = stage.blocks.entering / parts / (tensor if work.sequence else 1)
        return many * (width * entering + outside) + again
    kept = width * stage.blocks.kept(tensor, parts, work.sequence)
    return many * (kept + stage.blocks.weights(tensor) + outside)


# --- time --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """Seconds of a step; their sum is the step."""

    products: float
    traffic: float
    calls: float
    tensor: float
    context: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float

    @property
    def step(self):
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Volume:
    """Bytes that a rank sends along each axis in a step."""

    data: float
    tensor: float
    context: float
    pipeline: float


def bandwidth(machine, work, *axes):
    """Bytes/s of each rank in a ring over a product of axes; a node's adapters are shared by its rings.

    axes: (size, stride) of each: its ranks, and how far apart they are.
    """
    size = math.prod(size for size, _ in axes)
    near = math.prod(max(1, min(size, work.node // stride)) for size, stride in axes)
    return LINK * (machine.link if size <= near else min(machine.link, machine.network * near))


def time(shapes, machine, work):
    """(Time, Volume) of a step on `machine`, of the pipeline rank that takes longest."""
    held = stages(shapes, work.layout.pipeline, work.stages_per_rank, work.balanced)
    costs = [_micro_batch(shapes, stage, machine, work) for stage in dict.fromkeys(held)]
    forward_backward, sent = max(costs, key=lambda one: sum(one[0]))
    # Other stages wait for the slowest; the data axis is that of the stage with most parameters.
    count, ranks = work.micro_batches, work.layout.pipeline
    idle = (ranks - 1) / {"1f1b": 1, "interleaved": work.stages_per_rank, "zero_bubble": 3}[work.schedule]
    products, traffic, calls, tensor, context, pipeline = (count * seconds for seconds in forward_backward)
    bubble = idle * sum(forward_backward)
    parameters, trained = max((one.held(work.layout.tensor), one.trained(work.layout.tensor)) for one in held)
    data, data_bytes = _data(machine, work, parameters, trained, sum(forward_backward[:3]))
    divided = work.layout.shard
    adjust = trained / divided * (3 * work.weight + 2 * work.state + 4 * work.gradient)
    adjust /= MEMORY * machine.memory_bandwidth
    spent = Time(products, traffic, calls, tensor, context, pipeline, bubble, data, adjust)
    return spent, Volume(data_bytes, *(count * each for each in sent))


def _micro_batch(shapes, stage, machine, work):
    """Of one micro-batch, forward and backward: ((products, traffic, calls, tensor, context, pipeline) seconds, bytes
    sent along the last three)."""
    tensor, parts = work.layout.tensor, work.layout.context
    width = work.micro_batch / parts  # sequences that a rank has tokens for
    passes = 4 if work.checkpointing else 3
    inner, outer = stage.blocks, stage.outside
    operations = width * (passes * inner.flops + 3 * outer.flops) / tensor
    products = operations / (machine.products * machine.peak(work.precision))
    moved = sum(
        many * (width * part.moved(tensor, sliced) + _weights_traffic(part, work))
        for many, part, sliced in ((passes, inner, work.sequence), (3, outer, False))
    )
    moved += 3 * LOGITS_TRAFFIC * width * stage.logits / tensor
    traffic = moved / (MEMORY * machine.memory_bandwidth)
    calls = max(0.0, CALL_S * (passes * inner.calls + 3 * outer.calls) - products - traffic)
    met = met_bytes = 0.0
    if tensor > 1:
        summed = (passes - 2) * inner.sums + inner.sums_back
        meetings = inner.meetings * (passes - 2 + 1) / 2 + outer.meetings
        if work.sequence:
            # A sum is a gather and a scatter; what is not computed again is gathered again. And the ends of the blocks.
            gathers = passes - 1 + (not work.checkpointing)
            ends = (2 if work.layout.pipeline == 1 else 4) * work.stages_per_rank
            summed = ((passes - 1) * inner.sums + gathers * inner.gathered + ends * shapes.boundary) / 2
            meetings = inner.meetings * (passes - 1 + gathers) / 2 + ends + outer.meetings
        met_bytes = 2 * (tensor - 1) / tensor * width * (summed + outer.sums + outer.sums_back)
        met = met_bytes / bandwidth(machine, work, (tensor, 1)) + meetings * LATENCY_S * math.log2(tensor)
    shared = shared_bytes = 0.0
    if parts > 1:
        times = passes - 2 + 1  # each forward pass, and the gradients
        shared_bytes = times * (parts - 1) * width * inner.keys / tensor
        shared = shared_bytes / bandwidth(machine, work, (parts, tensor))
        shared += times * inner.attentions * LATENCY_S * math.log2(parts)
    passed = passed_bytes = 0.0
    if work.layout.pipeline > 1:
        passed_bytes = 2 * width * shapes.boundary * work.stages_per_rank / (tensor if work.sequence else 1)
        near = work.layout.pipeline * parts * tensor <= work.node
        rate = machine.link if near else machine.network * max(1, work.node / tensor)
        passed = passed_bytes / (LINK * min(rate, machine.link)) + 2 * work.stages_per_rank * LATENCY_S
    return (products, traffic, calls, met, shared, passed), (met_bytes, shared_bytes, passed_bytes)


def _weights_traffic(part, work):
    """Bytes of weights that a forward pass reads: as they are, or to make a copy in bf16, and that copy."""
    if part.copies + part.copies_cut:
        return 4 * part.weights(work.layout.tensor)
    return work.weight * part.held(work.layout.tensor)


def _data(machine, work, parameters, trained, computing):
    """(seconds that are not hidden, bytes sent) along the data axis in a step. computing: of one micro-batch."""
    made, many = work.layout, work.micro_batches
    stride = made.pipeline * made.context * made.tensor
    weights, gradients = work.weight * parameters, work.travelling * trained
    gathers, scatters, beside = {
        "none": (0, 0, 2 / 3),
        "optimizer": (1, 1, 1),
        "gradients": (many, many, many),
        "full": (2 * many, many, many),
        "hybrid": (2 * many, many, many),
    }[work.sharding]
    if made.pipeline > 1 and made.shard == 1:
        beside = 0  # summed after the last backward pass
    seconds = sent = 0.0
    if made.shard > 1:
        part = (made.shard - 1) / made.shard
        sent += part * (gathers * weights + scatters * gradients)
        seconds += sent / bandwidth(machine, work, (made.shard, stride))
        seconds += (gathers + scatters) * LATENCY_S * math.log2(made.shard)
    copies = made.replicate * made.context
    if copies > 1:
        times = 1 if made.shard == 1 else scatters
        summed = times * 2 * (copies - 1) / copies * gradients / made.shard
        sent += summed
        axes = (made.replicate, stride * made.shard), (made.context, made.tensor)
        seconds += summed / bandwidth(machine, work, *axes)
        seconds += times * LATENCY_S * math.log2(copies)
    return max(0.0, seconds - OVERLAP * beside * computing), sent
