"""Where the time goes between the launcher's start and the first step, part by part. Needs neither MPI nor torch."""

import os
import time

# Who starts ranks: mpirun of Open MPI (PRRTE) and MPICH (Hydra), Slurm's daemon of a job step, the others' names.
_LAUNCHERS = {"mpirun", "mpiexec", "prterun", "prted", "orterun", "orted", "mpiexec.hydra", "hydra_pmi_proxy"}
_LAUNCHERS |= {"slurmstepd", "flux-shell"}  # of one job step; daemons of a node, which live on, are none


class Parts:
    """A stopwatch that has been running since the launcher's process on this host began, or else this one.

    seconds: {part: seconds of this process}, in order. "launch" ends where this process began, "python" where this
    object is made.
    """

    def __init__(self):
        began, parent, _ = _process(os.getpid())
        self.seconds, self._last = {}, began
        try:
            launched, _, name = _process(parent)
        except OSError:  # where users may not see each other's processes
            name = None
        if name in _LAUNCHERS:
            self.seconds["launch"] = began - launched
        self.end("python")

    def end(self, part):
        """What has passed since the last part was `part`."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def describe(self):
        """In words: 3.21 s: python 0.10, mpi 0.50, and so on."""
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.2f} s: {parts}"


def age_s():
    """Seconds since this process began."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - _process(os.getpid())[0]


def _process(number):
    """(start in seconds of CLOCK_BOOTTIME, parent, name) of a process; proc(5)."""
    with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
        head, _, rest = file.read().rpartition(")")
    fields = rest.split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK"), int(fields[1]), head.partition("(")[2]
