"""Memory that the ranks of one host share: a slot for each rank, which all of them read and write directly.

An unlinked file in /dev/shm that every rank maps, not an MPI window: it leaves nothing behind however the job ends,
and memory that is not there is refused at once, where a window would end in a bus error at the first touch. What goes
through it is `shared`'s business.
"""

import contextlib
import mmap
import os
import secrets

import torch

from ..errors import UsageError

FOLDER = "/dev/shm"
# A slot is what one rank contributes to one round of a call. Two halves are used in turn, so that a rank may fill the
# next half while others still read this one. Larger slots need fewer barriers, smaller ones stay in the cache.
SLOT_BYTES = 1 << 21
_TOKEN_BYTES = 16
_HEAD_BYTES = mmap.PAGESIZE
_KEPT = 256


class HostMemory:
    """Shared slots of the ranks of one host; made by `open_memory`, which is collective.

    comm: mpi4py communicator of the ranks of the host. `meet` is collective over it.
    """

    def __init__(self, comm, mapped, slot_bytes):
        self.comm, self.slot_bytes = comm, slot_bytes
        with torch.inference_mode(False):  # the first collective of a group may be in one, and others outside
            whole = torch.frombuffer(mapped, dtype=torch.uint8, offset=_HEAD_BYTES)
        self._halves = whole.view(2, comm.size, slot_bytes)
        self._kept = {}
        self._turn = 0

    def cut(self, dtype, lengths):
        """What lies in the slots: for each rank, its slot cut into tensors of `lengths` elements (a tuple).

        Every call takes the next half, so all ranks must call it equally often, and there must be at least one
        `meet` between two calls: then nobody reads any more what is overwritten. Quick for lengths that come again.
        """
        key = dtype, lengths
        if key not in self._kept:
            if len(self._kept) == _KEPT:
                self._kept.clear()
            end = sum(lengths)
            with torch.inference_mode(False):
                slots = [half.view(dtype).unbind(0) for half in self._halves]
                self._kept[key] = [[slot[:end].split(lengths) for slot in half] for half in slots]
        self._turn ^= 1
        return self._kept[key][self._turn]

    def meet(self):
        """What any rank has written before, every rank sees after. Collective."""
        self.comm.Barrier()


def open_memory(comm, slot_bytes=None):
    """A HostMemory for `comm` (ranks of one host), or None on all of them where it cannot be had. Collective.

    HPCLLM_SHARED_MEMORY_MB sets the size of a slot; 0 switches shared memory off.
    """
    slot_bytes = comm.bcast(_wanted() if slot_bytes is None else slot_bytes)
    if slot_bytes == 0 or comm.size == 1:
        return None
    size = _HEAD_BYTES + 2 * comm.size * slot_bytes
    token, path, mapped = secrets.token_bytes(_TOKEN_BYTES), None, None
    if comm.rank == 0:
        path, mapped = _create(size, token)
    path, token = comm.bcast((path, token))
    if path is not None and comm.rank > 0:
        mapped = _attach(path, size, token)
    everywhere = all(comm.allgather(mapped is not None))
    if comm.rank == 0 and path is not None:
        os.unlink(path)
    return HostMemory(comm, mapped, slot_bytes) if everywhere else None


def _wanted():
    wish = os.environ.get("HPCLLM_SHARED_MEMORY_MB")
    if wish is None:
        return SLOT_BYTES
    if not wish.isdigit():
        raise UsageError(f'HPCLLM_SHARED_MEMORY_MB="{wish}" is not a number of MiB').known_to_all()
    return int(wish) << 20


def _create(size, token):
    """(path, map) of a new file of `size` bytes, all of them really there; (None, None) where they are not."""
    path = os.path.join(FOLDER, f"hpcllm-{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(handle, 0, size)
            os.pwrite(handle, token, 0)
            return path, _map(handle, size)
        except OSError:
            os.unlink(path)
        finally:
            os.close(handle)
    return None, None


def _map(handle, size):
    return mmap.mmap(handle, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _attach(path, size, token):
    """The map of the file that the first rank made; None where this rank does not see it (a container of its own)."""
    with contextlib.suppress(OSError, ValueError):
        handle = os.open(path, os.O_RDWR)
        try:
            mapped = _map(handle, size)
            return mapped if mapped[:_TOKEN_BYTES] == token else None
        finally:
            os.close(handle)
    return None
