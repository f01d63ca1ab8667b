"""Reductions are right: every operation and dtype against one process, 16 bits summed in 32, the same bytes always."""

import functools

import pytest
import torch
import torch.distributed as dist
from rank_tensors import COMPLEX, FLOAT8, FLOATS, INTEGERS, UNSIGNED, expected, finish, inputs, numbers, same

from hpcllm.mpi import reduce

pytestmark = [pytest.mark.mpi(), pytest.mark.filterwarnings("ignore::FutureWarning")]
Op = dist.ReduceOp

PAIRS = [
    *((kind, dtype) for kind in ("SUM", "AVG", "PRODUCT", "MIN", "MAX") for dtype in (*FLOATS, *INTEGERS)),
    *((kind, dtype) for kind in ("BAND", "BOR", "BXOR") for dtype in (*INTEGERS, *UNSIGNED)),
    *((kind, dtype) for kind in ("SUM", "PRODUCT") for dtype in UNSIGNED),
    *((kind, dtype) for kind in ("SUM", "AVG") for dtype in COMPLEX),
    *((kind, torch.bool) for kind in ("SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")),
]


@pytest.mark.parametrize(("kind", "dtype"), PAIRS, ids=lambda value: str(value).removeprefix("torch."))
def test_reductions_are_those_of_one_process(world, kind, dtype):
    op, root = getattr(Op, kind), world.size - 1
    for what, make in inputs(dtype):
        everyone = [make(rank) for rank in range(world.size)]
        answer = expected(kind, everyone)
        parts = [[make(rank, salt=part) for part in range(world.size)] for rank in range(world.size)]
        mine = expected(kind, [parts[rank][world.rank] for rank in range(world.size)])
        for asynchronous in (False, True):
            tensor = make(world.rank)
            finish(dist.all_reduce(tensor, op, async_op=asynchronous), asynchronous)
            assert same(tensor, answer), f"all_reduce {what}"

            tensor = make(world.rank)
            finish(dist.reduce(tensor, root, op, async_op=asynchronous), asynchronous)
            assert same(tensor, answer if world.rank == root else everyone[world.rank]), f"reduce {what}"

            output = make(world.rank, salt=99)
            finish(dist.reduce_scatter(output, parts[world.rank], op, async_op=asynchronous), asynchronous)
            assert same(output, mine), f"reduce_scatter {what}"

            whole = torch.stack(parts[world.rank])
            output = torch.zeros(mine.shape).to(dtype)
            finish(dist.reduce_scatter_tensor(output, whole, op, async_op=asynchronous), asynchronous)
            assert same(output, mine), f"reduce_scatter_tensor {what}"


def test_reduce_scatter_of_different_sizes(world):
    parts = [numbers(world.rank, (rank + 1, 2), torch.float32, salt=rank) for rank in range(world.size)]
    output = torch.zeros(world.rank + 1, 2)
    dist.reduce_scatter(output, parts)
    answer = sum(numbers(rank, (world.rank + 1, 2), torch.float32, salt=world.rank) for rank in range(world.size))
    assert torch.equal(output, answer)


def test_premultiplied_sum(world):
    for factor in (0.5, torch.tensor(0.5)):
        op = dist._make_nccl_premul_sum(factor)
        tensor = numbers(world.rank, (7,), torch.float32)
        dist.all_reduce(tensor, op)
        assert torch.equal(tensor, sum(numbers(rank, (7,), torch.float32) * 0.5 for rank in range(world.size)))


def noise(rank, numel, dtype):
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("numel", [1, 100, 100_003])
def test_16_bit_sums_are_summed_in_32_bits_and_rounded_once(world, dtype, numel):
    tensor = noise(world.rank, numel, dtype)
    dist.all_reduce(tensor)
    in_fp32 = functools.reduce(torch.add, [noise(rank, numel, dtype).float() for rank in range(world.size)])
    assert same(tensor, in_fp32.to(dtype))
    exact = sum(noise(rank, numel, dtype).double() for rank in range(world.size))
    half_a_unit = torch.finfo(dtype).eps / 2
    assert ((tensor.double() - exact).abs() <= half_a_unit * 1.001 * exact.abs() + 1e-6).all()


