"""Collectives carried by a thread: the same answers in the same order, errors at `wait`, and only where it pays."""

import datetime
import os
import threading

import pytest
import torch
import torch.distributed as dist
from rank_tensors import numbers

from hpcllm.errors import UsageError
from hpcllm.mpi import collectives, overlap

pytestmark = pytest.mark.mpi()


@pytest.fixture
def courier(world, monkeypatch):
    """A courier that carries this test's asynchronous calls."""
    monkeypatch.setattr(overlap, "_courier", None)
    monkeypatch.setenv("HPCLLM_OVERLAP", "on")
    overlap.start(world, torch.device("cpu"))
    made = overlap._courier
    yield made
    made.drain()


def test_an_asynchronous_call_returns_before_it_is_made(world, courier):
    tensor = torch.ones(3)
    held = threading.Event()
    courier.take(lambda: held.wait() and collectives.Done([]), [])  # what the courier has to do before
    work = dist.all_reduce(tensor, async_op=True)
    assert not work.is_completed()
    assert tensor.tolist() == [1.0] * 3
    with pytest.raises(dist.DistBackendError, match=r"timed out after 0\.05 s"):
        work.wait(datetime.timedelta(seconds=0.05))
    held.set()
    assert work.wait()
    assert work.is_completed()
    assert work.is_success()
    assert tensor.tolist() == [float(world.size)] * 3


def test_calls_are_made_in_their_order_whether_waited_for_or_not(world, courier):
    tensors = [torch.full((1000,), float(world.rank + turn)) for turn in range(50)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    total = torch.full((3,), float(world.rank))
    dist.all_reduce(total)  # inline, after all of them
    assert all(work.is_completed() for work in works)
    ranks = sum(range(world.size))
    assert total.tolist() == [float(ranks)] * 3
    for turn, tensor in enumerate(tensors):
        assert tensor.eq(ranks + turn * world.size).all()


def test_what_goes_wrong_arrives_at_wait_and_in_the_future(world, courier):
    work = dist.all_reduce(torch.zeros(3, dtype=torch.float8_e4m3fn), async_op=True)
    with pytest.raises(TypeError, match="cannot reduce"):
        work.wait()
    assert not work.is_success()
    assert isinstance(work.exception(), TypeError)
    with pytest.raises(TypeError, match="cannot reduce"):
        work.get_future().wait()
    dist.all_reduce(torch.zeros(3, dtype=torch.float8_e4m3fn), async_op=True)  # nobody waits for this one
    with pytest.raises(TypeError, match="cannot reduce"):
        dist.all_reduce(torch.zeros(3))
    dist.all_reduce(torch.zeros(3))


def test_the_future_is_done_by_the_courier(world, courier):
    tensor = torch.ones(3)
    held, names = threading.Event(), []
    courier.take(lambda: held.wait() and collectives.Done([]), [])

    def then(done):
        names.append(threading.current_thread().name)
        return done.value()[0] * 2

    doubled = dist.all_reduce(tensor, async_op=True).get_future().then(then)
    held.set()
    assert doubled.wait().tolist() == [2.0 * world.size] * 3
    assert names == ["hpcllm courier"]


def test_ddp_and_coalesced_calls_give_the_same_numbers(world, courier, monkeypatch):
    from torch.nn.parallel import DistributedDataParallel

    def gradients():
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(50, 200), torch.nn.ReLU(), torch.nn.Linear(200, 50))
        replica = DistributedDataParallel(net, bucket_cap_mb=0.01)
        for turn in range(2):
            replica.zero_grad()
            replica(numbers(world.rank, (4, 50), torch.float32, salt=turn)).square().sum().backward()
        gathered = [torch.empty(world.size, n) for n in (3, 4)]
        group = dist.group.WORLD
        parts = [numbers(world.rank, (n,), torch.float32) for n in (3, 4)]
        group.all_gather_single_coalesced(gathered, parts).wait()
        return [parameter.grad.clone() for parameter in net.parameters()] + gathered

    carried = gradients()
    monkeypatch.setattr(overlap, "_courier", None)
    assert all(map(torch.equal, carried, gradients()))


def test_overlap_is_for_those_who_have_a_core_to_spare(world, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2 * world.size)))
    assert overlap.spare_core(world, 1)
    assert not overlap.spare_core(world, 2)
    monkeypatch.setattr(overlap, "_courier", None)
    monkeypatch.setenv("HPCLLM_OVERLAP", "off")
    overlap.start(world, torch.device("cpu"))
    assert overlap._courier is None
    monkeypatch.setenv("HPCLLM_OVERLAP", "always")
    with pytest.raises(UsageError, match='HPCLLM_OVERLAP="always" is not one of auto, on, off') as refusal:
        overlap.start(world, torch.device("cpu"))
    assert refusal.value.agreed
