"""The ways of a call are tried in turn, and all ranks settle on the one whose slowest rank was quickest."""

import logging
import time

import pytest
import torch
import torch.distributed as dist

from hpcllm.mpi import choose, shared

pytestmark = pytest.mark.mpi


@pytest.fixture
def choices(world):
    comm = world.comm.Dup()
    yield choose.Choices(comm)
    comm.Free()


def waiting(calls, name, seconds):
    def way(value):
        calls.append(name)
        time.sleep(seconds)
        return value

    return way


def test_all_ranks_take_what_is_quickest_on_the_slowest_of_them(world, choices, caplog):
    caplog.set_level(logging.INFO, "hpcllm.mpi")
    calls = []
    # To every rank but the last, "a" looks quicker.
    last = world.rank == world.size - 1
    ways = {"a": waiting(calls, "a", 0.02 if last else 0), "b": waiting(calls, "b", 0.005)}
    for turn in range(3 * choose.TRIALS):
        assert choices.take("sum", 1000, ways, turn) == turn
    tried, settled = calls[: 2 * choose.TRIALS], calls[2 * choose.TRIALS :]
    assert tried == ["a", "b"] * choose.TRIALS
    assert settled == ["b"] * choose.TRIALS
    assert choose.made()[-1]["way"] == "b" and choose.made()[-1]["bytes_up_to"] == 1023
    assert ("'operation': 'sum', 'bytes_up_to': 1023, 'way': 'b'" in caplog.text) == world.is_root


def test_a_small_gain_changes_nothing_and_sizes_are_judged_apart(world, choices, monkeypatch):
    monkeypatch.setattr(choose, "BETTER", 0.0)  # then nothing is better enough
    calls = []
    ways = {"a": waiting(calls, "a", 0.003), "b": waiting(calls, "b", 0)}
    for _ in range(2 * choose.TRIALS + 1):
        choices.take("sum", 1000, ways, None)
    assert calls[-1] == "a"
    monkeypatch.undo()
    for _ in range(2 * choose.TRIALS + 1):
        choices.take("sum", 1024, ways, None)
        choices.take("sum", 1000, ways, None)
    assert calls[-2:] == ["b", "a"]


@pytest.mark.parametrize("operation", ["all_reduce", "reduce_scatter", "broadcast"])
def test_what_is_tried_gives_the_same_bytes(world, operation):
    """Between its first and its last call an operation has gone every way."""
    length = {"broadcast": 2 * shared.BROADCAST_MPI_BYTES, "all_reduce": shared.WHOLE_BYTES}.get(
        operation, shared.WHOLE_BYTES * world.size
    ) // 4 + 12 * world.size
    given = torch.randn(length, generator=torch.Generator().manual_seed(world.rank))
    given = given[: length - length % world.size]
    before, seen = len(choose.made()), []
    group = dist.new_group(list(range(world.size)))
    for _ in range(2 * choose.TRIALS + 1):
        values, part = given.clone(), torch.empty(len(given) // world.size)
        if operation == "all_reduce":
            dist.all_reduce(values, group=group)
        elif operation == "broadcast":
            dist.broadcast(values, 0, group=group)
        else:
            dist.reduce_scatter_single(part, values, group=group)
        seen.append(part if operation == "reduce_scatter" else values)
    assert all(torch.equal(one, seen[0]) for one in seen)
    assert [choice["operation"] for choice in choose.made()[before:]] == [operation] * (world.size > 1)
    dist.destroy_process_group(group)
