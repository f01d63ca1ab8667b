"""MPI for PyTorch and for hpcllm; the only package that imports mpi4py. Usable on its own:

import hpcllm.mpi
world = hpcllm.mpi.init()        # under mpirun or srun; torch.distributed now runs over MPI
model = DistributedDataParallel(model.to(world.device))
"""

from .abort import end_all, has_outlived, leave_together
from .world import World, agree, alone, init, join, on_root, regroup, remain, teams, together

__all__ = [
    "World",
    "agree",
    "alone",
    "end_all",
    "has_outlived",
    "init",
    "join",
    "leave_together",
    "on_root",
    "regroup",
    "remain",
    "teams",
    "together",
]
