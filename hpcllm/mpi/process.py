"""What the kernel tells of a process, this host's: proc(5). Imports neither torch nor mpi4py."""

import os
from dataclasses import dataclass

# Who starts ranks: mpirun of Open MPI (PRRTE) and of MPICH (Hydra), Slurm's daemon of a job step, others' names.
LAUNCHERS = {"mpirun", "mpiexec", "prterun", "prted", "orterun", "orted", "mpiexec.hydra", "hydra_pmi_proxy"}
LAUNCHERS |= {"slurmstepd", "flux-shell"}  # of one job step; daemons of a node, which live on, are none


@dataclass(frozen=True)
class Process:
    """state: a letter of proc(5), R runs. born: clock tick of its start, by which two of one number are told apart."""

    number: int
    name: str
    state: str
    parent: int
    born: int

    @property
    def began_s(self):
        """Its start, in seconds of CLOCK_BOOTTIME."""
        return self.born / os.sysconf("SC_CLK_TCK")


def look(number):
    """The `Process` of that number. OSError where there is none, or users may not see each other's."""
    with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
        head, _, rest = file.read().rpartition(")")
    fields = rest.split()
    return Process(number, head.partition("(")[2], fields[0], int(fields[1]), int(fields[19]))


def ancestors():
    """The `Process`es above this one, its parent first, as far as they can be seen."""
    number = os.getppid()
    while number:
        try:
            above = look(number)
        except OSError:
            return
        yield above
        number = above.parent


def state(number, born):
    """ "runs", "stopped" or "gone": the process `number` that started at clock tick `born`."""
    try:
        seen = look(number)
    except OSError:
        return "gone"
    if seen.born != born or seen.state in "ZX":
        return "gone"
    return "stopped" if seen.state in "Tt" else "runs"


def namespace():
    """Which numbering of processes this one lives in; two containers on one host may each have their own."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