@pytest.mark.mpi(min_size=3)
def test_16_bit_sums_keep_what_16_bit_arithmetic_loses(world):
    # In bfloat16 256 + 1 is 256 again, however often; in float16 60000 + 60000 is infinite.
    small = torch.full((1000,), 256.0 if world.is_root else 1.0, dtype=torch.bfloat16)
    dist.all_reduce(small)
    assert small.tolist() == [torch.tensor(255.0 + world.size).bfloat16().item()] * 1000
    assert small[0] > 256
    large = torch.tensor([{0: 6e4, 1: 6e4, 2: -6e4}.get(world.rank, 0.0)], dtype=torch.float16)
    dist.all_reduce(large)
    assert large.item() == torch.tensor(6e4).half().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_element_has_the_same_sum_in_whatever_tensor_it_travels(world, dtype, monkeypatch):
    # Rank order, ((r0 + r1) + r2) + ..., on both paths of reduce.py, in one round or many, and in reduce_scatter.
    numel = world.size * 30_000
    everyone = [noise(rank, numel, torch.float32).to(dtype) for rank in range(world.size)]
    reference = functools.reduce(torch.add, [tensor.float() for tensor in everyone]).to(dtype)

    whole = everyone[world.rank].clone()
    dist.all_reduce(whole)
    assert same(whole, reference)
    pieces = everyone[world.rank].clone()
    for piece in pieces.split(997):
        dist.all_reduce(piece)
    assert same(pieces, reference)
    scattered = torch.empty(30_000, dtype=dtype)
    dist.reduce_scatter_tensor(scattered, everyone[world.rank])
    assert same(scattered, reference[world.rank * 30_000 : (world.rank + 1) * 30_000])

    monkeypatch.setattr(reduce, "CHUNK_BYTES", 1 << 16)
    rounds = everyone[world.rank].clone()
    dist.all_reduce(rounds)
    assert same(rounds, reference)
    dist.reduce_scatter_tensor(scattered.zero_(), everyone[world.rank])
    assert same(scattered, reference[world.rank * 30_000 : (world.rank + 1) * 30_000])
    rounds = everyone[world.rank].clone()
    dist.reduce(rounds, 0)
    assert same(rounds, reference if world.is_root else everyone[world.rank])


def test_nan_and_infinity_reach_every_rank(world):
    tensor = torch.tensor([1.0, 1.0, float("inf")])
    if world.rank == world.size - 1:
        tensor[0] = float("nan")
    for op in (Op.SUM, Op.MAX, Op.MIN):
        result = tensor.clone()
        dist.all_reduce(result, op)
        assert result.isnan().tolist() == [True, False, False]
        assert result[2].item() == float("inf")


@pytest.mark.parametrize(
    ("kind", "dtype", "sentence"),
    [
        *(("SUM", dtype, "cannot reduce torch.float8_.*; cast it to bfloat16") for dtype in FLOAT8),
        ("AVG", torch.bool, r"AVG of torch\.bool has no meaning"),
        ("BAND", torch.float32, r"BAND of torch\.float32 has no meaning"),
        ("MAX", torch.uint16, r"torch has no MAX of torch\.uint16; cast it"),
        ("PREMUL_SUM", torch.int32, r"PREMUL_SUM of torch\.int32 has no exact answer"),
    ],
)
def test_reductions_without_an_answer_are_refused_by_name(world, kind, dtype, sentence):
    tensor = torch.ones(4).to(dtype)
    op = dist._make_nccl_premul_sum(0.5) if kind == "PREMUL_SUM" else getattr(Op, kind)
    for call in (
        lambda: dist.all_reduce(tensor, op),
        lambda: dist.reduce(tensor, 0, op),
        lambda: dist.reduce_scatter_tensor(tensor[:1], tensor[:1].repeat(world.size), op),
    ):
        with pytest.raises(TypeError, match=sentence):
            call()
    with pytest.raises(TypeError, match="complex numbers have no order"):
        reduce.check(torch.complex64, "MAX")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("numel", [100, 3_000_000])
@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_made_in_inference_mode_and_outside_can_be_summed_in_both(world, dtype, asynchronous, numel, mapped):
    """Memory that is kept between calls must not remember in which of them it was made."""
    own = dist.new_group(list(range(world.size)))  # whose memory is new
    reduce._scratch.blocks.clear()
    make = world.group.allocate_tensor if mapped else torch.empty  # where others map it

    def summed(tensor):
        finish(dist.all_reduce(tensor, group=own, async_op=asynchronous), asynchronous)
        assert torch.equal(tensor, torch.full_like(tensor, world.size))

    with torch.inference_mode():
        inside = make(numel, dtype=dtype).fill_(1)
        summed(inside)
        gathered = make(world.size * numel, dtype=dtype)
        finish(dist.all_gather_into_tensor(gathered, inside, group=own, async_op=asynchronous), asynchronous)
    outside = make(numel, dtype=dtype).fill_(1)
    summed(outside)
    with torch.inference_mode():
        summed(outside.div_(world.size))
    dist.destroy_process_group(own)
