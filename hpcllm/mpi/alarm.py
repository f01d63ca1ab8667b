"""How one rank ends a job that survives deaths (`mpirun --with-ft`).

MPI_Abort does not: Open MPI 5.0.11 takes that rank for dead and lets the others run on, without their mpirun or under
one that never ends, and where two ranks call it at once mpirun crashes or hangs. So the rank that ends the job revokes
a communicator that is there for nothing else, which reaches all hosts, and leaves with the exit code: mpirun returns
the first one that is not 0, and counts none for processes that a signal has ended. A thread of every process looks
whether the communicator has been revoked, and kills the processes of its host, those that hang too. As it calls MPI
for that, it also ends with mpirun, which a process that only computes outlives otherwise.
"""

import contextlib
import fcntl
import os
import signal
import threading
import time

from mpi4py import MPI

from . import abort, process

# The thread looks so often.
_LOOK_S = 0.1
# The rank that ends all waits so long for those of other hosts to be gone.
_REACHED_S = 3.0


class _State:
    comm = None  # whose end is that of the job; None when MPI is about to be finalised
    processes = ()  # the other processes of this host: number, clock tick of their start
    board = None  # descriptor of a file of this host; who kills the others has it locked until its own end
    watcher = None
    lock = threading.Lock()  # held by who is within MPI here


def set_up(world, local):
    """From now on `ring` ends all ranks of `world`. local: communicator of this host's ranks. Collective."""
    here = process.look(os.getpid())
    me = here.number, here.born, process.namespace()
    processes = [one[:2] for one in local.allgather(me) if one != me and one[2] == me[2]]
    board, comm = abort.open_board(local), MPI.Intracomm.Dup(world.comm)  # which nobody but this module revokes
    _look()  # at what is replaced
    with _State.lock:
        if _State.board is not None:
            os.close(_State.board)
        _State.comm, _State.processes, _State.board = comm, processes, board
    if _State.watcher is None and MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        _State.watcher = threading.Thread(target=_watch, name="hpcllm alarm", daemon=True)
        _State.watcher.start()


def put_away():
    """MPI is about to be finalised."""
    with _State.lock:
        _State.comm = None


def ring():
    """End all other processes of the job; the caller ends this one then, with the exit code of the job."""
    with contextlib.suppress(MPI.Exception), _State.lock:
        if _State.comm is None:
            return
        others = _State.comm.size - 1
        _claim()
        _State.comm.Revoke()
        _kill()
        deadline = time.monotonic() + _REACHED_S
        while _State.comm.Get_failed().Get_size() < others and time.monotonic() < deadline:
            MPI.COMM_SELF.Iprobe()  # who calls nothing sends nothing
            time.sleep(0.01)


def _claim():
    """True in the one process of this host that ends the others; they wait here for their end. False: nobody can."""
    if _State.board is not None:
        fcntl.lockf(_State.board, fcntl.LOCK_EX)
    return _State.board is not None


def _kill():
    """End the other processes of this host."""
    for number, born in _State.processes:
        if process.state(number, born) != "gone":
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)


def _look():
    """End the processes of this host if the job has been ended."""
    with _State.lock:
        if _State.comm is None or MPI.Is_finalized():
            return
        MPI.COMM_SELF.Iprobe()  # who calls nothing hears of nothing
        if not _State.comm.Is_revoked():
            return
        if _claim():
            _kill()
        abort.remove_segments()
        os.kill(os.getpid(), signal.SIGKILL)


def _watch():
    while True:
        time.sleep(_LOOK_S)
        _look()
