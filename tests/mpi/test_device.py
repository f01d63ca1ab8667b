"""Devices and threads of ranks, and staging; what needs a GPU runs where there is one."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from rank_tensors import needs_gpu

from hpcllm.errors import UsageError
from hpcllm.mpi import device


def pretend(monkeypatch, gpus):
    """Let torch see GPUs with these identities, as far as `choose` looks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=gpus[index]))


@pytest.mark.mpi()
def test_every_rank_gets_a_gpu_of_its_own(world, monkeypatch):
    pretend(monkeypatch, [f"gpu-{index}" for index in range(world.size)])
    assert device.choose(world, "auto") == torch.device("cuda", world.local_rank)
    # A scheduler that shows each rank its own GPU only: it is number 0 for every one.
    pretend(monkeypatch, [f"gpu-{world.rank}"])
    assert device.choose(world, "cuda") == torch.device("cuda", 0)
    assert device.choose(world, "cpu") == torch.device("cpu")


@pytest.mark.mpi(min_size=2)
def test_ranks_share_a_gpu_only_when_told_to(world, monkeypatch):
    monkeypatch.delenv("HPCLLM_SHARE_GPU", raising=False)
    pretend(monkeypatch, ["gpu-0"])
    with pytest.raises(UsageError, match=f"{world.size} ranks have 1 different GPUs") as refusal:
        device.choose(world, "auto")
    assert refusal.value.agreed
    monkeypatch.setenv("HPCLLM_SHARE_GPU", "1")
    assert device.choose(world, "auto") == torch.device("cuda", 0)


@pytest.mark.mpi(min_size=2)
def test_one_rank_without_a_gpu_is_no_hang(world, monkeypatch):
    pretend(monkeypatch, [] if world.rank == 1 else [f"gpu-{index}" for index in range(world.size)])
    assert device.choose(world, "auto") == torch.device("cpu")
    with pytest.raises(UsageError, match=f"1 of {world.size} ranks see no GPU, the first of them rank 1 on "):
        device.choose(world, "cuda")


@pytest.mark.mpi()
def test_unknown_devices_are_refused(world):
    with pytest.raises(UsageError, match='"tpu" is not one of'):
        device.choose(world, "tpu")


@pytest.mark.mpi()
def test_the_cores_of_a_host_are_divided_among_its_ranks(world, monkeypatch):
    before = torch.get_num_threads()
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    device.bind_threads(world)
    assert chosen == [12 // world.local_size]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    device.bind_threads(world)
    assert len(chosen) == 1
    assert torch.get_num_threads() == before


def test_only_what_mpi_cannot_read_is_copied():
    plain = torch.arange(6.0).view(2, 3)
    assert device.to_mpi(plain).data_ptr() == plain.data_ptr()
    strided = plain.t()
    staged = device.to_mpi(strided)
    assert staged.is_contiguous()
    assert torch.equal(staged, strided)
    staged.mul_(2)
    device.from_mpi(staged, strided)
    assert torch.equal(plain, torch.arange(6.0).view(2, 3) * 2)
    with pytest.raises(TypeError, match="on device meta"):
        device.to_mpi(torch.empty(3, device="meta"))


@needs_gpu
@pytest.mark.mpi()
def test_device_tensors_are_reduced_after_the_work_on_their_stream(world):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a wrong order would reduce before the fill
        tensor = torch.full((1 << 20,), float(world.rank + 1), device="cuda")
        dist.all_reduce(tensor)
        total = tensor.sum()
    stream.synchronize()
    assert total.item() == (1 << 20) * world.size * (world.size + 1) / 2


@needs_gpu
@pytest.mark.mpi()
def test_device_tensors_go_through_every_kind_of_collective(world):
    ranks = range(world.size)
    mine = torch.full((3, 2), float(world.rank), device="cuda").t()  # not contiguous either
    gathered = [torch.empty(2, 3, device="cuda") for _ in ranks]
    dist.all_gather(gathered, mine)
    assert [tensor.unique().tolist() for tensor in gathered] == [[float(rank)] for rank in ranks]
    dist.broadcast(mine, world.size - 1)
    assert mine.unique().tolist() == [world.size - 1.0]
    exchanged = torch.empty(world.size, device="cuda")
    dist.all_to_all_single(exchanged, torch.arange(world.size, device="cuda") + 10.0 * world.rank)
    assert exchanged.tolist() == [10.0 * rank + world.rank for rank in ranks]


@needs_gpu
@pytest.mark.mpi()
def test_the_future_of_a_device_collective_orders_the_streams(world):
    tensor = torch.ones(1 << 20, device="cuda")
    future = dist.all_reduce(tensor, async_op=True).get_future()
    assert future.then(lambda f: f.value()[0] * 2).wait().unique().tolist() == [2.0 * world.size]
