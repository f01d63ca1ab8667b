"""Collectives while the program computes: one thread per process that makes the asynchronous calls in their order.

MPI libraries move little in the background, so somebody has to wait in the call. A collective asked for with
async_op=True (DDP's buckets, FSDP's gathers) goes to the courier, a thread of its own, and the caller gets a handle at
once; what is asked for without it waits until the courier has nothing left and then runs inline. So calls reach MPI
in the order in which they were made, and the courier sleeps when there is nothing to do.

It pays only where a core is free for it and MPI lets several threads call (MPI_THREAD_MULTIPLE); elsewhere every call
runs inline, which is as fast on a machine whose cores all compute.

    HPCLLM_OVERLAP      auto (by these two conditions), on, or off
"""

import atexit
import os
import queue
import threading
import time
from contextlib import nullcontext
from functools import wraps

import torch
import torch.distributed as dist
from mpi4py import MPI

from ..errors import UsageError
from . import check, work

_courier = None


def start(world, device):
    """Start the courier where it pays, or where HPCLLM_OVERLAP says so; once. `device`: torch.device of this rank.

    Collective over `world`: either all ranks have one or none. Raises UsageError, the same on every rank.
    """
    global _courier
    # Root's word for all: a rank that has come in place of one that died takes what the others have.
    wish, there = world.comm.bcast((os.environ.get("HPCLLM_OVERLAP", "auto"), _courier is not None))
    if wish not in ("auto", "on", "off"):
        raise UsageError(f'HPCLLM_OVERLAP="{wish}" is not one of auto, on, off').known_to_all()
    if _courier is not None:
        return
    several = MPI.Query_thread() == MPI.THREAD_MULTIPLE
    if wish == "on" and not several:
        raise UsageError(
            "HPCLLM_OVERLAP=on needs an MPI library that several threads may call; this one does not grant "
            "MPI_THREAD_MULTIPLE"
        ).known_to_all()
    # Calls are compared where they are made, which another thread does not know.
    pays = there or spare_core(world, torch.get_num_threads() if device.type == "cpu" else 1)
    here = several and not check.wanted() and (wish == "on" or (wish == "auto" and pays))
    if there or all(world.comm.allgather(here)):
        _courier = Courier(device)
        atexit.register(drain)  # called before MPI is finalised, since `abort` has registered that earlier


def active():
    """True where asynchronous collectives travel while the program computes."""
    return _courier is not None


def spare_core(world, threads):
    """True where this rank, computing with `threads`, and those it shares its cores with leave one free for each.

    Collective over `world`.
    """
    cores, busy = world.sharers(threads)
    return len(cores) >= sum(busy) + len(busy)


def carried(collective):
    """Let the courier, if there is one, make the calls of a method whose last argument asks for an asynchronous one."""

    @wraps(collective)
    def call(self, *arguments, **named):
        if _courier is None:
            return collective(self, *arguments, **named)
        options = named.get("opts", arguments[-1] if arguments else None)
        if getattr(options, "asyncOp", False):
            return _courier.take(lambda: collective(self, *arguments, **named), arguments)
        _courier.drain()
        return collective(self, *arguments, **named)

    return call


def drain():
    """Wait until every call that was asked for has been made. Raises what went wrong in one that nobody waited for."""
    if _courier is not None:
        _courier.drain()


def abandon():
    """Wait until every call has been made or has failed, and forget what went wrong."""
    if _courier is not None:
        _courier.abandon()


class Courier:
    """The thread, and the calls that wait for it. device: where the tensors of this rank live."""

    def __init__(self, device):
        self._calls = queue.SimpleQueue()
        self._streams = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream = self._streams and self._streams.Stream(device)
        self._last = None
        threading.Thread(target=self._run, name="hpcllm courier", daemon=True).start()

    def take(self, call, arguments):
        """The `Carried` handle of `call`, which will be made after all that were taken before."""
        ready = None
        if self._stream is not None:
            ready = self._streams.Event()
            ready.record()  # what the caller has computed so far is what is to be sent
        tensors = _tensors(arguments)
        for tensor in tensors:
            if not tensor.is_cpu:
                tensor.record_stream(self._stream)  # its memory is not given out again before the courier is done
        self._last = taken = Carried(call, tensors, ready)
        self._calls.put(taken)
        return taken

    def drain(self):
        last = self._last
        if last is not None:
            self._last = None
            last.finished.wait()
            if not last.told:
                last.fail()

    def abandon(self):
        last, self._last = self._last, None
        if last is not None:
            last.finished.wait()

    def _run(self):
        torch.set_num_threads(1)  # of this thread
        work.hide_time()
        # In which it may write to tensors of either kind.
        with torch.inference_mode(), self._streams.stream(self._stream) if self._streams else nullcontext():
            while True:
                carried = self._calls.get()
                if carried.ready is not None:
                    self._stream.wait_event(carried.ready)
                carried.run(self._stream)


def _tensors(arguments):
    found = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += _tensors(argument)
    return found


class Carried(dist.Work):
    """The handle of a collective that the courier makes. `wait` raises what went wrong in it."""

    def __init__(self, call, tensors, ready):
        super().__init__()
        self.ready, self.finished = ready, threading.Event()
        self._call, self._made, self._error, self.told = call, None, None, False
        devices = sorted({tensor.device for tensor in tensors if not tensor.is_cpu}, key=str)
        self._future = torch.futures.Future(devices=devices) if devices else torch.futures.Future()

    def run(self, stream):
        try:
            self._made = self._call()
            if stream is not None:
                stream.synchronize()  # then any stream may use the results
        except BaseException as error:  # whatever it is, the caller must hear of it and not wait for ever
            self._error = error
        self._call = None
        self.finished.set()
        if self._error is None:
            self._future.set_result(self._made.result())
        else:
            self._future.set_exception(self._error)

    def fail(self):
        """Raise what went wrong, if anything did."""
        self.told = True
        if self._error is not None:
            raise self._error

    def wait(self, timeout=None):
        """Block until the call is made. timeout: timedelta (zero or None: none); raises DistBackendError."""
        seconds = timeout.total_seconds() if timeout else None
        began = time.monotonic_ns()
        done = self.finished.wait(seconds)
        work.add_communication(time.monotonic_ns() - began)
        if not done:
            raise dist.DistBackendError(f"timed out after {seconds:g} s waiting for a collective to complete")
        self.fail()
        return True

    def is_completed(self):
        return self.finished.is_set()

    def is_success(self):
        return self.finished.is_set() and self._error is None

    def exception(self):
        return self._error

    def synchronize(self):
        self.wait()

    block_current_stream = synchronize

    def result(self):
        self.wait()
        return self._made.result()

    def get_future(self):
        return self._future
