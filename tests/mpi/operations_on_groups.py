"""The operations of torch.distributed that have no dtype to vary: groups, meshes, objects, barriers. Not a test.

As in `operations`, each is performed once and returns pairs of what it gave and what it should have given.
"""

import datetime

import torch
import torch.distributed as dist
from operations import Operation
from torch.distributed.device_mesh import init_device_mesh


def _members(group):
    """The ranks that an all_reduce over `group` adds up, each seen as one bit."""
    tensor = torch.tensor([1 << dist.get_rank()])
    dist.all_reduce(tensor, group=group)
    return [rank for rank in range(dist.get_world_size()) if tensor.item() >> rank & 1]


def barrier(t):
    t.done(dist.barrier(async_op=t.asynchronous))
    return []


def monitored_barrier(t):
    dist.monitored_barrier(timeout=datetime.timedelta(seconds=60))
    return []


def _object(rank):
    return {"rank": rank, "text": "x" * (1 + 100 * rank)}


def all_gather_object(t):
    everyone = [None] * t.size
    dist.all_gather_object(everyone, _object(t.rank))
    return [(everyone, [_object(rank) for rank in t.ranks])]


def gather_object(t):
    everyone = [None] * t.size if t.rank == t.size - 1 else None
    dist.gather_object(_object(t.rank), everyone, dst=t.size - 1)
    return [(everyone, [_object(rank) for rank in t.ranks] if t.rank == t.size - 1 else None)]


def broadcast_object_list(t):
    objects = [_object(t.rank), t.rank]
    dist.broadcast_object_list(objects, src=t.size - 1)
    return [(objects, [_object(t.size - 1), t.size - 1])]


def scatter_object_list(t):
    received = [None]
    dist.scatter_object_list(received, [_object(rank) for rank in t.ranks] if t.rank == 0 else None, src=0)
    return [(received, [_object(t.rank)])]


def send_object_list_recv_object_list(t):
    received = [None, None]
    if t.rank == 0:
        dist.send_object_list([_object(t.rank), t.rank], t.right)
    dist.recv_object_list(received, t.left)
    if t.rank > 0:
        dist.send_object_list([_object(t.rank), t.rank], t.right)
    return [(received, [_object(t.left), t.left])]


def new_group(t):
    pairs = []
    for ranks in (list(t.ranks), list(t.ranks)[1:], [t.size - 1, 0]):
        group = dist.new_group(ranks)
        if t.rank in ranks:
            pairs += [(_members(group), sorted(ranks)), (dist.get_rank(group), sorted(ranks).index(t.rank))]
            dist.destroy_process_group(group)
        else:
            pairs.append((group, dist.GroupMember.NON_GROUP_MEMBER))
    return pairs


def new_group_use_local_synchronization(t):
    ranks = [0, t.size - 1]
    if t.rank not in ranks:
        return []
    return [(_members(dist.new_group(ranks, use_local_synchronization=True)), ranks)]


def new_subgroups(t):
    halves = 2 if t.size % 2 == 0 else t.size
    group, _ = dist.new_subgroups(group_size=halves)
    first = t.rank // halves * halves
    return [(_members(group), list(range(first, first + halves)))]


def new_subgroups_by_enumeration(t):
    group, _ = dist.new_subgroups_by_enumeration([list(t.ranks)[:1], list(t.ranks)[1:]])
    return [(_members(group), [0] if t.rank == 0 else list(t.ranks)[1:])]


def split_group(t):
    group = dist.split_group(split_ranks=[list(t.ranks)[:1], list(t.ranks)[1:]])
    return [(_members(group), [0] if t.rank == 0 else list(t.ranks)[1:])]


def split_group_of_a_group(t):
    ranks = list(t.ranks)[1:]
    group = dist.group.WORLD.split_group(ranks, group_name=f"split of {t.size}", group_desc="split")
    return [(group, None)] if t.rank == 0 else [(group.size(), len(ranks)), (group.rank(), t.rank - 1)]


def device_mesh(t):
    columns = 2 if t.size % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (t.size // columns, columns), mesh_dim_names=("row", "column"))
    row, column = divmod(t.rank, columns)
    return [
        (_members(mesh["column"].get_group()), [row * columns + c for c in range(columns)]),
        (_members(mesh["row"].get_group()), list(range(column, t.size, columns))),
        (_members(mesh["row", "column"]._flatten("both").get_group()), list(t.ranks)),
    ]


def get_future(t):
    work = dist.all_reduce(torch.ones(3), async_op=True)
    return [(work.get_future().then(lambda future: future.value()[0] * 2).wait().tolist(), [2.0 * t.size] * 3)]


def _named(attempt, name=None, modes=(False,), answer="right"):
    return Operation(name or attempt.__name__, attempt, dtypes=(None,), modes=modes, answer=lambda dtype: answer)


OPERATIONS_ON_GROUPS = [
    _named(barrier, modes=(False, True)),
    _named(monitored_barrier, answer="torch"),  # by the name of the backend: only "gloo" may
    _named(all_gather_object),
    _named(gather_object),
    _named(broadcast_object_list),
    _named(scatter_object_list),
    _named(send_object_list_recv_object_list, "send_object_list, recv_object_list"),
    _named(new_group),
    _named(new_group_use_local_synchronization, "new_group(use_local_synchronization=True)"),
    _named(new_subgroups),
    _named(new_subgroups_by_enumeration),
    _named(split_group, answer="torch"),  # only where there is a GPU
    _named(split_group_of_a_group, "ProcessGroup.split_group"),
    _named(device_mesh, "init_device_mesh, its parts and flattened"),
    _named(get_future, "Work.get_future, then", modes=(True,)),
]
