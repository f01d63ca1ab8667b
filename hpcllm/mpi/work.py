"""Handles of communication under way or done, as torch expects them, and what is done around every operation.

`timed` wraps each operation: it counts the time, notes the operation where the watchdogs see it (`progress`), and in
checking mode compares the call with those of the other ranks (`check`).
"""

import threading
import time
from functools import wraps

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.autograd import profiler

from . import check
from .device import from_mpi

_communication_ns = 0
_checking = check.wanted()
# What users call the operations whose methods have other names.
_CALLED = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather_coalesced",
    "all_gather_single": "all_gather_into_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
    "alltoall": "all_to_all",
}


class _Thread(threading.local):
    hidden = False


_thread = _Thread()


def communication_s():
    """Seconds that the program has spent in communication calls, or waiting for one, since it started."""
    return _communication_ns / 1e9


def add_communication(nanoseconds):
    """Count `nanoseconds` as communication."""
    global _communication_ns
    _communication_ns += nanoseconds


def hide_time():
    """What this thread does from now on happens while the program computes: its time does not count."""
    _thread.hidden = True


def timed(method):
    """Count the seconds that `method` takes as communication, and let the watchdogs see it.

    For methods of what has a `place` (None: unwatched) and, for collectives, a `checker`. Timed methods must not call
    each other. Where torch's profiler runs, it shows the call as "mpi4py:" and the method's name.
    """
    op, now = _CALLED.get(method.__name__, method.__name__.strip("_")), time.monotonic_ns

    @wraps(method)
    def counted(self, *args, **kwargs):
        place, start = self.place, now()
        number = None if place is None else place.log.enter(place, op, args, start)
        try:
            if _checking:
                check.check(self, op, (*args, *kwargs.values()))
            if profiler._is_profiler_enabled:  # one look; a range costs as much as a small message
                with profiler.record_function(f"mpi4py:{method.__name__}"):
                    return method(self, *args, **kwargs)
            return method(self, *args, **kwargs)
        finally:
            end = now()
            if number is not None:
                place.log.leave(number, end)
            if not _thread.hidden:
                add_communication(end - start)

    return counted


class Done(dist.Work):
    """The handle of a collective that is complete."""

    def __init__(self, tensors):
        super().__init__()
        self._tensors = tensors

    def wait(self, timeout=None):
        return True

    def is_completed(self):
        return True

    def is_success(self):
        return True

    def exception(self):
        return None

    def synchronize(self):
        self.wait()

    block_current_stream = synchronize

    def result(self):
        return self._tensors

    def get_future(self):
        self.wait()
        devices = sorted({t.device for t in self._tensors if not t.is_cpu}, key=str)
        future = torch.futures.Future(devices=devices) if devices else torch.futures.Future()
        future.set_result(self._tensors)
        return future


class Pending(Done):
    """The handle of a send or receive. Keeps the buffer alive; a received tensor is filled in by `wait`.

    place: the group's, for the watchdog; peer: group rank of the other side, MPI.ANY_SOURCE for any.
    """

    def __init__(self, tensor, host, requests, receives, place=None, peer=MPI.ANY_SOURCE):
        super().__init__([tensor])
        self._host, self._requests, self._receives = host, requests, receives
        self.place, self._peer = place, peer
        self._statuses = [MPI.Status() for _ in requests]
        # MPI forbids two threads to wait for one request; autograd and the group itself may ask beside the owner.
        self._asking = threading.Lock()

    def wait(self, timeout=None):
        """Block until the message is through. timeout: timedelta (zero or None: none); raises DistBackendError."""
        if self._requests:
            self._wait(self._tensors, self._peer, timeout.total_seconds() if timeout else 0.0)
        return True

    @timed
    def _wait(self, tensors, peer, timeout_s):
        with self._asking:
            if self._requests and timeout_s > 0:
                self._wait_until(time.monotonic() + timeout_s, timeout_s)
            elif self._requests:
                MPI.Request.Waitall(self._requests, self._statuses)
                self._finish()

    def _wait_until(self, deadline, timeout_s):
        pause = 1e-5
        while not MPI.Request.Testall(self._requests, self._statuses):
            if time.monotonic() > deadline:
                what = "receive" if self._receives else "send"
                raise dist.DistBackendError(f"timed out after {timeout_s:g} s waiting for a {what} to complete")
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)
        self._finish()

    def is_completed(self):
        if not self._asking.acquire(blocking=False):
            return False  # another thread is waiting
        try:
            if self._requests and MPI.Request.Testall(self._requests, self._statuses):
                self._finish()
            return not self._requests
        finally:
            self._asking.release()

    def is_success(self):
        return self.is_completed()

    def source_rank(self):
        self.wait()
        return self._statuses[0].Get_source()

    _source_rank = source_rank

    def _finish(self):
        self._requests = []
        if self._receives:
            from_mpi(self._host, self._tensors[0])
        self._host = None
