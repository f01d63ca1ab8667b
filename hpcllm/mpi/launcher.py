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
# started) inherits Slurm's variables, so the word of an MPI launcher beats that of the scheduler. PMI's own names
# come last, since MVAPICH, PALS and Flux set them too (PALS has a rank but no size of its own).
# Names: Open MPI docs (mca environment), MPICH/Hydra and PMI-1, MVAPICH user guide, HPE PALS, IBM JSM, Flux, srun(1).
PMI = Launcher("mpiexec (PMI)", "PMI_SIZE", "PMI_RANK")
MPI_LAUNCHERS = (
    Launcher("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    Launcher("MVAPICH's mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    Launcher("PALS mpiexec", "PMI_SIZE", "PALS_RANKID"),
    Launcher("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    Launcher("flux run", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    PMI,
)
SRUN = Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")


def find(environ=os.environ):
    """Return (launcher, size) as the environment tells it, or (None, 1) for a process started by hand.

    srun counts only inside a job step: the shell of a batch script has SLURM_NTASKS and SLURM_PROCID set
    too, although srun did not start it. An MPI launcher that names a rank but not a size is passed over.
    """
    step = environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environ
    tasks = environ.get(SRUN.size) or environ.get("SLURM_NTASKS") or "1"
    for launcher in MPI_LAUNCHERS:
        if environ.get(launcher.size, "").isdigit() and launcher.rank in environ:
            # `srun --mpi=pmi2` sets PMI's names as well; Hydra, which srun may have started, says more than they do.
            by_srun = step and (environ[launcher.size], environ[launcher.rank]) == (tasks, environ["SLURM_PROCID"])
            if not (launcher.size == PMI.size and by_srun and "MPI_LOCALRANKID" not in environ):
                return launcher, int(environ[launcher.size])
    return (SRUN, int(tasks)) if step else (None, 1)


def speaks(environ=os.environ):
    """True in the one process that should print before MPI is up: launcher's rank 0, or a lone process."""
    launcher, _ = find(environ)
    return launcher is None or environ.get(launcher.rank, "0") == "0"


def foreign(launcher, started, version, path):
    """The sentence for an MPI library that would end the process as soon as it is started by `launcher`, else None.

    version: all that MPI_Get_library_version says. MPICH speaks PMIx, the protocol of Open MPI's mpirun, only where
    it was configured to; otherwise its MPI_Init exits with words that nobody understands.
    """
    knows_pmix = "mpich configure" not in version.lower() or "pmix" in version.lower()
    if launcher is not MPI_LAUNCHERS[0] or knows_pmix:
        return None
    library = " ".join(version.split("\n")[0].split())
    return _sentence(launcher, started, "the MPI library cannot be started by it", library, path)


def lone_world(launcher, started, size, library, path):
    """The sentence for `started` processes of `launcher` of which each finds `size` ranks in its own MPI world.

    `library` and `path` name the MPI library that was loaded. None when the two numbers agree, and for the
    components of a heterogeneous Slurm job, where srun counts one component and MPI spans them all.
    """
    if launcher is None or started == size:
        return None
    if launcher is SRUN and size > started and "SLURM_HET_SIZE" in os.environ:
        return None
    return _sentence(launcher, started, f"MPI sees a world of {size}", library, path)


def _sentence(launcher, started, finding, library, path):
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
        f"{launcher.name} started {started} processes ({launcher.size}={started}), but {finding}: "
        f"the launcher and the MPI library do not know each other, so there would be no job of {started} ranks.\n"
        f"  library: {library} ({path})\n"
        f"  cure: {cure}"
    )


# What Open MPI 5's mpirun sets for --with-ft ulfm, and for --mca coll.
_FAULT_TOLERANT, _COLLECTIVES, _HAN_PRIORITY = "OMPI_MCA_mpi_ft_enable", "OMPI_MCA_coll", "OMPI_MCA_coll_han_priority"


def fault_tolerant(environ=os.environ):
    """True where this process was started with fault tolerance, whatever else that may need."""
    return environ.get(_FAULT_TOLERANT, "").strip().lower() in ("1", "true", "yes")


def without_han(environ=os.environ):
    """True where Open MPI has been told not to use coll/han, whose sums are not finished when a rank dies."""
    names = environ.get(_COLLECTIVES, "").strip()
    if environ.get(_HAN_PRIORITY, "").strip() == "0":
        return True
    listed = [name.strip() for name in names.removeprefix("^").split(",")]
    return bool(names) and ("han" in listed) == names.startswith("^")
