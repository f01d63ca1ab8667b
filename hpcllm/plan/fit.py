"""Does a step fit into the memory that is there? What `train.activation_checkpointing = "auto"` asks at the start."""

from collections import Counter
from pathlib import Path

import torch

from ..mpi import on_root
from . import cost, shapes_of
from .machines import GiB
from .search import USABLE

_CGROUPS = Path("/sys/fs/cgroup")


def checkpointing(config, parallel, layout, world, made):
    """(whether blocks should keep only what enters them, why: text for the log); the same on every rank. Collective.

    config: config.Config; parallel: its [parallel], "auto" decided; layout: mesh.Layout; world: mpi.World; made:
    transformers' configuration of the model. What was asked for with true or false is what it is; "auto" recomputes
    where the rank with the least room could not keep all activations, by `cost.memory`.
    """
    asked = config.train.activation_checkpointing
    if asked != "auto":
        return asked, "as asked for"
    room = USABLE * world.comm.allreduce(free(world), op=min)
    changed = {"train": config.train.model_copy(update={"activation_checkpointing": False}), "parallel": parallel}
    gpu = world.device.type != "cpu"

    def judge():
        try:
            shapes = shapes_of(config, made, gpu)
            work = cost.work(config.model_copy(update=changed), layout, world.local_size, pooled=not gpu)
            needed = cost.memory(shapes, work).total
        except Exception as error:  # of a family that cannot be counted without numbers; an estimate must not end a run
            return False, f"its need of memory is not known: {type(error).__name__}"
        what = f"a rank needs {needed / GiB:.2f} GiB with all of them kept, and may fill {room / GiB:.2f}"
        return needed > room, what

    return on_root(world.comm, judge)


def free(world):
    """Bytes of memory that this rank may still fill: its part of what its GPU, or its host, has left. Collective."""
    if world.device.type == "cpu":
        return _free_of_host() / world.local_size
    gpus = torch.get_device_module(world.device)
    identity = world.host, str(gpus.get_device_properties(world.device).uuid)
    sharing = Counter(world.comm.allgather(identity))[identity]
    return gpus.mem_get_info(world.device)[0] / sharing


def _free_of_host(meminfo="/proc/meminfo", cgroup="/proc/self/cgroup", groups=_CGROUPS):
    """Bytes that the kernel could give to processes of this job: of the host, and below the limits set on the job."""
    lines = dict(line.split(":", 1) for line in Path(meminfo).read_text().splitlines())
    left = [1024 * int(lines["MemAvailable"].split()[0])]
    for line in Path(cgroup).read_text().splitlines() if Path(cgroup).is_file() else ():
        number, kinds, place = line.split(":", 2)
        if number != "0" and "memory" not in kinds.split(","):
            continue
        top, limits, uses = groups, "memory.max", "memory.current"
        if number != "0":  # version 1
            top, limits, uses = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        # A limit may be set on any of the groups around the process.
        for folder in (top / place.lstrip("/"), *(top / place.lstrip("/")).parents):
            if folder == top.parent:
                break
            limit, used = _number(folder / limits), _number(folder / uses)
            if limit is not None and used is not None:
                left.append(limit - used + _cached(folder / "memory.stat"))
    return max(0, min(left))


def _number(path):
    """The number in a file of a control group; None where there is none, or no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _cached(path):
    """Bytes of files that a group has in memory, which it gives back when it needs room."""
    try:
        found = dict(line.split() for line in path.read_text().splitlines())
    except OSError:
        return 0
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))
