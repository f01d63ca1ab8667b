"""How far all_reduce over MPI is from the exact sum: bf16, fp16, fp32, fp64 against float64, int64 against integers.

    mpirun -np 4 python -m benchmarks.allreduce_accuracy [--numel 1 1000003 16777217]

Every rank sums its own normally distributed numbers (int64: any 60 bits) with torch.distributed over `hpcllm.mpi`.
The reference is the sum in rank order in float64 (int64: in integers) of the numbers that the ranks hold, computed by
each rank for itself. For fp64 that is the same arithmetic, so its error there is 0 when no addition is lost or done
twice. Printed for each dtype and size, over all elements and ranks:

    max error      largest |result - reference|
    relative       the same divided by the largest |reference|
    roundings      largest error of an element in units of the dtype's spacing (unit in the last place) at that
                   element; fp32: at the sum of its terms' magnitudes. One rounding is at most 0.5; n ranks summed
                   in fp32 round n - 1 times

and at the end whether all ranks hold the same bytes. Exit code 1 if 16-bit results are not rounded once from a
float32 sum (more than 0.51 where the terms do not cancel to almost nothing), fp32 errs by more than its roundings,
integers are not exact, or ranks differ.
The last table is kept in benchmarks/results/allreduce_accuracy.md. It is no measure of speed.
"""

import argparse
import platform
import sys

import torch
import torch.distributed as dist

import hpcllm.mpi

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64)
SIZES = (1, 1_000_003, (1 << 24) + 1)
# 16-bit elements whose terms cancel to less than this are left out of `roundings` (not of the other columns): there
# the error of one float32 addition of the terms is seen beside the rounding of the tiny sum.
CANCELLED = 2.0**-6


def numbers(rank, numel, dtype):
    """The addend of `rank`, on every rank the same."""
    draw = torch.Generator().manual_seed(rank)
    if dtype is torch.int64:
        return torch.randint(-(1 << 60), 1 << 60, (numel,), generator=draw)
    return torch.randn(numel, generator=draw, dtype=torch.float32 if dtype.itemsize < 8 else dtype).to(dtype)


def exact_sum(size, numel, dtype):
    """The sum over `size` ranks and the sum of magnitudes, in float64 or int64."""
    total = numbers(0, numel, dtype).to(torch.int64 if dtype is torch.int64 else torch.float64)
    magnitude = total.abs()
    for rank in range(1, size):
        addend = numbers(rank, numel, dtype)
        total += addend
        magnitude += addend.abs()
    return total, magnitude


def spacing(values, dtype):
    """Distance of the numbers of `dtype` at |values|."""
    _, exponent = torch.frexp(values)
    return torch.exp2((exponent - 1).double()) * torch.finfo(dtype).eps


def errors(result, reference, magnitude):
    """(max error, relative to the largest |reference|, roundings) of one rank's result."""
    if result.dtype is torch.int64:
        worst = int((result - reference).abs().max())
        return float(worst), worst / max(1, int(reference.abs().max())), float(worst)
    error = (result.double() - reference).abs_()
    worst, largest = error.max().item(), reference.abs().max().item()
    if result.dtype.itemsize == 2:
        roundings = torch.where(reference.abs() > CANCELLED, error / spacing(reference, result.dtype), 0.0)
    else:
        roundings = error / spacing(magnitude, result.dtype)
    return worst, worst / largest, roundings.max().item()


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--numel", type=int, nargs="+", default=SIZES)
    sizes = arguments.parse_args().numel
    world = hpcllm.mpi.init("cpu")
    say = print if world.is_root else lambda *_: None
    say(f"{world.size} ranks, {world.library}, torch {torch.__version__}, Python {platform.python_version()}\n")
    say("| dtype | elements | max error | relative | roundings |\n|---|---|---|---|---|")
    wrong = []
    for dtype in DTYPES:
        for numel in sizes:
            tensor = numbers(world.rank, numel, dtype)
            dist.all_reduce(tensor)
            mine = errors(tensor, *exact_sum(world.size, numel, dtype))
            worst, relative, roundings = (max(column) for column in zip(*world.comm.allgather(mine), strict=True))
            name = str(dtype).removeprefix("torch.")
            say(f"| {name} | {numel} | {worst:.3g} | {relative:.3g} | {roundings:.4f} |")
            root = tensor.clone()
            dist.broadcast(root, 0)
            if not all(world.comm.allgather(torch.equal(root, tensor))):
                wrong.append(f"{name}, {numel} elements: the ranks hold different bytes")
            if roundings > {2: 0.51, 4: 0.5 * (world.size - 1), 8: 0.0}[dtype.itemsize]:
                wrong.append(f"{name}, {numel} elements: {roundings:.3f} roundings")
    say("\n" + ("\n".join(wrong) or "All ranks hold the same bytes."))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
