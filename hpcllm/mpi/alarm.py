"""How one rank ends a job that survives deaths (`mpirun --with-ft`).

MPI_Abort does not: Open MPI 5.0.11 takes that rank for dead and lets the others run on, without their mpirun or under
one that never ends, and where two ranks call it at once mpirun crashes or hangs. So the rank that ends the job revokes
a communicator that is there for nothing else, which reaches all hosts, and leaves with the exit code: mpirun returns
the first one that is not 0, and counts none for processes that a signal has ended. A thread of every process looks
whether the communicator has been revoked, and kills the processes of its host, those that hang too, unless all of
them do. As it calls MPI for that, it also ends with mpirun, which a process that only computes outlives otherwise.
"""

import contextlib
import fcntl
import os
import signal
import threading
import time

from mpi4py import MPI

from . import abort, process, speak

# The thread looks so often.
_LOOK_S = 0.1
# Before anybody is killed, what has been revoked gets so long to reach the other hosts: they tell each other.
_SPREAD_S = 0.2
# The rank that ends all waits so long for those of other hosts to be gone.
_REACHED_S = 3.0
# Nobody waits longer for another process, or thread, that was to end this one.
_PATIENCE_S = 2 * _REACHED_S


class _State:
    comm = None  # whose end is that of the job; None without ULFM, and when MPI is about to be finalised
    processes = ()  # the other processes of this host: number, clock tick of their start
    board = None  # descriptor of a file of this host; who kills the others has it locked until its own end
    lock = threading.Lock()  # held by who is within MPI here


def refusal(library):
    """Why no rank can end the others here, None where it can. library: of MPI, in words. Not collective.

    Most calls of ULFM seem to succeed on an MPI without it; Revoke alone tells.
    """
    own = MPI.COMM_SELF.Dup()  # of this rank alone: there is nobody who might still be making it
    try:
        own.Revoke()
    except (NotImplementedError, MPI.Exception):
        return f"needs an MPI library with ULFM, which {library} is not"
    finally:
        own.Free()
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return "needs an MPI that was started with MPI_THREAD_MULTIPLE"
    return None


def set_up(world, local):
    """From now on `ring` ends all ranks of `world`. local: communicator of this host's ranks. Collective, once."""
    if refusal(world.library):
        return
    here = process.look(os.getpid())
    me = here.number, here.born, process.namespace()
    _State.processes = [one[:2] for one in local.allgather(me) if one != me and one[2] == me[2]]
    _State.board = speak.open_board(local)
    _State.comm = MPI.Intracomm.Dup(world.comm)  # which nobody but this module revokes
    threading.Thread(target=_watch, name="hpcllm alarm", daemon=True).start()


def deaths():
    """Whether ranks of the job have died, as far as is known here."""
    with contextlib.suppress(MPI.Exception):
        return _State.comm is not None and _State.comm.Get_failed().Get_size() > 0
    return False


def put_away():
    """MPI is about to be finalised."""
    with _State.lock:
        _State.comm = None


def ring():
    """End all other processes of the job; the caller ends this one then, with the exit code of the job.

    False where that cannot be.
    """
    comm = _State.comm
    if comm is None:
        return False
    _State.lock.acquire(timeout=_PATIENCE_S)  # and never given back: the thread has nothing to do any more
    _claim()
    with contextlib.suppress(MPI.Exception):
        comm.Revoke()
        _progress(lambda: False, _SPREAD_S)
        _kill()
        _progress(lambda: comm.Get_failed().Get_size() == comm.size - 1, _REACHED_S)
    return True


def _progress(done, seconds):
    """Let MPI send and hear, for so long or until `done()`; who calls nothing does neither."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        MPI.COMM_SELF.Iprobe()
        time.sleep(0.01)


def _claim():
    """Be the one process of this host that ends the others; they wait here for their end. False: nobody can be."""
    deadline = time.monotonic() + _PATIENCE_S
    while _State.board is not None and time.monotonic() < deadline:
        try:
            fcntl.lockf(_State.board, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.01)
        else:
            break
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
        MPI.COMM_SELF.Iprobe()
        if not _State.comm.Is_revoked():
            return
        with contextlib.suppress(MPI.Exception):
            _progress(lambda: False, _SPREAD_S)
        if _claim():
            _kill()
        abort.remove_segments()
        os.kill(os.getpid(), signal.SIGKILL)


def _watch():
    while True:
        time.sleep(_LOOK_S)
        _look()
