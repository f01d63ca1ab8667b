"""A rank of a job whose ranks die, at a place of a step; what test_recovery and faults/ulfm start. Not a test.

    python dying.py PLACE:STEP:RANK[,RANK] ... -- arguments of hpcllm

RANK: as the job began; STEP: the one under way, from 1; PLACE: one of `PLACES`. When it happens, the time is written
into the file that DYING_NOTE names, and each rank notes in a file of that name and its rank the number of its process
and then when it has committed which step. At the place "spare" it is not RANK that dies, but the last rank of the job.
"""

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from hpcllm import imports

imports.remember()
with imports.undisturbed():  # as quickly as hpcllm's own command
    import torch.distributed as dist

    from hpcllm import __main__, blocks, checkpoint, evaluate, monitor, mpi, optimizer, weights
    from hpcllm.mpi import abort, shared, survive
    from hpcllm.parallel.apply import Placed

NOTE = os.environ.get("DYING_NOTE")
PIDS = []  # of the ranks as the job began


def die():
    if NOTE:
        Path(NOTE).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


class Deaths:
    """When this rank dies. step: the one under way, or just taken."""

    def __init__(self, planned, rank):
        self._planned = {(place, int(step)) for place, step, ranks in planned if str(rank) in ranks.split(",")}
        self.step = 0

    def at(self, place):
        return (place, self.step) in self._planned

    def before(self, owner, name, place, how=die):
        """Have this rank die when `owner`'s function `name` is called, in the steps planned."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def called(*arguments, **named):
            if self.at(place):
                how()
            return function(*arguments, **named)

        setattr(owner, name, called)


def kill_last():
    """Have the last rank of the job die, which does nothing but wait where it is a spare."""
    os.kill(PIDS[-1], signal.SIGKILL)


def stop():
    """Do nothing any more, and not die."""
    os.kill(os.getpid(), signal.SIGSTOP)


def spoil():
    """Flip a bit of the newest checkpoint's weights."""
    folder = next(word.partition("=")[2] for word in sys.argv if word.startswith("run.output_dir="))
    with open(checkpoint.find(folder)[-1] / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def soon():
    """Die in the middle of what is called."""
    threading.Timer(0.0005, die).start()


# Where a rank dies: owner of a function and its name.
PLACES = {
    "between": (optimizer, "learning_rate", die),
    "collective": (shared.Shared, "all_reduce", soon),
    "clip": (Placed, "clip_gradients", die),
    "spoil": (Placed, "clip_gradients", spoil),
    "commit": (survive, "commit", die),
    "stuck": (survive, "commit", stop),
    "absent": (survive, "shrink", stop),
    "applied": (monitor.Clock, "collect", die),
    "evaluate": (evaluate, "evaluate", die),
    "write": (blocks, "write", die),
    "finish": (checkpoint, "finish", die),
    "rebuild": (Placed, "moved", die),
    "share": (optimizer, "share", die),
    "shrink": (survive.Comm, "Shrink", soon),
    "regroup": (dist, "destroy_process_group", die),
    "fill": (weights, "fill", die),
    "farewell": (abort, "_all_leave", die),
    "spare": (optimizer, "learning_rate", kill_last),
}


def main():
    at = sys.argv.index("--")
    world = mpi.join()
    PIDS.extend(world.comm.allgather(os.getpid()))
    deaths = Deaths([word.split(":") for word in sys.argv[1:at]], world.rank)
    rates = optimizer.learning_rate

    def counting(step, plan):
        deaths.step = step + 1
        return rates(step, plan)

    optimizer.learning_rate = counting
    for place, (owner, name, how) in PLACES.items():
        deaths.before(owner, name, place, how)
    if NOTE:
        committed = survive.commit

        def note(*what):
            with open(f"{NOTE}-{world.rank}", "a", encoding="utf-8") as file:
                file.write(json.dumps(what) + "\n")

        def noting(comm, *well):
            committed(comm, *well)
            note(deaths.step, time.time())

        note("process", os.getpid())
        survive.commit = noting
    __main__.main(sys.argv[at + 1 :])


if __name__ == "__main__":
    main()
