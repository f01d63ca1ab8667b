"""How a rank leaves: an error on one rank ends the whole job, at once, with one traceback and the right exit code.

Without this, Python unwinds the failing rank to MPI_Finalize, which waits for ranks that wait in a collective for
the failing one, until the time limit. What `install` changes of the interpreter is what happens to an exception
that nobody caught (in any thread), to `sys.exit` (and the builtins exit and quit), and at the very end:

- uncaught exception: one traceback with rank and host, MPI_Abort(1); KeyboardInterrupt: 130; a Refusal: its sentence
  and its code, quietly where all ranks agreed on it.
- `os._exit`: names the rank, while MPI is up.
- `sys.exit(n)`, n not 0: unwinds as always and may be caught. Once it has left the program, the rank looks whether
  the others are leaving too: then all end quietly, each with its code; otherwise MPI_Abort(n).

Not seen: `raise SystemExit(n)` written out, which says on purpose "only this process" (see `leave_together`), and a
`sys.exit` imported by name before `hpcllm.mpi.join`. Signals are left as they are (training notes some, see
`hpcllm.stopping`): a rank that one kills is noticed by the launcher, and named by `watch`, which is also for what does
not fail but hangs. Children made by fork behave as if nothing had been installed.

Under `mpirun --with-ft` it is not MPI_Abort that ends the others but `alarm`.
"""

import array
import atexit
import builtins
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback

from ..errors import Refusal
from . import launcher, progress, speak

# As a shell says it: ended by SIGKILL. That of a job in which a rank was; job scripts start such a job again.
KILLED_CODE = 137
# A rank that leaves with an error waits this long for the others to leave too, before it ends them.
_TOGETHER_S = 1.0
# Processes that MPI does not join wait this long for each other before they refuse to go on.
_ALONE_S = 2.0
# Failing ranks of one host settle at once who speaks; the hosts take turns, host 0 first.
_TURN_S, _LAST_TURN = 0.3, 8
# A rank that only fails because another one did leaves the word to that one for so long.
_SECONDARY_S = 2.0
# MPICH's mpiexec forgets what it has not read when it ends a job.
_READ_S = 0.2
# The ranks that do not speak expect to be killed; after this long they end the job themselves.
_KILLED_S = 8.0
# A spare looks so often whether it is needed; the others wait for it.
_LOOK_S = 0.02
# Tag of the word by which those who leave tell spares so.
_ENDED = 1
_exit_at_once = os._exit
_abandoned = []


class FailedElsewhere(RuntimeError):
    """Raised on the ranks that have nothing to do with an error, where another rank has the traceback."""


class Exit(SystemExit):
    """What `sys.exit` raises once `install` ran. The interpreter reads `code` when it has left the last frame."""

    @property
    def code(self):
        status = self.args[0] if self.args else None
        return _last_word(status) if _outside_the_program() else status

    @code.setter
    def code(self, status):
        self.args = (status,)


class _State:
    world = None  # the World once MPI is up
    farewell = None  # a communicator for nothing but leaving
    statuses = None  # (request, exit codes of all ranks): the farewell under way
    survives = False  # a rank that dies does not end the job
    outlived = False  # ranks have died, and this one goes on
    code = 0  # with which the program ends, as far as it is known
    process = None  # process id in which `install` ran


def install():
    """Take over uncaught exceptions and `sys.exit`. Before MPI is up only Refusals are handled."""
    if _State.process == os.getpid():
        return
    _State.process = os.getpid()
    sys.excepthook = _excepthook(sys.excepthook)
    threading.excepthook = _thread_excepthook(threading.excepthook)
    sys.exit = leave
    os._exit = exit_at_once
    for name in ("exit", "quit"):
        if hasattr(builtins, name):
            setattr(builtins, name, leave)


def joined(world, local):
    """From now on errors end all ranks of `world`; `local`: communicator of this host's ranks. Collective."""
    again = _State.world is not None
    if (alarm := _alarm()) and not again:
        alarm.set_up(world, local)
    _State.farewell, _State.statuses = world.comm.Dup(), None
    speak.set_up(local)
    # MPICH's processes map all of a host's when they start, and leave them behind when one of them is killed. (Open
    # MPI's are opened when first needed, and its mpirun removes them.)
    remove_segments("mpich_shm_")
    _State.world = world
    if not again:
        # MPI is finalised after the functions registered here.
        atexit.register(_goodbye)


def _alarm():
    """The module `alarm` where it may be what ends the other ranks, None where MPI_Abort does."""
    if not launcher.fault_tolerant():
        return None
    from . import alarm

    return alarm


def survive_deaths():
    """From now on the death of a rank is somebody else's business (`survive`) and does not end the job."""
    _State.survives = True


def survives():
    """Whether that is so."""
    return _State.survives


