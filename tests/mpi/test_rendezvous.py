"""PyTorch's own backends started from MPI: no port or address is anybody's choice, and results are the same."""

import pytest
import torch

from hpcllm.errors import UsageError
from hpcllm.mpi import rendezvous

JOB = """
import sys, torch, torch.distributed as dist, hpcllm.mpi
world = hpcllm.mpi.init("cpu", sys.argv[1])
tensor = torch.tensor([1 << world.rank])
dist.all_reduce(tensor)
part = dist.new_group([0, world.size - 1])
if world.rank in (0, world.size - 1):
    dist.all_reduce(tensor, group=part)
assert hpcllm.mpi.init("cpu", sys.argv[1]) is world
alone = hpcllm.mpi.alone(world)
dist.all_reduce(tensor, group=alone.group)
sys.stdout.write(f"{dist.get_backend()} rank {world.rank}: {tensor.item()}\\n")
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("backend", "name"), [("mpi", "mpi4py"), ("gloo", "gloo")])
def test_any_backend_finds_the_ranks_of_mpi(mpirun, backend, name):
    done = mpirun(3, ["-c", JOB, backend], check=True)
    assert sorted(done.stdout.splitlines()) == [f"{name} rank 0: 14", f"{name} rank 1: 7", f"{name} rank 2: 14"]


@pytest.mark.mpi()
def test_what_cannot_start_is_refused_by_all(world):
    with pytest.raises(UsageError, match='"nccl" needs a GPU for every rank, but the ranks run on cpu') as refusal:
        rendezvous.meet(world, "nccl", torch.device("cpu"))
    assert refusal.value.agreed
    with pytest.raises(UsageError, match='"ucc" is not one of mpi, gloo, nccl'):
        rendezvous.meet(world, "ucc", torch.device("cpu"))
