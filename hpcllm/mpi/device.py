"""Which device and how many threads a rank gets, and buffers that MPI may touch.

Tensors of a GPU are handed to those MPI calls that were seen to take them (`gpu_aware`); for all others they travel
through pinned host memory.
"""

import ctypes
import os

import torch
from mpi4py import MPI

from ..errors import UsageError

# What torch calls the GPUs that are known here; "cuda" is also AMD's.
GPUS = ("cuda", "xpu")
# How MPI counts elements of so many bytes, whatever they mean.
UNIT = {1: MPI.BYTE, 2: MPI.INT16_T, 4: MPI.INT32_T, 8: MPI.INT64_T, 16: MPI.C_DOUBLE_COMPLEX}


def choose(world, name="auto"):
    """The torch.device of this rank: `name` is "auto", "cpu" or one of `GPUS`. Collective over the world.

    GPUs are counted as this process sees them (schedulers may show each rank only its own), and dealt out by
    local rank. Raises UsageError on every rank where ranks of a host would have to share a GPU, unless
    HPCLLM_SHARE_GPU=1, and where a GPU was asked for and a rank has none; "auto" then means the CPU everywhere.
    """
    if name not in ("auto", "cpu", *GPUS):
        known = ", ".join(f'"{kind}"' for kind in ("auto", "cpu", *GPUS))
        raise UsageError(f'device: "{name}" is not one of {known}').known_to_all()
    if name == "cpu":
        return torch.device("cpu")
    gpu = local_gpu(world.local_rank, GPUS if name == "auto" else (name,))
    # The identity tells one GPU from another, however schedulers number them for this process.
    identity = gpu and str(torch.get_device_module(gpu).get_device_properties(gpu.index).uuid)
    owners = world.comm.allgather((world.host, identity))
    without = [rank for rank, (_, gpu) in enumerate(owners) if gpu is None]
    if without and name == "auto":
        return torch.device("cpu")
    if without:
        rank = without[0]
        raise UsageError(
            f'device: "{name}" was asked for, but {len(without)} of {world.size} ranks see no GPU, the first of them '
            f"rank {rank} on {owners[rank][0]}"
        ).known_to_all()
    allowed = world.comm.bcast(os.environ.get("HPCLLM_SHARE_GPU") == "1")
    if len(set(owners)) < len(owners) and not allowed:
        raise UsageError(
            f"{len(owners)} ranks have {len(set(owners))} different GPUs between them, so some would share one. "
            f"Start one rank per GPU, or set HPCLLM_SHARE_GPU=1 to allow it"
        ).known_to_all()
    torch.get_device_module(gpu).set_device(gpu.index)
    return gpu


def local_gpu(local_rank, kinds=GPUS):
    """The torch.device of the GPU that falls to the `local_rank` of a host; None where this process sees none."""
    for kind in kinds:
        gpus = torch.get_device_module(kind)
        count = gpus.device_count() if gpus.is_available() else 0
        if count:
            return torch.device(kind, local_rank % count)
    return None


def gpus_in_use():
    """torch's modules (torch.cuda, ...) of the kinds of GPU that this process has touched."""
    return [gpus for gpus in map(torch.get_device_module, GPUS) if gpus.is_initialized()]


def reseed(number):
    """As torch.manual_seed, of the CPU and of the GPUs in use.

    That one keeps the seed for kinds of devices that are not there, each with the text of the stack: 0.4 ms a time,
    and dropout under tensor parallelism asks for it dozens of times a micro-batch.
    """
    torch.default_generator.manual_seed(number)
    for gpus in gpus_in_use():
        gpus.manual_seed_all(number)


def bind_threads(world):
    """Give torch the cores this rank may use, divided by the ranks of the host that may use the same ones.

    OMP_NUM_THREADS, where set, is the user's word and wins. Collective over the world.
    """
    cores = world.own_cores()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)


def keep_memory():
    """Let the C library keep freed memory for the next step instead of returning it to the system at once.

    glibc maps every large tensor anew and unmaps it when it is freed, and the page faults of the first touch cost
    a training step on the CPU 2 to 30 % of its time. With it go large pages (`hpcllm.__init__` and slurm/site.sh
    ask for them), which save most of the rest: 10 % of a step of a GPT-2 of 27 M parameters. HPCLLM_MALLOC=default
    leaves the allocator alone; another C library has no such setting.
    """
    if not keeps_memory():
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, (1 << 31) - 1)


def keeps_memory():
    """What the user says of `keep_memory`."""
    return os.environ.get("HPCLLM_MALLOC") != "default"


class _Direct:
    """The MPI calls that take device memory; set by `hand_over`."""

    calls = frozenset()


def hand_over(calls):
    """From now on, give device memory itself to the MPI calls named in `calls`."""
    _Direct.calls = frozenset(calls)


def handed_over():
    """The MPI calls that get device memory itself, by name."""
    return sorted(_Direct.calls)


def is_direct(tensor, *calls):
    """True where all of the MPI `calls` take the memory that `tensor` lives in."""
    return tensor.is_cpu or (tensor.device.type in GPUS and _Direct.calls.issuperset(calls))


def to_mpi(tensor, *calls, copy_in=True):
    """A contiguous tensor that MPI may touch in all of `calls`: `tensor` itself where it is one, else a staging copy.

    copy_in: False where MPI will overwrite all of it, which saves the copy. Raises TypeError for tensors whose
    memory is not one array of elements (sparse, meta).
    """
    strided, direct = tensor.layout is torch.strided, is_direct(tensor, *calls)
    # A conjugated or negated view holds other numbers than it means; copying it resolves that.
    if direct and strided and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        if tensor.requires_grad:
            tensor = tensor.detach()
        # Tensors of no or one element count as contiguous whatever their strides say.
        ones = tensor.numel() > 1 or tensor.stride() == (1,) * tensor.dim()
        return tensor if ones else tensor.as_strided(tensor.shape, (1,) * tensor.dim())
    if not strided or tensor.is_meta:
        raise TypeError(f"hpcllm.mpi cannot send a tensor of layout {tensor.layout} on device {tensor.device}")
    tensor = tensor.detach()
    if direct:
        staged = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    else:
        staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=not tensor.is_cpu)
    if copy_in:
        # To the host it is blocking: ordered after the work on the current stream, complete before MPI reads.
        staged.copy_(tensor)
    return staged


def from_mpi(staged, tensor):
    """Bring a result back into `tensor`; nothing to do where `to_mpi` returned the tensor itself.

    From the host it is blocking, so that the staging copy may go and any stream may read the tensor afterwards.
    """
    if staged.data_ptr() != tensor.data_ptr() or staged.device != tensor.device:
        tensor.detach().copy_(staged)


def memory(tensor):
    """The memory of a contiguous tensor as mpi4py takes it, by address: the caller keeps the tensor alive.

    Where it is a GPU's, all that the current stream still does with it is done when this returns.
    """
    if not tensor.is_cpu:
        torch.get_device_module(tensor.device).current_stream(tensor.device).synchronize()
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)


def units(tensor):
    """The same as an MPI buffer of whole elements, of any dtype."""
    return [memory(tensor), tensor.numel(), UNIT[tensor.element_size()]]
