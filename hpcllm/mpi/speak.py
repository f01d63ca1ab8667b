"""Who of a host's ranks speaks, where many have the same to say, and how."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import tempfile

from . import launcher

_claim = socket.socket(socket.AF_UNIX)


class _State:
    joined = False
    board = None  # descriptor of the file in which the ranks of this host note that one has spoken


def write(text):
    """One write to stderr, so that lines of other ranks cannot fall between."""
    try:
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # a closed pipe must not keep the job alive


def set_up(local):
    """From now on one rank of `local`, the communicator of this host's ranks, is the first to speak. Collective."""
    before, _State.board = _State.board, open_board(local)
    _State.joined = True
    if before is not None:
        os.close(before)


def open_board(local):
    """A file that the ranks of one host have open and that has no name any more; None where that cannot be had."""
    name = None
    if local.rank == 0:
        try:
            handle, name = tempfile.mkstemp(prefix="hpcllm-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
            os.close(handle)
        except OSError:
            pass
    name = local.bcast(name)
    board = None
    if name:
        with contextlib.suppress(OSError):
            board = os.open(name, os.O_RDWR)
    local.Barrier()
    if local.rank == 0 and name:
        os.unlink(name)
    return board


def first_of_host():
    """True in the first process of this host that asks, also when that process has ended since."""
    if not _State.joined:
        return _first_child_of_launcher()
    if _State.board is None:
        return True
    fcntl.lockf(_State.board, fcntl.LOCK_EX)
    try:
        first = os.pread(_State.board, 1, 0) == b""
        os.pwrite(_State.board, b"x", 0)
        return first
    finally:
        fcntl.lockf(_State.board, fcntl.LOCK_UN)


def _first_child_of_launcher():
    """The same before MPI is up: a launcher's processes on one host are children of one parent."""
    if launcher.find()[0] is None:
        return True
    try:
        _claim.bind(f"\0hpcllm-{os.getppid()}".encode())  # a name without a file, held until this process ends
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True
