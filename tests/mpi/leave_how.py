"""A job for test_leaving.py: one or all ranks leave as the first argument says, the others wait in a barrier."""

import multiprocessing
import os
import signal
import sys
import threading
import time

import hpcllm.mpi
from hpcllm.errors import DataError

how, who = sys.argv[1:3]
world = hpcllm.mpi.init("cpu") if how.startswith("torch") else hpcllm.mpi.join()
leaves = who == "all" or world.rank == {"one": 1, "last": world.size - 1}.get(who)
os.write(1, f"started {os.getpid()}\n".encode())  # in one piece, whatever other ranks print
first = world.comm.bcast(os.getpid())
world.comm.Barrier()


def note_end():
    os.write(1, b"finally\n")


if leaves:
    try:
        if how in ("raise", "torch_raise"):
            raise ValueError(f"provoked on rank {world.rank}")
        if how == "late" and world.rank:  # all fail alike, but not at the same time
            time.sleep(0.1 * world.rank)
        if how == "late":
            raise ValueError(f"provoked on rank {world.rank}")
        if how == "interrupt":
            signal.raise_signal(signal.SIGINT)
            time.sleep(5)
        if how == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        if how == "end":
            hpcllm.mpi.end_all(9)
        if how == "after":  # the others have come to their end
            time.sleep(1)
            raise ValueError(f"provoked on rank {world.rank}")
        if how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "vanish":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "orphan":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(30)
        if how == "stopped":
            os.kill(first, signal.SIGSTOP)
            hpcllm.mpi.end_all(9)
        if how == "slow":
            from hpcllm.mpi import alarm

            kill = alarm._kill
            alarm._kill = lambda: (time.sleep(0.5), kill())  # the others have heard by then
            hpcllm.mpi.end_all(9)
        if how == "exit":
            sys.exit(int(sys.argv[3]))
        if how == "message":
            sys.exit("cannot go on")
        if how == "caught":
            try:
                sys.exit(3)
            except SystemExit as left:
                assert left.code == 3
            sys.exit()
        if how == "refuse":
            raise DataError("shard 3 is cut").known_to_all()
        if how == "alone":
            raise DataError("shard 3 is cut")
        if how == "together":
            hpcllm.mpi.leave_together(7, "that was all")
        if how == "agree":
            with hpcllm.mpi.together(world.comm):
                if world.rank == 1:
                    raise ValueError("provoked on rank 1")
        if how == "fork":
            child = multiprocessing.get_context("fork").Process(target=sys.exit, args=(3,))
            child.start()
            child.join()
            assert child.exitcode == 3
        if how == "thread":
            threading.Thread(target=lambda: int("provoked on rank 1"), name="reader").start()
            time.sleep(8)
        if how == "torch_unwaited":
            import torch
            import torch.distributed._functional_collectives as functional

            functional.all_reduce(torch.ones(3), "sum", world.group)
            world.group.allreduce([torch.ones(3)], torch.distributed.AllreduceOptions())
        if how == "torch_destroyed":
            import torch.distributed

            torch.distributed.destroy_process_group()
    finally:
        note_end()
if how in ("vanish", "after"):
    sys.exit(0)
if how in ("caught", "fork", "torch_unwaited", "torch_destroyed") and who == "all":
    time.sleep(0.3 * world.rank)
    sys.exit(0)
if how == "orphan":
    time.sleep(30)  # a call of MPI would notice
world.comm.Barrier()
print("past the barrier", flush=True)
