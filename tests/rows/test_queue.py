"""Units are handed out once each, to whoever is free, and nobody waits for a rank that is busy."""

import time

import pytest

import hpcllm.mpi
from hpcllm.data.progress import Progress
from hpcllm.rows.queue import _ASK, _GIVE, Queue


def work(comm, order, cost_s, serve_every_s=0.002):
    """What was done by all ranks: (unit, rank) each, on every rank. cost_s(unit): how long a unit takes."""
    queue, did = Queue(comm, order), []
    while (unit := queue.next()) is not None:
        began = time.monotonic()
        while time.monotonic() - began < cost_s(unit):
            queue.serve()
            time.sleep(serve_every_s)
        did.append((unit, comm.rank))
    queue.finish(Progress(comm, "test", 1))
    everywhere = [each for mine in comm.allgather(did) for each in mine]
    assert not comm.iprobe(tag=_ASK) and not comm.iprobe(tag=_GIVE)
    comm.Barrier()  # a faster rank's next queue asks with the same tags
    return everywhere


@pytest.mark.mpi
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 40])
def test_every_unit_is_handed_out_once(count):
    comm = hpcllm.mpi.join().comm
    done = work(comm, list(range(count))[::-1], lambda unit: 0.0)
    assert sorted(unit for unit, _ in done) == list(range(count))


@pytest.mark.mpi(min_size=2)
def test_a_rank_in_a_slow_unit_gets_one_more_and_the_others_do_all_the_rest():
    comm = hpcllm.mpi.join().comm
    for slow in {0, comm.size - 1}:
        done = work(comm, list(range(60)), lambda unit, slow=slow: 1.5 if unit == slow else 0.005)
        mine = [unit for unit, rank in done if rank == slow]
        assert slow in mine and len(mine) <= 2


@pytest.mark.mpi(min_size=2)
def test_the_last_units_go_to_ranks_that_are_free():
    """Where few units are left, a rank in a slow one has none lying with it."""
    comm = hpcllm.mpi.join().comm
    done = work(comm, list(range(2 * comm.size)), lambda unit: 1.5 if unit == 1 else 0.01)
    assert [unit for unit, rank in done if rank == 1] == [1]
    assert len(done) == 2 * comm.size


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("failing", [0, -1])
def test_a_failing_rank_stops_the_queue(failing):
    comm = hpcllm.mpi.join().comm
    failing %= comm.size
    queue, progress, did = Queue(comm, list(range(1000))), Progress(comm, "test", 1), 0
    while queue.next() is not None and not (comm.rank == failing and did == 3):
        did += 1
        time.sleep(0.005)
        queue.serve()
        if failing and not progress.advance(0, 0):  # where root fails, nobody is given more
            break
    queue.finish(progress, failed=comm.rank == failing)
    total = comm.allreduce(did)
    assert 3 <= total < 900
    assert not comm.iprobe(tag=_ASK) and not comm.iprobe(tag=_GIVE)


def test_one_rank_needs_no_messages():
    class NoMessages:
        rank, size = 0, 1

        def Get_rank(self):
            return 0

    queue = Queue(NoMessages(), [3, 1, 2])
    assert [queue.next(), queue.next(), queue.next(), queue.next()] == [3, 1, 2, None]
    queue.finish(Progress(NoMessages(), "test", 1))
