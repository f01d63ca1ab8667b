"""Collectives through memory that ranks share, on one host and, the ranks split into pretended hosts, on several."""

import os

import pytest
import torch
import torch.distributed as dist
from rank_tensors import DTYPES, numbers, same

from hpcllm.mpi import host, launcher, peers, reduce, shared

pytestmark = pytest.mark.mpi(min_size=2)
SIZE = launcher.find()[1]
# Two hosts that share memory need two ranks each.
TWO_HOSTS = (
    ["hosts in a row", "hosts in turn", "hosts, in small rounds", "hosts, in the pool", "hosts, one in the pool"]
    if SIZE > 2 and SIZE % 2 == 0
    else []
)


def slices_alone(monkeypatch):
    """From now on each rank sums its slice, whatever the size."""
    monkeypatch.setattr(shared, "WHOLE_BYTES", 0)
    monkeypatch.setattr(shared, "SLICES_BYTES", 0)


@pytest.fixture(params=["one host", "one host, in the pool", "small slots", *TWO_HOSTS])
def neighbours(request, world, monkeypatch):
    """(Shared, hosts as lists of ranks, how to copy a tensor): all ranks on one host, or two hosts of equal size."""
    monkeypatch.setattr(shared, "LOOK_BYTES", 0)
    if "pool" in request.param:
        slices_alone(monkeypatch)
        monkeypatch.setattr(reduce, "CHUNK_BYTES", 1 << 19)
    if "small" in request.param:
        slices_alone(monkeypatch)
        monkeypatch.setattr(reduce, "CHUNK_BYTES", 1 << 19)
        monkeypatch.setenv("HPCLLM_SHARED_MEMORY_MB", "1")
    two = request.param in TWO_HOSTS
    half = world.size // 2
    number = 0 if not two else world.rank // half if request.param == "hosts in a row" else world.rank % 2
    hosts = [[rank for rank in range(world.size) if world.comm.bcast(number, root=rank) == h] for h in range(1 + two)]
    comm = world.comm.Dup()
    made = shared.arrange(comm, comm.Split(number))
    assert made is not None
    assert made.reached is not None
    here = "in the pool" in request.param and (number == 0 or "one in" not in request.param)
    yield made, hosts, pooled if here else torch.clone
    made.free()
    comm.Free()


def pooled(tensor):
    """A copy where the other ranks of the host can reach it."""
    return peers.pool.allocate(tensor.numel(), tensor.dtype).copy_(tensor)


# One element, one below and above the border of the small ones, several rounds of a slot with a rest.
LENGTHS = (0, 1, 7, 1000, (1 << 16) + 3, (1 << 20) + 5)


def real(world, length, dtype, salt=0):
    """A tensor for each rank whose sum depends on the order of summation."""
    draws = [torch.Generator().manual_seed(1000 * salt + rank) for rank in range(world.size)]
    return [torch.randn(length, generator=draw, dtype=torch.float64).to(dtype) for draw in draws]


def ordered_sum(tensors, hosts, dtype):
    """(sum within each host in rank order) summed over hosts in order, in the precision that this backend promises."""
    wide = reduce.wide(dtype, "SUM")
    partial = []
    for ranks in hosts:
        total = tensors[ranks[0]].to(wide)
        for rank in ranks[1:]:
            total = total + tensors[rank].to(wide)
        partial.append(total)
    result = partial[0]
    for total in partial[1:]:
        result = result + total
    return result.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_taken_in_one_order_and_rounded_once_at_every_size(world, neighbours, dtype):
    ours, hosts, copy = neighbours
    for length in LENGTHS:
        tensors = real(world, length, dtype)
        values = copy(tensors[world.rank])
        ours.all_reduce(values, "SUM")
        assert same(values, ordered_sum(tensors, hosts, dtype)), length


@pytest.mark.parametrize("kind", ["AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM"])
def test_other_reductions_are_those_of_the_flat_algorithm(world, neighbours, kind):
    ours, _, copy = neighbours
    dtype = torch.int64 if kind.startswith("B") else torch.float64
    factor = 0.5 if kind == "PREMUL_SUM" else None
    for length in LENGTHS:
        values = copy(numbers(world.rank, (length,), dtype))
        expected = values.clone()
        reduce.reduce(world.comm, expected, kind, expected, factor, world.size)
        ours.all_reduce(values, kind, factor)
        assert torch.equal(values, expected), length


