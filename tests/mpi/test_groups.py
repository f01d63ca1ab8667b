"""Groups of ranks: parts of the world, overlapping ones, meshes, and starting torch.distributed a second time."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import hpcllm.mpi
from hpcllm.mpi import process_group, work

pytestmark = pytest.mark.mpi()


def total(world, group=None):
    tensor = torch.tensor([1 << world.rank])
    dist.all_reduce(tensor, group=group)
    return tensor.item()


def test_every_set_of_ranks_can_be_a_group(world):
    for n in range(1, world.size + 1):
        for ranks in itertools.combinations(range(world.size), n):
            group = dist.new_group(list(ranks))
            if world.rank in ranks:
                assert dist.get_process_group_ranks(group) == list(ranks)
                assert dist.get_rank(group) == ranks.index(world.rank)
                assert total(world, group) == sum(1 << rank for rank in ranks)
                tensor = torch.tensor([world.rank])
                dist.broadcast(tensor, src=ranks[-1], group=group)
                assert tensor.item() == ranks[-1]
                dist.barrier(group)
                dist.destroy_process_group(group)
            else:
                assert group == dist.GroupMember.NON_GROUP_MEMBER


def test_groups_that_their_members_make_alone(world):
    if world.rank < 2:
        ranks = list(range(min(2, world.size)))
        group = dist.new_group(ranks, use_local_synchronization=True)
        assert total(world, group) == sum(1 << rank for rank in ranks)


def test_ranks_given_in_another_order_are_one_group_with_ranks_of_its_own(world):
    group = dist.new_group(list(reversed(range(world.size))))
    ranks = dist.get_process_group_ranks(group)
    gathered = [torch.zeros(1, dtype=torch.int64) for _ in ranks]
    dist.all_gather(gathered, torch.tensor([world.rank]), group=group)
    assert [tensor.item() for tensor in gathered] == ranks


def test_messages_of_different_groups_do_not_meet(world):
    one, two = dist.new_group(), dist.new_group()
    peer = (world.rank + 1) % world.size
    if peer != world.rank:
        sends = [dist.isend(torch.tensor([number]), peer, group=group) for number, group in ((1, one), (2, two))]
        for number, group in ((2, two), (1, one)):
            received = torch.zeros(1, dtype=torch.int64)
            dist.recv(received, (world.rank - 1) % world.size, group=group)
            assert received.item() == number
        for work in sends:
            work.wait()


@pytest.mark.mpi(min_size=3)
def test_point_to_point_in_a_group_is_in_ranks_of_the_world(world):
    ranks = [0, world.size - 1]
    group = dist.new_group(ranks)
    received = torch.zeros(1, dtype=torch.int64)
    if world.rank == 0:
        assert dist.recv(received, group=group) == world.size - 1
        assert received.item() == 5
    elif world.rank == world.size - 1:
        dist.send(torch.tensor([5]), 0, group=group)


@pytest.mark.mpi(min_size=2)
def test_subgroups(world):
    if world.size % 2 == 0:
        group, _ = dist.new_subgroups(2)
        first = world.rank // 2 * 2
        assert total(world, group) == 3 << first


def test_meshes_of_every_shape(world):
    for rows in (n for n in range(1, world.size + 1) if world.size % n == 0):
        columns = world.size // rows
        mesh = init_device_mesh("cpu", (rows, columns), mesh_dim_names=("row", "column"))
        row, column = divmod(world.rank, columns)
        assert mesh.get_coordinate() == (row, column) or mesh.get_coordinate() == [row, column]
        assert total(world, mesh["column"].get_group()) == sum(1 << (row * columns + c) for c in range(columns))
        assert total(world, mesh.get_group("row")) == sum(1 << (r * columns + column) for r in range(rows))
    assert total(world, init_device_mesh("cpu", (world.size,)).get_group()) == (1 << world.size) - 1


@pytest.mark.mpi(min_size=4, max_size=4)
def test_a_mesh_of_three_dims_and_its_flattened_parts(world):
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("a", "b", "c"))
    assert total(world, mesh["a", "b"]._flatten("ab").get_group()) == (0b0101 << world.rank % 2)
    assert total(world, mesh["c"].get_group()) == (0b11 << world.rank // 2 * 2)


@pytest.mark.mpi(min_size=2)
def test_a_group_is_split_where_torch_sees_an_accelerator(world, monkeypatch):
    # torch.distributed.split_group asks for a GPU before it asks the backend; no tensor goes there.
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: gpu)
    halves = [list(range(0, world.size, 2)), list(range(1, world.size, 2))]
    world.group.bound_device_id = gpu
    try:
        part = dist.split_group(split_ranks=halves)
        mine = halves[world.rank % 2]
        assert dist.get_process_group_ranks(part) == mine
        assert total(world, part) == sum(1 << rank for rank in mine)
        assert dist.get_rank(part) == mine.index(world.rank)
        one = dist.split_group(split_ranks=[[world.size - 1]], group_desc="the last")
        assert (one is None) == (world.rank < world.size - 1)
        # A group of a part, and the meshes and groups that torch now makes by splitting.
        first = dist.split_group(part, [[0]])
        assert (first is None) == (dist.get_rank(part) > 0)
        mesh = init_device_mesh("cpu", (1, world.size), mesh_dim_names=("row", "column"))
        assert total(world, mesh["column"].get_group()) == (1 << world.size) - 1
        assert total(world, mesh["row"].get_group()) == 1 << world.rank
        last = dist.new_group([world.size - 1])
        assert (last == dist.GroupMember.NON_GROUP_MEMBER) == (world.rank < world.size - 1)
    finally:
        world.group.bound_device_id = None


def test_alone_is_a_world_of_one(world):
    me = hpcllm.mpi.alone(world)
    assert (me.rank, me.size, me.is_root) == (0, 1, True)
    assert me.comm.size == 1
    assert total(world, me.group) == 1 << world.rank
    tensor = torch.tensor([3.0])
    dist.all_reduce(tensor, group=hpcllm.mpi.alone(world).group)
    assert tensor.item() == 3.0


def test_names_and_sizes(world):
    assert dist.get_backend() == process_group.BACKEND
    assert (dist.get_rank(), dist.get_world_size()) == (world.rank, world.size)
    assert dist.group.WORLD.group_name == dist.group.WORLD.getGroupName()
    assert dist.new_group(group_desc="mine").group_desc == "mine"


def test_torch_distributed_can_be_stopped_and_started_again(world):
    for _ in range(2):
        part = dist.new_group([0])
        dist.destroy_process_group()
        assert not dist.is_initialized()
        again = hpcllm.mpi.init("cpu")
        assert again.group is dist.group.WORLD
        assert (again.rank, again.size) == (world.rank, world.size)
        assert total(again) == (1 << world.size) - 1
        assert hpcllm.mpi.init("cpu") is again
        del part


def test_time_in_calls_is_counted(world):
    before = work.communication_s()
    dist.all_reduce(torch.ones(1000))
    assert 0 < work.communication_s() - before < 10


def test_agreeing_on_errors(world):
    from hpcllm.errors import DataError
    from hpcllm.mpi.abort import FailedElsewhere

    with hpcllm.mpi.together(world.comm):
        pass
    with pytest.raises(DataError, match="shard 3") as refusal, hpcllm.mpi.together(world.comm):
        if world.rank == world.size - 1:
            raise DataError("shard 3")
    assert refusal.value.agreed
    elsewhere = ZeroDivisionError if world.is_root else FailedElsewhere
    with pytest.raises(elsewhere, match="by zero"), hpcllm.mpi.together(world.comm):
        if world.is_root:
            raise ZeroDivisionError("by zero")
    assert hpcllm.mpi.on_root(world.comm, lambda a, b: a + b, 1, 2) == 3
