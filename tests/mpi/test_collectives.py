"""What the collectives move arrives bit for bit: every operation, dtype, shape and layout, sync and async."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from rank_tensors import DTYPES, finish, inputs, numbers, same

pytestmark = [
    pytest.mark.mpi(),
    # The names that torch 2.11 knows are tested; later versions rename some.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def sync_and_async(test):
    """Run test(world, dtype, asynchronous) both ways."""

    def both(world, dtype):
        test(world, dtype, False)
        test(world, dtype, True)

    both.__name__, both.__doc__ = test.__name__, test.__doc__
    return both


@each_dtype
@sync_and_async
def test_broadcast_sends_the_tensor_of_the_source_to_all(world, dtype, asynchronous):
    for source in range(world.size):
        for what, make in inputs(dtype):
            tensor = make(world.rank)
            finish(dist.broadcast(tensor, source, async_op=asynchronous), asynchronous)
            assert same(tensor, make(source)), what


@each_dtype
@sync_and_async
def test_all_gather_gives_every_rank_the_tensors_of_all_in_rank_order(world, dtype, asynchronous):
    for what, make in inputs(dtype):
        # The outputs have the same layout as the input, and something else in them.
        outputs = [make(rank, salt=9) for rank in range(world.size)]
        finish(dist.all_gather(outputs, make(world.rank), async_op=asynchronous), asynchronous)
        assert all(same(output, make(rank)) for rank, output in enumerate(outputs)), what


@each_dtype
def test_all_gather_of_different_sizes(world, dtype):
    outputs = [torch.zeros(2 * rank, 3).to(dtype) for rank in range(world.size)]
    dist.all_gather(outputs, numbers(world.rank, (2 * world.rank, 3), dtype))
    assert all(same(output, numbers(rank, (2 * rank, 3), dtype)) for rank, output in enumerate(outputs))


@each_dtype
@sync_and_async
def test_all_gather_into_one_tensor(world, dtype, asynchronous):
    for what, make in inputs(dtype):
        mine = make(world.rank)
        stacked = torch.zeros(world.size, *mine.shape).to(dtype)
        finish(dist.all_gather_into_tensor(stacked, mine, async_op=asynchronous), asynchronous)
        assert same(stacked, torch.cat([make(rank).reshape(1, *mine.shape) for rank in range(world.size)])), what
    side_by_side = torch.zeros(world.size * 2, 3).to(dtype)
    dist.all_gather_into_tensor(side_by_side, numbers(world.rank, (2, 3), dtype))
    assert same(side_by_side, torch.cat([numbers(rank, (2, 3), dtype) for rank in range(world.size)]))


def test_all_gather_coalesced(world):
    shapes = [(3,), (2, 2)]
    outputs = [[torch.zeros(shape) for shape in shapes] for _ in range(world.size)]
    dist.all_gather_coalesced(outputs, [numbers(world.rank, shape, torch.float32) for shape in shapes])
    for rank, parts in enumerate(outputs):
        assert all(same(part, numbers(rank, shape, torch.float32)) for part, shape in zip(parts, shapes, strict=True))


@each_dtype
@sync_and_async
def test_gather_gives_the_tensors_of_all_to_the_destination_alone(world, dtype, asynchronous):
    destination = world.size - 1
    for what, make in inputs(dtype):
        mine = make(world.rank)
        outputs = [make(rank, salt=9) for rank in range(world.size)] if world.rank == destination else None
        finish(dist.gather(mine, outputs, dst=destination, async_op=asynchronous), asynchronous)
        assert same(mine, make(world.rank))
        assert all(same(output, make(rank)) for rank, output in enumerate(outputs or [])), what


@each_dtype
@sync_and_async
def test_scatter_deals_the_tensors_of_the_source(world, dtype, asynchronous):
    source = world.size - 1
    for what, make in inputs(dtype):
        output = make(world.rank, salt=9)
        parts = [make(rank) for rank in range(world.size)] if world.rank == source else None
        finish(dist.scatter(output, parts, src=source, async_op=asynchronous), asynchronous)
        assert same(output, make(world.rank)), what


@each_dtype
@sync_and_async
def test_all_to_all_transposes(world, dtype, asynchronous):
    for what, make in inputs(dtype):
        outputs = [make(rank, salt=99) for rank in range(world.size)]
        sent = [make(world.rank, salt=rank) for rank in range(world.size)]
        finish(dist.all_to_all(outputs, sent, async_op=asynchronous), asynchronous)
        assert all(same(output, make(rank, salt=world.rank)) for rank, output in enumerate(outputs)), what


def splits(sender, receiver):
    """Rows that one rank sends to another; some are 0."""
    return (sender + 2 * receiver) % 3


@each_dtype
@sync_and_async
def test_all_to_all_single_with_and_without_splits(world, dtype, asynchronous):
    ranks = range(world.size)
    output = torch.zeros(world.size * 2, 3).to(dtype)
    mine = numbers(world.rank, (world.size * 2, 3), dtype)
    finish(dist.all_to_all_single(output, mine, async_op=asynchronous), asynchronous)
    blocks = [numbers(rank, (world.size, 2, 3), dtype)[world.rank] for rank in ranks]
    assert same(output, torch.cat(blocks))

    sent = [splits(world.rank, rank) for rank in ranks]
    received = [splits(rank, world.rank) for rank in ranks]
    output = torch.zeros(sum(received), 3).to(dtype)
    mine = torch.cat([numbers(world.rank, (n, 3), dtype, salt=rank) for rank, n in enumerate(sent)])
    finish(dist.all_to_all_single(output, mine, received, sent, async_op=asynchronous), asynchronous)
    blocks = [numbers(rank, (n, 3), dtype, salt=world.rank) for rank, n in enumerate(received)]
    assert same(output, torch.cat(blocks))


def test_conjugated_and_negated_views_are_sent_as_they_mean(world):
    mine = numbers(world.rank, (4,), torch.complex64)
    for view in (torch.conj, lambda tensor: tensor.conj().imag):
        outputs = [view(torch.zeros_like(mine)) for _ in range(world.size)]
        world.group.allgather([outputs], [view(mine)])  # torch's own all_gather refuses conjugated views
        for rank, output in enumerate(outputs):
            expected = view(numbers(rank, (4,), torch.complex64))
            assert output.is_conj() == expected.is_conj()
            assert torch.equal(output, expected)


def test_the_input_may_be_a_part_of_the_output(world):
    output = torch.full((world.size, 3), -1.0)
    output[world.rank] = world.rank
    dist.all_gather_into_tensor(output, output[world.rank])
    assert output.tolist() == [[float(rank)] * 3 for rank in range(world.size)]
    exchanged = torch.arange(world.size) + 10 * world.rank
    dist.all_to_all_single(exchanged, exchanged)
    assert exchanged.tolist() == [10 * rank + world.rank for rank in range(world.size)]
    summed = torch.arange(world.size) + 10 * world.rank
    dist.reduce_scatter_tensor(summed[:1], summed)
    assert summed[0] == sum(10 * rank + world.rank for rank in range(world.size))


def test_tensors_that_need_gradients_are_filled_in_place(world):
    weight = torch.nn.Parameter(torch.full((3,), float(world.rank)))
    dist.broadcast(weight, world.size - 1)
    dist.all_reduce(weight)
    assert weight.tolist() == [float((world.size - 1) * world.size)] * 3
    assert weight.requires_grad
    assert weight.is_leaf


def test_messages_longer_than_one_call_may_carry_arrive_whole(world, monkeypatch):
    from hpcllm.mpi import collectives

    monkeypatch.setattr(collectives, "MOVE_CHUNK_BYTES", 64)
    tensor = numbers(world.rank, (1003,), torch.int32)
    dist.broadcast(tensor, world.size - 1)
    assert same(tensor, numbers(world.size - 1, (1003,), torch.int32))


def test_a_long_broadcast_through_shared_memory_arrives_whole(world):
    for root in range(world.size):
        tensor = numbers(world.rank, ((1 << 20) + 3,), torch.float32)
        dist.broadcast(tensor, root)
        assert same(tensor, numbers(root, ((1 << 20) + 3,), torch.float32))


def test_sizes_and_dtypes_that_do_not_fit_are_refused_by_name(world):
    tensor = torch.zeros(6)
    with pytest.raises(ValueError, match=f"all_gather: the output: 5 elements where {6 * world.size} are needed"):
        world.group.all_gather_single(torch.zeros(5), tensor)
    with pytest.raises(ValueError, match=r"all_gather: the input: 6 elements where 5 are needed"):
        world.group.allgather([[torch.zeros(5)] * world.size], [tensor])
    with pytest.raises(TypeError, match=r"all_gather: tensors of different dtypes: torch\.float32, torch\.int32"):
        world.group.allgather([[tensor.int()] * world.size], [tensor])
    with pytest.raises(ValueError, match=r"reduce_scatter: the input: 7 elements"):
        dist.reduce_scatter_tensor(tensor, torch.zeros(7))
    with pytest.raises(ValueError, match=r"all_to_all_single: 6 rows cannot be split as"):
        dist.all_to_all_single(tensor, tensor.clone(), [5] * world.size, [5] * world.size)
    with pytest.raises(TypeError, match=r"cannot send a tensor of layout torch\.sparse_coo"):
        dist.broadcast(torch.eye(3).to_sparse(), 0)


def test_functional_collectives(world):
    ranks, group = range(world.size), world.group
    mine = numbers(world.rank, (2 * world.size, 3), torch.float32)
    everyone = [numbers(rank, (2 * world.size, 3), torch.float32) for rank in ranks]
    rows = slice(2 * world.rank, 2 * world.rank + 2)
    assert torch.equal(functional.all_reduce(mine, "sum", group), sum(everyone))
    assert torch.equal(functional.all_reduce(mine, "max", group), torch.stack(everyone).amax(0))
    assert torch.equal(functional.all_gather_tensor(mine, 0, group), torch.cat(everyone))
    assert torch.equal(functional.all_gather_tensor(mine, 1, group), torch.cat(everyone, dim=1))
    assert torch.equal(functional.reduce_scatter_tensor(mine, "sum", 0, group), sum(everyone)[rows])
    assert torch.equal(functional.broadcast(mine, 0, group), everyone[0])
    exchanged = functional.all_to_all_single(mine, None, None, group)
    assert torch.equal(exchanged, torch.cat([tensor[rows] for tensor in everyone]))
    for ours, expected in zip(functional.all_reduce_coalesced([mine, mine + 1], "sum", group), (0, 1), strict=True):
        assert torch.equal(ours, sum(everyone) + expected * world.size)
    for gathered in functional.all_gather_into_tensor_coalesced([mine, mine], group):
        assert torch.equal(gathered, torch.cat(everyone))
    for part in functional.reduce_scatter_tensor_coalesced([mine, mine], "sum", [0, 0], group):
        assert torch.equal(part, sum(everyone)[rows])


def test_collectives_are_differentiable(world):
    from torch.distributed.nn import functional as differentiable

    x = numbers(world.rank, (3,), torch.float64).requires_grad_()
    weights = [numbers(rank, (3,), torch.float64, salt=5) for rank in range(world.size)]
    (differentiable.all_reduce(x) * weights[world.rank]).sum().backward()
    assert torch.equal(x.grad, sum(weights))
    x.grad = None
    gathered = differentiable.all_gather(x)
    (torch.stack(gathered) * weights[world.rank]).sum().backward()
    assert torch.equal(x.grad, sum(weights))


def test_coalescing_manager(world):
    tensors = [numbers(world.rank, (n,), torch.float32) for n in (3, 5)]
    with dist._coalescing_manager(device=torch.device("cpu")):
        for tensor in tensors:
            dist.all_reduce(tensor)
    for tensor, n in zip(tensors, (3, 5), strict=True):
        assert torch.equal(tensor, sum(numbers(rank, (n,), torch.float32) for rank in range(world.size)))


def test_a_future_of_a_collective_carries_its_tensors(world):
    tensor = torch.ones(3)
    work = dist.all_reduce(tensor, async_op=True)
    assert work.get_future().then(lambda future: future.value()[0] * 2).wait().tolist() == [2.0 * world.size] * 3
    assert work.result()[0].data_ptr() == tensor.data_ptr()
    assert work.exception() is None


def test_objects(world):
    mine = {"rank": world.rank, "text": "x" * (1 + 100 * world.rank)}
    expected = [{"rank": rank, "text": "x" * (1 + 100 * rank)} for rank in range(world.size)]
    everyone = [None] * world.size
    dist.all_gather_object(everyone, mine)
    assert everyone == expected
    gathered = [None] * world.size if world.is_root else None
    dist.gather_object(mine, gathered, dst=0)
    assert gathered == (expected if world.is_root else None)
    sent = [mine, world.rank]
    dist.broadcast_object_list(sent, src=world.size - 1)
    assert sent == [expected[-1], world.size - 1]
    received = [None]
    dist.scatter_object_list(received, expected if world.is_root else None, src=0)
    assert received == [mine]


def test_the_profiler_shows_collectives_by_name(world):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dist.all_reduce(torch.ones(1000))
        dist.broadcast(torch.ones(1000), 0)
        dist.all_gather([torch.ones(3) for _ in range(world.size)], torch.ones(3))
        dist.barrier()
    shown = {event.key: event.count for event in profile.key_averages() if event.key.startswith("mpi4py:")}
    assert shown == {"mpi4py:allreduce": 1, "mpi4py:broadcast": 1, "mpi4py:allgather": 1, "mpi4py:barrier": 1}
