"""Which device and how many threads a rank gets, and buffers that MPI may touch.

MPI here always works on host memory: whether an MPI library takes device pointers cannot be asked, only
probed, and a wrong guess is a segmentation fault. Device tensors travel through pinned host memory.
"""

import ctypes
import os

import torch

from ..errors import UsageError


def choose(world, name="auto"):
    """The torch.device of this rank: `name` is "auto", "cpu" or "cuda".

    GPUs are counted as this process sees them (schedulers may show each rank only its own), and dealt out by
    local rank. Raises UsageError where ranks of a host would have to share a GPU, unless HPCLLM_SHARE_GPU=1.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UsageError(f'device: "{name}" is not one of "auto", "cpu", "cuda"')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UsageError(f'device: "cuda" was asked for, but rank {world.rank} on {world.host} sees no GPU')
    index = world.local_rank % count
    identity = (world.host, str(torch.cuda.get_device_properties(index).uuid))
    owners = world.comm.allgather(identity)
    if len(set(owners)) < len(owners) and os.environ.get("HPCLLM_SHARE_GPU") != "1":
        raise UsageError(
            f"{len(owners)} ranks have {len(set(owners))} different GPUs between them, so some would share one. "
            f"Start one rank per GPU, or set HPCLLM_SHARE_GPU=1 to allow it"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def bind_threads(world):
    """Give torch the cores this rank may use, divided by the ranks of the host that may use the same ones.

    OMP_NUM_THREADS, where set, is the user's word and wins. Collective over the world.
    """
    mine = (world.host, frozenset(os.sched_getaffinity(0)))
    sharing = world.comm.allgather(mine).count(mine)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(mine[1]) // sharing))


def keep_memory():
    """Let the C library keep freed memory for the next step instead of returning it to the system at once.

    glibc maps every large tensor anew and unmaps it when it is freed, and the page faults of the first touch cost
    a training step on the CPU 2 to 30 % of its time. HPCLLM_MALLOC=default leaves the allocator alone; another C
    library has no such setting.
    """
    if os.environ.get("HPCLLM_MALLOC") == "default":
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, (1 << 31) - 1)


def to_host(tensor, *, copy_in=True):
    """A contiguous CPU tensor for MPI: `tensor` itself where it is one, else a staging copy.

    copy_in: False where MPI will overwrite all of it, which saves the copy.
    """
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        return tensor.detach()
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    if copy_in:
        # Blocking: ordered after the work on the tensor's current stream, and complete before MPI reads.
        staged.copy_(tensor.detach())
    return staged


def from_host(staged, tensor):
    """Bring a result back into `tensor`; nothing to do where `to_host` returned the tensor itself."""
    if staged.data_ptr() != tensor.data_ptr() or staged.device != tensor.device:
        tensor.detach().copy_(staged)