def outlived():
    """Other ranks have died: this one must not enter MPI_Finalize, which may wait for them. See `leave_together`."""
    _State.outlived = True


def leave(status=None, /):
    """sys.exit: raise SystemExit(status); what follows when nobody catches it is said at the top of this file."""
    raise Exit(status)


def leave_together(code, sentence=None):
    """End the program of every rank with exit code `code`, quietly; root prints `sentence` on stderr.

    For what all ranks have agreed on; every rank must call it. Raises SystemExit.
    """
    # `srun --kill-on-bad-exit` sends SIGTERM to the others when the first rank is gone, and would report 143.
    if launcher.find()[1] > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _say_once(sentence)
    _State.code = code
    if _State.outlived and _alive():
        _leave_without_finalizing(code)
    raise SystemExit(code)


def leave_with_others(woken):
    """Sleep until all others come to their end, and end with their exit code; returns once `woken()` is true.

    For spares, who have nothing else to do. `woken` is asked fifty times a second.
    """
    codes = array.array("i", [0] * _State.world.size)
    request = _State.farewell.Iallgather(array.array("i", [0]), codes)
    _State.statuses = request, codes
    _abandoned.append(codes)  # it is written to as long as MPI likes
    while not woken():
        try:
            if request is not None and request.Test():
                leave_together(max(codes))
        except _mpi_error():
            request = None  # of somebody who has died; those that are left will say how to go on
        if request is None:
            with contextlib.suppress(_mpi_error()):
                _leave_if_told()
        time.sleep(_LOOK_S)


def _leave_if_told():
    """End as the others have, if one of them has told of it (`_tell`)."""
    _State.farewell.Ack_failed(_State.farewell.size)  # or nothing could be heard from anybody
    if _State.farewell.Iprobe(tag=_ENDED):
        word = array.array("i", [0])
        _State.farewell.Recv(word, tag=_ENDED)
        outlived()
        leave_together(word[0])


def _tell(code):
    """Tell the others that this rank ends with `code`, since a farewell in which one has died tells them nothing.

    For spares, to whom all who leave look dead. The first rank that is left speaks.
    """
    from mpi4py import MPI

    farewell = _State.farewell
    gone = MPI.Group.Translate_ranks(farewell.Get_failed(), None, farewell.group)
    if set(range(farewell.rank)) <= set(gone):
        for other in set(range(farewell.rank + 1, farewell.size)) - set(gone):
            with contextlib.suppress(MPI.Exception):  # it has left as well
                farewell.Send(array.array("i", [code]), other, _ENDED)


def _mpi_error():
    from mpi4py import MPI

    return MPI.Exception


def has_outlived():
    """True where ranks of this job have died and the others went on: programs end by `leave_together` then."""
    return _State.outlived


def _leave_without_finalizing(code):
    """The end of a rank whose job has lost others: when the rest has come to its end too, without MPI_Finalize."""
    speak.write("")
    _farewell(code)
    progress.leave_job()
    remove_segments()
    _exit_at_once(code)


def _farewell(code):
    """Wait until all others have come to their end; False if one has died instead."""
    try:
        _all_leave(code, float("inf"))
    except _mpi_error():
        if _State.survives:
            _tell(code)
        return False
    return True


def _say_once(sentence):
    if _State.world is not None:
        speaks = _State.world.rank == 0
    else:
        speaks = launcher.speaks()
    if speaks and sentence:
        speak.write(f"{sentence}\n")
    if _State.world is None and launcher.find()[1] > 1:
        # No MPI, so each process is on its own: give all of them time to come here before the launcher, seeing the
        # first one end with an error, kills the rest.
        time.sleep(_ALONE_S)


def _alive():
    """True where MPI is up in this very process."""
    if _State.world is None or _State.process != os.getpid():
        return False
    from mpi4py import MPI

    return not MPI.Is_finalized()


def _name():
    return f"rank {_State.world.rank} of {_State.world.size} on {_State.world.host}"


def remove_segments(kinds=("mpich_shm_", "sm_segment.")):
    """Unlink the shared-memory files that MPI has mapped here, which it would leave behind."""
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/dev/shm/" in line}
        for path in paths:
            if os.path.basename(path).startswith(kinds):
                with contextlib.suppress(OSError):
                    os.unlink(path)


def end_all(code):
    """End the processes of all ranks at once, from any rank or thread, with exit code `code`. Does not return."""
    progress.leave_job()
    speak.write("")
    time.sleep(_READ_S)
    if _alive():
        from mpi4py import MPI

        remove_segments()
        if (alarm := _alarm()) and alarm.ring():
            _exit_at_once(code)
        # Not the world's own communicator: MPICH's mpiexec would often return 9 (the others' SIGKILL) for `code`.
        MPI.COMM_WORLD.Abort(code)
    _exit_at_once(code)  # some libraries return from MPI_Abort before the signal arrives


# ---- sys.exit and the normal end


