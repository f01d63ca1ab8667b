"""An error on one rank ends the whole job, at once and with the right exit code.

Without this, Python unwinds the failing rank to MPI_Finalize, which waits for ranks that wait in a
collective for the failing one, until the time limit. `install` changes what happens to an exception that
nobody caught (in any thread) and to `sys.exit(n)`; nothing else of the interpreter.
"""

import os
import sys
import threading
import time
import traceback

from ..errors import Refusal

# A rank waits this long, times its rank, before it speaks. Where all ranks fail alike, rank 0 prints the
# one traceback and ends the job before the others open their mouths.
_TURN_S = 0.15
_LAST_TURN = 10


def install(world):
    """Let uncaught exceptions and non-zero `sys.exit` on any rank of `world` abort all of it."""

    def abort(code):
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass  # a closed pipe must not keep the job alive
        world.comm.Abort(code)
        os._exit(code)  # some libraries return from MPI_Abort before the signal arrives

    def report(kind, error, trace, where=""):
        time.sleep(_TURN_S * min(world.rank, _LAST_TURN))
        head = f"hpcllm: rank {world.rank} of {world.size} on {world.host}{where}"
        if isinstance(error, Refusal):
            sys.stderr.write(f"{head}: {error}\n")
            return error.code
        text = "".join(traceback.format_exception(kind, error, trace))
        # One write, so that lines of other ranks cannot fall between.
        sys.stderr.write(f"{head}: uncaught {kind.__name__}; all ranks are being ended\n{text}")
        return 130 if issubclass(kind, KeyboardInterrupt) else 1

    def excepthook(kind, error, trace):
        abort(report(kind, error, trace))

    def thread_excepthook(args):
        if args.exc_type is not SystemExit:
            abort(report(args.exc_type, args.exc_value, args.exc_traceback, f", thread {args.thread.name}"))

    def leave(code=None):
        # As the interpreter does: None is success, an integer is the code, anything else is printed.
        if code is None or code == 0:
            plain_exit(code)
        if getattr(leave, "together", False):
            plain_exit(code)
        if not isinstance(code, int):
            sys.stderr.write(f"{code}\n")
        abort(code if isinstance(code, int) else 1)

    plain_exit = sys.exit
    sys.excepthook = excepthook
    threading.excepthook = thread_excepthook
    sys.exit = leave
    return leave
