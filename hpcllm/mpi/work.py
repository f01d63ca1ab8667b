"""Handles of communication under way or done, as torch expects them, and the time that communication took."""

import threading
import time
from functools import wraps

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.autograd import profiler

from .device import from_host

_communication_s = 0.0


def communication_s():
    """Seconds this process has spent inside communication calls since it started."""
    return _communication_s


def timed(method):
    """Count the seconds that `method` takes as communication. Timed methods must not call each other.

    Where torch's profiler runs, it shows the call as "mpi4py:" and the method's name.
    """

    @wraps(method)
    def counted(*args, **kwargs):
        global _communication_s
        start = time.perf_counter()
        try:
            if profiler._is_profiler_enabled:  # one look; a range costs as much as a small message
                with profiler.record_function(f"mpi4py:{method.__name__}"):
                    return method(*args, **kwargs)
            return method(*args, **kwargs)
        finally:
            _communication_s += time.perf_counter() - start

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
        devices = sorted({t.device for t in self._tensors if t.device.type == "cuda"}, key=str)
        future = torch.futures.Future(devices=devices) if devices else torch.futures.Future()
        future.set_result(self._tensors)
        return future


class Pending(Done):
    """The handle of a send or receive. Keeps the buffer alive; a received tensor is filled in by `wait`."""

    def __init__(self, tensor, host, requests, receives):
        super().__init__([tensor])
        self._host, self._requests, self._receives = host, requests, receives
        self._statuses = [MPI.Status() for _ in requests]
        # MPI forbids two threads to wait for one request; autograd and the group itself may ask beside the owner.
        self._asking = threading.Lock()

    @timed
    def wait(self, timeout=None):
        with self._asking:
            if self._requests:
                MPI.Request.Waitall(self._requests, self._statuses)
                self._finish()
        return True

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
            from_host(self._host, self._tensors[0])
        self._host = None