def _outside_the_program():
    """True when the caller's caller was called by the interpreter itself, with no Python code below."""
    try:
        sys._getframe(2)
    except ValueError:
        return threading.current_thread() is threading.main_thread()
    return False


def exit_at_once(status):
    """os._exit: while MPI is up it ends the job, and not every launcher says which rank that was."""
    if _alive() and speak.first_of_host():
        ends = "" if launcher.fault_tolerant() else ", which ends the job"
        speak.write(f"hpcllm: {_name()} leaves by os._exit({status}){ends}\n")
        time.sleep(_READ_S)
    _exit_at_once(status)


def _all_leave(status, patience_s):
    """Tell the others that this rank ends with `status`; their codes if all do within `patience_s`, else None."""
    if _State.statuses is None:
        codes = array.array("i", [0] * _State.world.size)
        request = _State.farewell.Iallgather(array.array("i", [status]), codes)
        _State.statuses = request, codes
    request, codes = _State.statuses
    deadline = time.monotonic() + patience_s
    while not request.Test():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)
    return list(codes)


def _last_word(code):
    """The exit code of a program that `sys.exit(code)` has ended, read by the interpreter once."""
    status = 0 if code is None else code & 0xFF if isinstance(code, int) else 1
    if status == 0 or not _alive():
        return code
    _State.code = status
    try:
        codes = _all_leave(status, _TOGETHER_S)
    except _mpi_error():  # one has died instead
        codes = None
    if not isinstance(code, int):
        # Printed by the first of those that end with an error.
        if codes is None or _State.world.rank == min(r for r, other in enumerate(codes) if other != 0):
            speak.write(f"{code}\n")
        code = status
    if codes is None:
        if speak.first_of_host():
            speak.write(
                f"hpcllm: {_name()} has left with exit code {status}, the others have not; all are being ended\n"
            )
        end_all(status)
    return code


def _goodbye():
    """A rank that has come to its end waits here (and not, as in MPI_Finalize, with a busy core) for the others."""
    if not _alive():
        return
    if _State.outlived:
        _leave_without_finalizing(_State.code)
    if not _farewell(_State.code):  # one has died, for which MPI_Finalize may wait
        if _alarm() and not _State.survives:
            time.sleep(_TOGETHER_S)  # an error may have ended it, and is about to end this rank, with its own code
        _leave_without_finalizing(_State.code or (0 if _State.survives else KILLED_CODE))
    if alarm := _alarm():
        alarm.put_away()
    if _State.world.size == 1:
        remove_segments()  # Open MPI leaves that of a process without mpirun even after MPI_Finalize


# ---- uncaught exceptions


def _excepthook(before):
    def excepthook(kind, error, trace):
        if _State.process != os.getpid():
            before(kind, error, trace)
        elif isinstance(error, Refusal) and error.agreed:
            _say_once(f"hpcllm: error: {error}")
            raise Exit(error.code)  # the interpreter takes this for the end of the program
        elif isinstance(error, Refusal) or _alive():
            _fail(kind, error, trace)
        else:
            before(kind, error, trace)

    return excepthook


def _thread_excepthook(before):
    def excepthook(args):
        if _alive() and args.exc_type is not SystemExit and not issubclass(args.exc_type, Exit):
            name = args.thread.name if args.thread else "unknown"
            _fail(args.exc_type, args.exc_value, args.exc_traceback, f", thread {name}")
        else:
            before(args)

    return excepthook


def _fail(kind, error, trace, where=""):
    """Print the one traceback of the job, or wait for the rank that does, and end all ranks."""
    code = error.code if isinstance(error, Refusal) else 130 if issubclass(kind, KeyboardInterrupt) else 1
    if issubclass(kind, FailedElsewhere):
        time.sleep(_SECONDARY_S)
    world = _State.world
    if world is not None:
        # Where mpirun does not end the others, host 0 waits too: it may be what `alarm` does that has raised.
        alarm = _alarm()
        time.sleep(_TURN_S * min(world.hosts.index(world.host) + (alarm is not None), _LAST_TURN))
        if alarm and code == 1 and not _State.survives and alarm.deaths():
            code = KILLED_CODE
        head = f"hpcllm: {_name()}{where}"
    else:
        head = f"hpcllm: {socket.gethostname()}"
    if not speak.first_of_host():
        # A death may have been told of by a rank that does not end the job, since what it waited in has ended.
        time.sleep(_KILLED_S if world is not None and code != KILLED_CODE else 0)
    elif isinstance(error, Refusal):
        speak.write(f"{head}: {error}\n")
        time.sleep(0 if world is not None else _TOGETHER_S)  # holding the claim
    else:
        text = "".join(traceback.format_exception(kind, error, trace))
        speak.write(f"{head}: uncaught {kind.__name__}; all ranks are being ended\n{text}")
    end_all(code)
