"""Send and receive: tags, any source, handles dropped or asked by two threads, batches, objects."""

import gc
import threading

import pytest
import torch
import torch.distributed as dist
from rank_tensors import DTYPES, inputs, numbers, same

pytestmark = pytest.mark.mpi(min_size=2)


def neighbours(world):
    return (world.rank + 1) % world.size, (world.rank - 1) % world.size


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_tensor_goes_round_the_ring(world, dtype):
    right, left = neighbours(world)
    for what, make in inputs(dtype):
        received = make(world.rank, salt=9)
        works = [dist.isend(make(world.rank), right), dist.irecv(received, left)]
        for work in works:
            assert work.wait()
            assert work.is_completed()
        assert same(received, make(left)), what


def test_blocking_send_and_receive(world):
    big = numbers(0, (300_000,), torch.float32)  # beyond what MPI sends eagerly
    received = torch.zeros_like(big)
    if world.rank == 0:
        dist.send(big, 1)
        assert dist.recv(received, world.size - 1) == world.size - 1
    else:
        assert dist.recv(received, world.rank - 1) == world.rank - 1
        dist.send(received, (world.rank + 1) % world.size)
    assert same(received, big)


def test_tags_tell_messages_apart(world):
    right, left = neighbours(world)
    sends = [dist.isend(torch.tensor([world.rank, tag]), right, tag=tag) for tag in (1, 2, 3)]
    for tag in (3, 1, 2):
        received = torch.zeros(2, dtype=torch.int64)
        dist.recv(received, left, tag=tag)
        assert received.tolist() == [left, tag]
    for work in sends:
        work.wait()


def test_receiving_from_any_source_says_who_it_was(world):
    if world.is_root:
        seen = []
        for _ in range(world.size - 1):
            received = torch.zeros(1, dtype=torch.int64)
            source = dist.recv(received)
            assert received.item() == 10 * source
            seen.append(source)
        assert sorted(seen) == list(range(1, world.size))
    else:
        dist.send(torch.tensor([10 * world.rank]), 0)
    dist.barrier()


def test_buffers_live_as_long_as_mpi_uses_them(world):
    right, left = neighbours(world)
    wide = torch.zeros(200_000, 2)
    # Both handles and the tensor that is sent are dropped; the receive needs a staging buffer besides.
    dist.isend(numbers(world.rank, (200_000,), torch.float32), right)
    gc.collect()
    rubbish = [torch.full((200_000,), 77.0) for _ in range(8)]
    dist.irecv(wide[:, 1], left)
    gc.collect()
    rubbish += [torch.full((200_000,), 77.0) for _ in range(8)]
    while not all(pending.is_completed() for pending in world.group._under_way):
        pass
    assert same(wide[:, 1], numbers(left, (200_000,), torch.float32))
    assert len(rubbish) == 16
    dist.barrier()


def test_strided_receives_are_filled_when_the_work_is_asked_not_only_when_waited_for(world):
    right, left = neighbours(world)
    wide = torch.zeros(50, 2)
    work = dist.irecv(wide[:, 1], left)
    dist.isend(torch.full((50,), float(world.rank)), right).wait()
    while not work.is_completed():
        pass
    assert wide[:, 1].tolist() == [float(left)] * 50
    assert wide[:, 0].tolist() == [0.0] * 50


def test_two_threads_may_wait_for_one_receive(world):
    right, left = neighbours(world)
    received = torch.zeros(1000)
    work = dist.irecv(received, left)
    threads = [threading.Thread(target=work.wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    dist.isend(torch.ones(1000), right).wait()
    for thread in threads:
        thread.join()
    assert work.is_completed()
    assert received.sum().item() == 1000


def test_batches_of_sends_and_receives(world):
    right, left = neighbours(world)
    received = [torch.zeros(1000, dtype=torch.int64) for _ in range(2)]
    batch = [
        dist.P2POp(dist.isend, torch.full((1000,), world.rank), right),
        dist.P2POp(dist.irecv, received[0], left),
        dist.P2POp(dist.isend, torch.full((1000,), 10 + world.rank), left, tag=1),
        dist.P2POp(dist.irecv, received[1], right, tag=1),
    ]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    assert received[0].unique().tolist() == [left]
    assert received[1].unique().tolist() == [10 + right]


def test_long_messages_travel_in_pieces(world, monkeypatch):
    from hpcllm.mpi import collectives

    monkeypatch.setattr(collectives, "MOVE_CHUNK_BYTES", 128)
    right, left = neighbours(world)
    received = torch.zeros(1001, dtype=torch.int16)
    work = dist.isend(numbers(world.rank, (1001,), torch.int16), right)
    dist.recv(received, left)
    work.wait()
    assert same(received, numbers(left, (1001,), torch.int16))
    with pytest.raises(ValueError, match=r"2002 bytes .* needs a named source"):
        world.group.recv_anysource([received], 0)


def test_objects_travel_too(world):
    right, left = neighbours(world)
    received = [None, None]
    if world.rank % 2 == 0:
        dist.send_object_list(["from", world.rank], right)
        dist.recv_object_list(received, left)
    else:
        dist.recv_object_list(received, left)
        dist.send_object_list(["from", world.rank], right)
    assert received == ["from", left]
