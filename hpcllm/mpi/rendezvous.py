"""How the ranks that MPI has counted meet for a backend of torch: this package's own, or Gloo or NCCL.

torch's own backends need a store in which ranks find each other's addresses: here a TCPStore of root, whose port the
system chooses and MPI tells, so nobody picks a port or an address. Makes the store; `world.init` starts the group.
"""

import os
import socket

import torch.distributed as dist

from ..errors import UsageError
from . import gpu_aware, overlap, process_group, watch
from .device import hand_over

BACKENDS = ("mpi", "gloo", "nccl")


def meet(world, backend, device):
    """(torch's name of the backend, store) for all ranks of `world`. Collective.

    backend: "mpi", "gloo" or "nccl"; device: torch.device of this rank. Raises UsageError, the same on every rank.
    """
    if backend not in BACKENDS:
        raise UsageError(f'backend: "{backend}" is not one of {", ".join(BACKENDS)}').known_to_all()
    if backend == "nccl" and (device.type != "cuda" or not dist.is_nccl_available()):
        why = f"the ranks run on {device.type}" if device.type != "cuda" else "this PyTorch was built without it"
        raise UsageError(f'backend: "nccl" needs a GPU for every rank, but {why}').known_to_all()
    if backend == "mpi":
        watch.start(world)
        if device.type != "cpu":
            hand_over(gpu_aware.find(world, device))
        overlap.start(world, device)
        process_group.register(world.comm)
        # Each rank has a store of its own, in which nobody else would ever arrive at torch's store-based barrier.
        os.environ.pop("TORCH_DIST_INIT_BARRIER", None)
        return process_group.BACKEND, dist.HashStore()
    # NCCL moves device tensors alone; small sums of the training loop are on the CPU.
    name = "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl"
    if len(world.hosts) == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return name, _network_store(world)


def _network_store(world):
    """A TCPStore that listens for this job's hosts alone: on loopback where there is one host."""
    listening, place = None, None
    if world.is_root:
        name = "127.0.0.1" if len(world.hosts) == 1 else socket.gethostname()
        listening = socket.create_server((name, 0))
        place = listening.getsockname()
    host, port = world.comm.bcast(place)
    if listening is None:
        return dist.TCPStore(host, port, world.size, wait_for_workers=False)
    # The store closes the descriptor.
    fd = listening.detach()
    return dist.TCPStore(host, port, world.size, is_master=True, wait_for_workers=False, master_listen_fd=fd)
