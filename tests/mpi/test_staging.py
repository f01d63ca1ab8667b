"""Large tensors of a device that MPI does not take, in parts through host memory. Without a GPU the CPU plays one."""

import pytest
import torch
import torch.distributed as dist
from rank_tensors import needs_gpu, numbers

from hpcllm.mpi import device, staging


@pytest.fixture
def parts(monkeypatch):
    """Tensors of the CPU travel like those of a GPU that MPI does not take; the bytes of their parts are kept here."""
    seen = []
    through_host = staging.through_host

    def noted(sent, received, exchange):
        def count(out, to):
            seen.append(max(tensor.nbytes for tensor in (out, to) if tensor is not None))
            exchange(out, to)

        through_host(sent, received, count)

    monkeypatch.setattr(staging, "through_host", noted)
    monkeypatch.setattr(staging, "is_direct", lambda *_: False)
    monkeypatch.setattr(staging, "PART_BYTES", 1 << 10)
    return seen


# One element more than three parts of 256, however many rows a part has; a bfloat16 is half of that.
LENGTHS = (3 * 256 + 1, 2048)


@pytest.mark.mpi()
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64])
def test_parts_make_up_the_whole(world, parts, length, dtype):
    ranks = range(world.size)
    of = [numbers(rank, (length,), dtype) for rank in ranks]
    total = torch.stack(of).sum(0).to(dtype)
    mine = of[world.rank].clone()
    dist.all_reduce(mine)
    assert torch.equal(mine, total)
    mine = of[world.rank].clone()
    dist.reduce(mine, dst=world.size - 1)
    assert torch.equal(mine, total if world.rank == world.size - 1 else of[world.rank])
    mine = of[world.rank].clone()
    dist.broadcast(mine, src=world.size - 1)
    assert torch.equal(mine, of[-1])
    whole = torch.empty(world.size * length, dtype=dtype)
    dist.all_gather_single(whole, of[world.rank])
    assert torch.equal(whole, torch.cat(of))
    blocks = [numbers(rank, (world.size * length,), dtype, salt=1) for rank in ranks]
    out = torch.empty(length, dtype=dtype)
    dist.reduce_scatter_single(out, blocks[world.rank].clone())
    assert torch.equal(out, torch.stack(blocks).sum(0).to(dtype).chunk(world.size)[world.rank])
    # Five calls, none of them in one part, and none longer than a part.
    assert len(parts) >= 10 and max(parts) <= 1 << 10


@pytest.mark.mpi()
def test_tensors_that_overlap_or_lie_otherwise(world, parts):
    ranks, length = range(world.size), 2048
    of = [numbers(rank, (length,), torch.float32) for rank in ranks]
    # In place, as FSDP2 gathers and scatters, at another rank's place, and across two.
    for start in (world.rank * length, (world.rank + 1) % world.size * length, (world.size - 1) * length // 3):
        whole = torch.zeros(world.size, length)
        mine = whole.view(-1)[start : start + length].copy_(of[world.rank])
        dist.all_gather_single(whole, mine)
        assert torch.equal(whole, torch.stack(of))
        blocks = torch.stack([of[world.rank] + rank for rank in ranks])
        mine = blocks.view(-1)[start : start + length]
        dist.reduce_scatter_single(mine, blocks)
        assert torch.equal(mine, torch.stack(of).sum(0) + world.size * world.rank)
    # Ranks may keep a tensor differently; what they send each other is the same.
    strided = of[world.rank].view(32, 64).clone()
    strided = strided.t().contiguous().t() if world.rank % 2 else strided
    dist.all_reduce(strided)
    assert torch.equal(strided, torch.stack(of).sum(0).view(32, 64))


def test_copies_of_two_parts_are_under_way_around_that_of_mpi(monkeypatch):
    """The order in which a stream is asked for copies, and what is waited for."""
    did = []
    monkeypatch.setattr(staging, "PART_BYTES", 8)
    fill, drain = staging._Buffers.fill, staging._Buffers.drain
    monkeypatch.setattr(staging._Buffers, "fill", lambda *a: did.append(f"in {a[1].start}") or fill(*a))
    monkeypatch.setattr(staging._Buffers, "drain", lambda *a: did.append(f"out {a[1].start}") or drain(*a))
    tensor = torch.arange(8.0).view(1, 8)
    staging.through_host(tensor, tensor, lambda out, to: did.append(f"MPI {out[0, 0]:g}") or to.mul_(10))
    assert tensor[0].tolist() == [10.0 * n for n in range(8)]
    # While MPI has part n, part n - 1 goes out and part n + 1 comes in.
    expected = "in 0, in 2, MPI 0, out 0, in 4, MPI 2, out 2, in 6, MPI 4, out 4, MPI 6, out 6"
    assert ", ".join(did) == expected


@needs_gpu
@pytest.mark.mpi()
def test_device_tensors_travel_in_parts_in_the_order_of_their_stream(world, monkeypatch):
    monkeypatch.setattr(staging, "PART_BYTES", 1 << 20)
    monkeypatch.setattr(device._Direct, "calls", frozenset())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a wrong order would reduce before the fill
        tensor = torch.full(((5 << 18) + 3,), float(world.rank + 1), device="cuda")
        dist.all_reduce(tensor)
        total = tensor.double().sum()
    stream.synchronize()
    assert total.item() == len(tensor) * world.size * (world.size + 1) / 2
