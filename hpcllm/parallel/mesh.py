"""Which rank does what: the ranks of a job as a product of axes, and a process group along each.

    data        ranks with different samples; split further into replicas of shards where `sharding` divides the model
    pipeline    ranks with different layers
    context     ranks with different parts of each sequence
    tensor      ranks with different parts of each layer; the fastest axis, so that those who talk most share a host

`Layout` is arithmetic and needs neither MPI nor torch; `build` makes the groups.
"""

import functools
import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..errors import UsageError

# Slowest first. data = replicate x shard: ranks with the same shard of the model, and with different ones.
AXES = ("replicate", "shard", "pipeline", "context", "tensor")
_built = itertools.count()


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis; their product is the size of the job."""

    replicate: int
    shard: int
    pipeline: int
    context: int
    tensor: int

    @property
    def data(self):
        return self.replicate * self.shard

    @property
    def size(self):
        return self.data * self.pipeline * self.context * self.tensor

    @property
    def sizes(self):
        return tuple(getattr(self, axis) for axis in AXES)

    def place(self, rank):
        """{axis: index} of `rank`, with "data" beside the two axes that make it up."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return {"data": found["replicate"] * self.shard + found["shard"], **found}

    def describe(self):
        """As "data 2 x tensor 2": the axes that divide anything."""
        named = [(axis, getattr(self, axis)) for axis in ("data", "pipeline", "context", "tensor")]
        return " x ".join(f"{axis} {size}" for axis, size in named if size > 1) or "one rank"


def layout(parallel, hosts):
    """The Layout of the run file's [parallel] section. Raises UsageError with the numbers.

    hosts: the name of each rank's host, in rank order.
    """
    size = len(hosts)
    model = parallel.tensor * parallel.pipeline * parallel.context
    if size % model:
        raise UsageError(
            f"parallel: tensor ({parallel.tensor}) x pipeline ({parallel.pipeline}) x context ({parallel.context}) = "
            f"{model} does not divide the {size} ranks of this job"
        )
    data = size // model
    shard = 1 if parallel.sharding in ("none", "auto") else data
    if parallel.sharding == "hybrid":
        shard = _within_host(hosts, model)
    return Layout(data // shard, shard, parallel.pipeline, parallel.context, parallel.tensor)


def _within_host(hosts, model):
    """How many data ranks shard the model between them when shards stay inside a host."""
    runs = [len(list(ranks)) for _, ranks in itertools.groupby(hosts)]
    per_host = set(runs)
    inside = min(per_host) // model
    if len(per_host) > 1 or inside == 0 or min(per_host) % model or len(runs) > len(set(hosts)):
        raise UsageError(
            f'parallel: sharding = "hybrid" keeps shards inside a host, but hosts hold '
            f"{', '.join(map(str, sorted(per_host)))} ranks in a row, and each of them needs the same multiple of "
            f"{model} (tensor x pipeline x context)"
        )
    return inside


def picture(made, hosts):
    """The ranks by host, and what each holds: text to look at.

    A line for each group of ranks that holds one copy of the model's shard; hosts: as for `layout`.
    """
    axes = [axis for axis in ("data", "pipeline", "context", "tensor") if getattr(made, axis) > 1]
    sharded = f", model sharded over {made.shard}" if made.shard > 1 else ""
    lines = [f"{made.size} ranks = {made.describe()}{sharded}"]
    rank = 0
    for host, ranks in itertools.groupby(hosts):
        count = len(list(ranks))
        lines.append(f"{host}")
        for row in range(rank, rank + count):
            place = made.place(row)
            what = "  ".join(f"{axis} {place[axis]}" for axis in axes)
            lines.append(f"  rank {row:<4} {what}".rstrip())
        rank += count
    crossing = [axis for axis in axes if _crosses(made, hosts, axis)]
    lines.append(f"between hosts: {', '.join(crossing) or 'nothing'}")
    return "\n".join(lines)


def _crosses(made, hosts, axis):
    """True where a group along `axis` has ranks on several hosts."""
    groups = {}
    for rank, host in enumerate(hosts):
        place = made.place(rank)
        rest = tuple(place[other] for other in AXES if other != axis and (axis != "data" or other not in AXES[:2]))
        groups.setdefault(rest, set()).add(host)
    return any(len(names) > 1 for names in groups.values())


@dataclass(frozen=True)
class Mesh:
    """The groups that this rank belongs to.

    layout, place: see `Layout`. mesh["data"] and the other axes give process groups, "backwards" that of the pipeline
    once more; `replica` is the group of the
    ranks that hold one copy of the model between them; `gradients` that of the data and context axes, whose ranks have
    the same weights and add up what these get; `losses` that of the data, pipeline and context axes, over which a loss
    that the last stages know of their tokens adds up; `shards`: torch's DeviceMesh of the ranks that divide the same
    weights, copies x shards, or shards alone where there is one copy; None where nobody divides.
    """

    layout: Layout
    place: dict
    groups: dict
    replica: Any
    gradients: Any
    losses: Any
    shards: Any

    def __getitem__(self, axis):
        return self.groups[axis]

    @property
    def data(self):
        """rank, size and group of the data axis, for code that takes a World and shares out samples."""
        return SimpleNamespace(rank=self.place["data"], size=self.layout.data, group=self.groups["data"])


def replicas(world=None):
    """The Mesh of ranks that hold the whole model each; without a world (mpi.World), of one rank by itself."""
    size, rank, group = (world.size, world.rank, world.group) if world else (1, 0, None)
    made = Layout(size, 1, 1, 1, 1)
    groups = dict.fromkeys((*AXES, "data")) | {"replicate": group, "data": group}
    return Mesh(made, made.place(rank), groups, None if size > 1 else group, group, group, None)


def build(made, world):
    """Mesh of a Layout. Collective over `world`."""
    if made.size == 1:
        return replicas(world)
    import torch
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    devices = init_device_mesh(world.device.type, made.sizes, mesh_dim_names=AXES)
    groups = {axis: devices[axis].get_group() for axis in AXES}

    @functools.cache
    def over(*axes):
        """The group of a product of axes; those that divide nothing are left out, so that no group is made twice."""
        axes = tuple(axis for axis in axes if getattr(made, axis) > 1) or axes[:1]
        return groups[axes[0]] if len(axes) == 1 else devices[axes]._flatten("_".join(axes)).get_group()

    if made.pipeline > 1:
        # What goes to lower ranks has a group of its own: NCCL carries one message at a time between two ranks of one.
        ranks = torch.distributed.get_process_group_ranks(groups["pipeline"])
        groups["backwards"] = torch.distributed.new_group(ranks, use_local_synchronization=True)
    groups["data"], copies = over("replicate", "shard"), over("replicate", "context")
    place, shards = made.place(world.rank), None
    if made.shard > 1:
        alike = torch.arange(made.size).view(made.sizes)[:, :, place["pipeline"], :, place["tensor"]]
        alike, both = alike.movedim(1, -1).flatten(0, 1), [copies, groups["shard"]]
        # DTensor remembers, by sizes and names, where on such a mesh this rank is: after a death it may be elsewhere.
        across = f"shard{next(_built)}"
        shards = DeviceMesh.from_group(both, world.device.type, alike, mesh_dim_names=("copies", across))
        shards = shards if len(alike) > 1 else shards[across]
    replica = over("shard", "pipeline", "tensor")
    gradients, losses = over("replicate", "shard", "context"), over("replicate", "shard", "pipeline", "context")
    return Mesh(made, place, groups, replica, gradients, losses, shards)