def test_only_the_root_of_a_reduce_gets_the_sum(world, neighbours):
    ours, hosts, copy = neighbours
    for root in range(world.size):
        for length in LENGTHS:
            tensors = real(world, length, torch.float32, salt=root)
            values = copy(tensors[world.rank])
            ours.all_reduce(values, "SUM", root=root)
            expected = ordered_sum(tensors, hosts, torch.float32) if root == world.rank else tensors[world.rank]
            assert same(values, expected)


@pytest.mark.parametrize("kind", ["SUM", "AVG"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduce_scatter_gives_each_rank_its_part_of_the_same_sum(world, neighbours, dtype, kind):
    ours, hosts, copy = neighbours
    for length in (1, 5, 1000, (1 << 18) + 3):
        tensors = real(world, world.size * length, dtype)
        out = torch.empty(length, dtype=dtype)
        ours.reduce_scatter(copy(tensors[world.rank]).view(world.size, length), kind, out)
        mine = slice(world.rank * length, (world.rank + 1) * length)
        if kind == "SUM":
            assert same(out, ordered_sum(tensors, hosts, dtype)[mine]), length
        else:
            exact = sum(tensor.double() for tensor in tensors)[mine] / world.size
            assert torch.allclose(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-2)
            assert same(out, (ordered_sum(tensors, hosts, torch.float32)[mine] / world.size).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broadcast_moves_the_bytes_of_its_root(world, neighbours, dtype):
    ours, _, copy = neighbours
    if ours.across is not None:
        return  # for ranks of one host
    for length in (0, 1, 1000, (1 << 20) + 3):
        everyone = [numbers(rank, (length,), dtype).view(torch.uint8) for rank in range(world.size)]
        for root in range(world.size):
            tensor = copy(everyone[world.rank])
            ours.broadcast(tensor, root)
            assert same(tensor, everyone[root])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_a_gather_copies_from_where_tensors_lie(world, neighbours, dtype):
    ours, _, copy = neighbours
    if ours.across is not None:
        return  # for ranks of one host
    everyone = torch.stack([numbers(rank, (1000,), dtype) for rank in range(world.size)])
    whole = torch.zeros_like(everyone)
    done = ours.all_gather(whole, copy(everyone[world.rank]))
    assert done == (copy is pooled)
    assert not done or same(whole, everyone)
    # In place, as FSDP2 does it.
    whole = copy(torch.zeros_like(everyone).view(-1)).view(everyone.shape)
    mine = whole[world.rank].copy_(everyone[world.rank])
    assert ours.all_gather(whole, mine) == done
    assert not done or same(whole, everyone)


def test_calls_that_follow_each_other_do_not_meet(world, neighbours):
    ours, _, copy = neighbours
    for turn in range(300):
        length = (1, 50, 5000)[turn % 3]
        values = copy(torch.full((length,), float(world.rank + turn)))
        ours.all_reduce(values, "SUM")
        assert values.eq(sum(rank + turn for rank in range(world.size))).all()
        if ours.across is None:
            tensor = copy(torch.full((length,), world.rank + turn % 7, dtype=torch.uint8))
            ours.broadcast(tensor, turn % world.size)
            assert tensor.unique().tolist() == [turn % world.size + turn % 7]


@pytest.fixture
def ours(world):
    comm = world.comm.Dup()
    made = shared.arrange(comm)
    yield made
    made.free()
    comm.Free()


def test_tensors_in_the_pool_are_summed_where_they_lie(world, ours, monkeypatch):
    numbers = torch.full((1 << 20,), float(world.rank))
    total = float(sum(range(world.size)))

    def refuse(*_):
        raise AssertionError("slices went through the slots")

    monkeypatch.setattr(ours, "_give_slices", refuse)
    monkeypatch.setattr(ours, "_reduce_rows", refuse)
    for turn in range(3):
        # Memory of several ages, and a tensor that begins inside of one.
        values = peers.pool.allocate(len(numbers) + turn, torch.float32)[turn:].copy_(numbers)
        ours.all_reduce(values, "SUM")
        assert values.eq(total).all()
        out = torch.empty(1 << 20)
        ours.reduce_scatter(pooled(numbers.repeat(world.size)).view(world.size, -1), "SUM", out)
        assert out.eq(total).all()
        world.comm.Barrier()


def test_a_sum_of_tensors_of_which_some_lie_in_the_pool_is_right(world, ours):
    numbers = torch.full((1 << 20,), float(world.rank))
    for one in range(world.size):
        values = pooled(numbers) if world.rank == one else numbers.clone()
        ours.all_reduce(values, "SUM")
        assert values.eq(sum(range(world.size))).all()


def test_what_overlaps_is_gathered_and_reduced_all_the_same(world, monkeypatch):
    monkeypatch.setattr(shared, "LOOK_BYTES", 0)
    monkeypatch.setattr(shared, "LOOK_GATHER_BYTES", 0)
    slices_alone(monkeypatch)
    length = 5000
    for row in range(world.size):  # where in the whole the part lies; every rank has it at the same place
        whole = pooled(torch.full((world.size * length,), -1.0))
        part = whole[row * length : (row + 1) * length].fill_(world.rank)
        dist.all_gather_single(whole, part, group=world.group)
        assert same(whole, torch.arange(float(world.size)).repeat_interleave(length))
        whole = pooled(torch.arange(float(world.size)).repeat_interleave(length) + world.rank)
        part = whole[row * length : (row + 1) * length]
        dist.reduce_scatter_single(part, whole, group=world.group)
        assert part.eq(sum(world.rank + rank for rank in range(world.size))).all()


def test_idle_memory_is_given_back(world):
    pool = peers.Pool()
    for length in range(1, 40):
        pool.allocate(length << 12, torch.uint8)
    assert sum(chunk.size for chunk in pool._index[1]) < 3 * 40 << 12
    assert all(os.path.exists(f"/proc/self/fd/{chunk.descriptor}") for chunk in pool._index[1])


def test_peers_keep_no_descriptors_and_unmap_what_is_gone(world, ours):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    def mapped():
        return sum(1 for pid, _ in peers._attached if pid != os.getpid())

    peers.forget()
    pool, before, known = peers.Pool(), opened(), mapped()
    tensors = [torch.full((1 << 20,), 1.0) for _ in range(5)]
    assert all(pool.adopt(tensor, world.size) for tensor in tensors)
    real, peers.pool = peers.pool, pool
    try:
        for tensor in tensors:
            ours.all_reduce(tensor, "SUM")
            assert tensor.eq(world.size).all()
    finally:
        peers.pool = real
    assert mapped() >= known + 5 * (world.size - 1)
    assert opened() == before + 5  # those of the five adopted ones
    world.comm.Barrier()
    del tensors, tensor
    world.comm.Barrier()
    peers.forget()
    assert opened() == before and mapped() <= known
    world.comm.Barrier()


def test_freed_memory_is_given_out_again(world):
    pool = peers.Pool()
    first = pool.allocate(1 << 20, torch.float32)
    address = first.data_ptr()
    part = first[5:9].fill_(7)
    del first
    second = pool.allocate(1 << 20, torch.float32)  # the first is still looked at
    assert second.data_ptr() != address and part.eq(7).all()
    del part
    assert pool.allocate((1 << 20) - 100, torch.float32).data_ptr() == address
    assert pool.allocate(1 << 10, torch.float32).data_ptr() not in (address, second.data_ptr())  # it would be a waste
    assert pool.allocate(0, torch.float32).numel() == 0
    assert pool.find(torch.zeros(4)) == (-1, 0)
    assert pool.find(second[3:])[1] == 12


def test_ranks_that_cannot_reach_each_other_use_the_slots(world, monkeypatch):
    comm = world.comm.Dup()
    # As where rank 1's processes are numbered anew: somebody else has the number of rank 0.
    if world.rank == 1:
        monkeypatch.setattr(peers, "_attach", lambda pid, _: torch.zeros(99, dtype=torch.uint8))
    made = shared.arrange(comm)
    assert made.reached is None
    values = pooled(torch.full((1 << 20,), float(world.rank)))
    made.all_reduce(values, "SUM")
    assert values.eq(sum(range(world.size))).all()
    made.free()
    comm.Free()


def test_hosts_of_unequal_size_and_hosts_of_one_rank_share_nothing(world):
    comm = world.comm.Dup()
    assert shared.arrange(comm, comm.Split(world.rank)) is None
    if world.size > 2:
        assert shared.arrange(comm, comm.Split(min(world.rank, 1))) is None
    comm.Free()


def test_memory_that_is_too_small_is_noticed_by_all_and_nothing_is_left(world, monkeypatch, tmp_path):
    def files():
        return {name for name in os.listdir(host.FOLDER) if name.startswith("hpcllm-")}

    before = files()
    assert host.open_memory(world.comm, 1 << 20) is not None
    assert host.open_memory(world.comm, 0) is None
    # Larger than any machine's memory.
    assert host.open_memory(world.comm, 1 << 50) is None
    # One rank that does not see the folder of the others, as in a container of its own.
    if world.rank == 1:
        monkeypatch.setattr(host, "_attach", lambda *_: None)
    assert host.open_memory(world.comm, 1 << 20) is None
    world.comm.Barrier()
    assert files() <= before
    world.comm.Barrier()
