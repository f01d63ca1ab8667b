"""All layouts that a job of some nodes allows, each with what it costs, and why the others are refused."""

import itertools
import re
from collections import Counter
from dataclasses import dataclass

from .. import config as run_file
from ..errors import UsageError
from ..parallel import apply, context, mesh
from . import cost

USABLE = 0.9
"""Part of a GPU's memory that a run may fill: drivers, libraries' buffers and a fragmented heap need the rest."""
SAME = 1.05
"""Times within this ratio of the fastest count as equal, for the model is no surer: the simplest comes first."""

PART = 1024
"""Tokens of a sequence that a rank has at least: where there are fewer, other axes divide as much and talk less."""

SHARDINGS = ("none", "optimizer", "gradients", "full", "hybrid")


@dataclass(frozen=True)
class Option:
    """A run file that would run. config: config.Config; work: cost.Work; memory, time, volume: see cost."""

    config: object
    work: cost.Work
    memory: cost.Memory
    time: cost.Time
    volume: cost.Volume

    @property
    def place(self):
        """Options that differ in nothing but micro-batches, checkpointing, slices and the schedule share this."""
        made = self.work.layout
        return made.data, made.tensor, made.context, made.pipeline, self.work.sharding

    @property
    def tokens_per_s(self):
        return self.config.train.global_batch_size * self.config.train.sequence_length / self.time.step

    @property
    def simplicity(self):
        """Fewer axes, less sharding, no checkpointing, no slices, then larger micro-batches come first."""
        made, kind = self.work.layout, self.work
        axes = sum(size > 1 for size in (made.tensor, made.context, made.pipeline))
        sharding, schedule = SHARDINGS.index(kind.sharding), kind.schedule != "1f1b"
        return axes, sharding, kind.checkpointing, kind.sequence, schedule, -kind.micro_batch


@dataclass(frozen=True)
class Found:
    """options: best first; refused: Counter of reasons; examples: reason -> a sentence with its numbers; least: the
    smallest Memory that does not fit, or None."""

    options: list
    refused: Counter
    examples: dict
    least: object


def search(config, model_config, shapes, machine, nodes, per_node):
    """Found for a run file on `nodes` nodes of `per_node` of `machine` (machines.Machine).

    model_config: transformers' configuration; shapes: what `count.count` found of its model.
    """
    hosts = [f"node {node}" for node in range(nodes) for _ in range(per_node)]
    room = USABLE * machine.memory
    options, refused, examples, least = [], Counter(), {}, None

    def refuse(reason):
        kind = re.sub(r'\d+|"[^"]*"', "#", str(reason))  # alike but for numbers and words of the user
        refused[kind] += 1
        examples.setdefault(kind, str(reason))

    parts = _parts(model_config, shapes.tokens)
    for parallel in _sections(len(hosts), nodes, len(shapes.blocks), parts):
        try:
            first = _with(config, parallel, {})
            layout = mesh.layout(first.parallel, hosts)
            apply.check(model_config, layout, first.parallel.stages_per_rank, first.parallel.sequence)
        except UsageError as error:
            refuse(error)
            continue
        if parallel["sharding"] == "hybrid" and layout.shard == 1:
            continue  # nothing is sharded: as "none"
        for width, checkpointing in itertools.product(_widths(config, layout.data), (False, True)):
            changed = {"micro_batch_size": width, "activation_checkpointing": checkpointing}
            made = _with(config, parallel, changed)
            work = cost.work(made, layout, per_node, machine.name == "cpu")
            if work.micro_batches < layout.pipeline:
                refuse("pipeline: fewer micro-batches than stages, which would be idle most of the time")
                continue
            memory = cost.memory(shapes, work)
            if memory.total > room:
                refuse("memory")
                least = memory if least is None or memory.total < least.total else least
                continue
            options.append(Option(made, work, memory, *cost.time(shapes, machine, work)))
        if config.train.global_batch_size % layout.data:
            batch = config.train.global_batch_size
            refuse(f"train: global_batch_size ({batch}) is not divisible by {layout.data} data-parallel ranks")
    return Found(ordered(options), refused, examples, least)


def ordered(options):
    """Best first: the simplest of those that are as good as the fastest, then by time."""
    fastest = min((option.time.step for option in options), default=0.0)

    def key(option):
        equal = option.time.step <= SAME * fastest
        return not equal, option.simplicity if equal else (), option.time.step

    return sorted(options, key=key)


def best_of_each_place(options):
    """Of `options`, best first, the best of each layout and sharding."""
    kept = {}
    for option in options:
        kept.setdefault(option.place, option)
    return list(kept.values())


def _parts(model_config, tokens):
    """Ranks that may share a sequence: powers of two, 1 alone where sequences are short or the model is refused."""
    try:
        context.check(model_config)
    except UsageError:
        return [1]
    return [1 << power for power in range(max(1, tokens // PART).bit_length()) if tokens % (2 << power) == 0] or [1]


def _sections(size, nodes, blocks, parts):
    """Values for [parallel], defaults left out where they may be."""
    for tensor, shared in itertools.product(_divisors(size), parts):
        for pipeline in _divisors(size // tensor):
            data, rest = divmod(size // tensor // pipeline, shared)
            if pipeline > blocks or rest:
                continue
            kinds = [kind for kind in SHARDINGS if kind == "none" or data > 1]
            kinds, slices = kinds if nodes > 1 else kinds[:4], (False, True) if tensor > 1 else (False,)
            axes = {"tensor": tensor, "pipeline": pipeline, "context": shared}
            for sharding, sequence, how in itertools.product(kinds, slices, _schedules(pipeline, blocks)):
                yield {**axes, "sequence": sequence, "sharding": sharding, **how}


def _schedules(pipeline, blocks):
    if pipeline == 1:
        return [{}]
    several = [{"pipeline_schedule": "interleaved", "stages_per_rank": count}
               for count in (2, 4) if pipeline * count <= blocks]  # fmt: skip
    return [{}, *several, {"pipeline_schedule": "zero_bubble"}]


def _widths(config, data):
    """Micro-batch sizes that the global batch allows on `data` data-parallel ranks: powers of two."""
    share, rest = divmod(config.train.global_batch_size, data)
    if rest:
        return []
    return [1 << power for power in range(share.bit_length()) if share % (1 << power) == 0]


def _divisors(number):
    return [count for count in range(1, number + 1) if number % count == 0]


def _with(config, parallel, train):
    """`config` with other values, checked as a run file is."""
    values = config.model_dump(exclude_none=True)
    keep = {key: values["parallel"][key] for key in ("backend", "reduce_dtype")}
    return run_file.load(values | {"parallel": keep | parallel, "train": values["train"] | train})
