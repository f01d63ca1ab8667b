"""What the launcher's environment says about this process, read before MPI is started.

Only reads variables; imports neither mpi4py nor torch. MPI itself is the authority on rank and size
(`world.join`); this module exists to notice when MPI and the launcher disagree, and to let one process
in N speak before MPI is up.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """One start method and the variables by which it numbers its processes."""

    name: str
    size: str
    rank: str


# In the order in which they are believed: `mpirun` inside a Slurm step (or an interactive shell that srun
# started) inherits Slurm's variables, so the word of an MPI launcher beats that of the scheduler.
# Names: Open MPI docs (mca environment), MPICH/Hydra and PMI-1, MVAPICH user guide, IBM JSM, Flux, Slurm srun(1).
MPI_LAUNCHERS = (
    Launcher("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    Launcher("mpiexec (PMI)", "PMI_SIZE", "PMI_RANK"),
    Launcher("MVAPICH's mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    Launcher("PALS mpiexec", "PALS_SIZE", "PALS_RANKID"),
    Launcher("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    Launcher("flux run", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
)
SRUN = Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")


def find(environ=os.environ):
    """Return (launcher, size) as the environment tells it, or (None, 1) for a process started by hand.

    srun counts only inside a job step: the shell of a batch script has SLURM_NTASKS and SLURM_PROCID set
    too, although srun did not start it. An MPI launcher that names a rank but not a size is passed over.
    """
    for launcher in MPI_LAUNCHERS:
        if environ.get(launcher.size, "").isdigit() and launcher.rank in environ:
            return launcher, int(environ[launcher.size])
    if environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environ:
        tasks = environ.get(SRUN.size) or environ.get("SLURM_NTASKS") or "1"
        return SRUN, int(tasks)
    return None, 1


def speaks(environ=os.environ):
    """True in the one process that should print before MPI is up: launcher's rank 0, or a lone process."""
    launcher, _ = find(environ)
    return launcher is None or environ.get(launcher.rank, "0") == "0"


def lone_world(launcher, started, size, library, path):
    """The sentence for `started` processes of `launcher` of which each finds `size` ranks in its own MPI world.

    `library` and `path` name the MPI library that was loaded. None when the two numbers agree, and for the
    components of a heterogeneous Slurm job, where srun counts one component and MPI spans them all.
    """
    if launcher is None or started == size:
        return None
    if launcher is SRUN and size > started and "SLURM_HET_SIZE" in os.environ:
        return None
    if launcher is SRUN:
        cure = (
            "start with `srun --mpi=pmix` (Open MPI) or `srun --mpi=pmi2` (MPICH, Intel MPI); "
            "`srun --mpi=list` shows what this site offers"
        )
    else:
        cure = (
            "start with the mpirun that belongs to this library, or point MPI4PY_LIBMPI at the libmpi that "
            "belongs to this mpirun"
        )
    return (
        f"{launcher.name} started {started} processes ({launcher.size}={started}), but MPI sees a world of {size}: "
        f"the launcher and the MPI library do not know each other, so each process would run the whole job alone.\n"
        f"  library: {library} ({path})\n"
        f"  cure: {cure}"
    )
