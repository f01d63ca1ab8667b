"""A job for test_watch.py and benchmarks/faults.py: 17 all_reduces, then rank 2 fails as the first argument says.

The other ranks wait for it in the next collective. With a number as second argument, so many ranks make a host.
"""

import collections
import ctypes
import datetime
import itertools
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import torch
import torch.distributed as dist

import hpcllm.mpi
from hpcllm.mpi import watch

how = sys.argv[1]
world = hpcllm.mpi.join()
if len(sys.argv) > 2:
    host = world.rank // int(sys.argv[2])
    hosts = tuple(f"host{n}" for n in range(-(-world.size // int(sys.argv[2]))))
    world = replace(world, host=hosts[host], hosts=hosts)
    watch.start(world, world.comm.Split(host))
limit = os.environ.get("INIT_TIMEOUT_S")
world = hpcllm.mpi.init("cpu", timeout=datetime.timedelta(seconds=float(limit)) if limit else None)
os.write(1, f"started {os.getpid()}\n".encode())
for _ in range(16):
    dist.all_reduce(torch.ones(5, 3))
even = dist.new_group(range(0, world.size, 2))


def fails():
    os.write(1, f"failing at {time.time()}\n".encode())
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "holds_gil":
        collections.deque(itertools.repeat(None), maxlen=0)  # in C, for ever, and no other thread runs
    if how == "loop":
        while True:
            pass
    if how == "exception":
        raise ValueError("provoked on rank 2")
    if how == "thread_exception":
        threading.Thread(target=lambda: int("provoked on rank 2")).start()
        time.sleep(600)
    if how == "exit_7":
        os._exit(7)
    if how == "exit_0":
        os._exit(0)
    if how == "sys_exit":
        sys.exit(3)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "other_group":  # rank 2 waits for rank 0, which waits for rank 2
        dist.all_reduce(torch.ones(2), group=even)
    if how == "other_call":
        dist.broadcast(torch.ones(5, 3), src=2)
        dist.barrier()
    if how == "other_shape":
        dist.all_reduce(torch.ones(5, 4))
    if how == "receive":
        dist.recv(torch.ones(3), src=1)


if how == "late":
    # Everybody longer outside of collectives than the timeout; rank 2 is waited for, but not for so long.
    time.sleep(9)
    if world.rank == 2:
        time.sleep(1)
    dist.all_reduce(torch.ones(5, 3))
    os.write(1, b"late, but fine\n")
    # In a group with a timeout of its own rank 2 is too late.
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    if world.rank == 2:
        time.sleep(600)
    dist.barrier(group=group)
if world.rank == 2:
    fails()
dist.all_reduce(torch.ones(5, 3))
if how == "other_call":
    dist.barrier()
print("past the fault", flush=True)
