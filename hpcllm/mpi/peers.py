"""Tensors in memory that the other ranks of this host can reach: what is summed there is copied nowhere.

`Pool` gives out the memory: anonymous files (memfd_create(2)) that no folder shows and that end with the last process
that has them open. It also adopts what torch has made (`adopt`). `Peers` are the ranks of a host that map each other's,
through /proc, when they first meet a tensor that lies there. Where the system does not allow that (containers that
number their processes anew) there are none, and tensors from the pool are ordinary ones. What is done with it is
`shared`'s business.

Letting the kernel copy between any two tensors (process_vm_readv(2)) needs no pool, but measured no faster than the
slots of `host`: on x86 with pages of 4 KB, looking up pages eats what the copy saves.
"""

import bisect
import contextlib
import mmap
import os
import secrets
import weakref

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

_TOKEN_BYTES = 32
# Memory that is less than so much larger than what is wanted is given out again.
_SLACK = 2


class _Chunk:
    """One file of the pool, mapped. `start`: its address."""

    gone = False

    def __init__(self, size):
        self.descriptor = os.memfd_create("hpcllm")
        try:
            os.posix_fallocate(self.descriptor, 0, size)  # a page that cannot be had later would be a SIGBUS
            mapped = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self.array = np.frombuffer(mapped, dtype=np.uint8)
        except OSError:
            os.close(self.descriptor)
            raise
        self.start, self.size = self.array.ctypes.data, size


class _Adopted:
    """The memory of a tensor that torch has moved into a file of its own, for as long as that lives."""

    def __init__(self, storage):
        self.descriptor, self.size = storage._share_fd_cpu_()[:2]  # as torch.multiprocessing does to send a tensor
        self.start, self._storage = storage.data_ptr(), StorageWeakRef(storage)

    @property
    def gone(self):
        return self._storage.expired()


class Pool:
    """Memory of this process that others may map. What is freed is kept and given out again, never unmapped."""

    def __init__(self):
        self._starts, self._chunks = [], []  # by address
        self._free = []

    def allocate(self, count, dtype):
        """A 1-d tensor of `count` elements, not initialised. OSError where the memory is not there."""
        length = count * dtype.itemsize
        fitting = [chunk for chunk in self._free if length <= chunk.size <= _SLACK * length]
        if fitting:
            chunk = min(fitting, key=lambda chunk: chunk.size)
            self._free.remove(chunk)
        else:
            chunk = _Chunk(max(1, -(-length // mmap.PAGESIZE)) * mmap.PAGESIZE)
            self._enter(chunk)
        # The tensor holds on to this array, and all that looks at the tensor's memory holds on to the tensor's.
        given = chunk.array[:length]
        weakref.finalize(given, self._free.append, chunk).atexit = False
        return torch.from_numpy(given).view(dtype)

    def _enter(self, chunk):
        self._chunks = sorted((*self._living(), chunk), key=lambda chunk: chunk.start)
        self._starts = [chunk.start for chunk in self._chunks]

    def _living(self):
        return [chunk for chunk in self._chunks if not chunk.gone]

    def adopt(self, tensor, sharers=1):
        """Move the memory of `tensor`, and so of all its views, to where others can map it. True if it is there.

        Only for a tensor whose address nobody else keeps (a NumPy array that looks at it would look at freed memory).
        sharers: processes of this host that do the same at this moment; where their memory would not fit into
        /dev/shm, nothing happens.
        """
        if self.find(tensor)[0] >= 0:
            return True
        storage = tensor.untyped_storage()
        with contextlib.suppress(OSError, RuntimeError, AttributeError):
            room = os.statvfs("/dev/shm")
            if room.f_bavail * room.f_frsize >= _SLACK * sharers * storage.nbytes():
                self._enter(_Adopted(storage))
                return True
        return False

    def find(self, tensor):
        """(descriptor, offset in bytes) of a contiguous tensor that lies in the pool; (-1, 0) for any other."""
        address = tensor.data_ptr()
        at = bisect.bisect(self._starts, address) - 1
        if at >= 0:
            chunk = self._chunks[at]
            if chunk.gone:
                self._chunks = self._living()
                self._starts = [chunk.start for chunk in self._chunks]
                return self.find(tensor)
            if address + tensor.nbytes <= chunk.start + chunk.size:
                return chunk.descriptor, address - chunk.start
        return -1, 0


pool = Pool()
_attached = {}  # (process, descriptor): (inode, its memory here)


class Peers:
    """The ranks of one host that map each other's pools; made by `reach`."""

    def __init__(self, memory, pids):
        self._memory, self._pids, self._me = memory, pids, memory.comm.rank

    def open(self, tensor):
        """The tensors that the ranks of the host have given as `tensor`, in their order; None if any is not in a pool.

        tensor: 1-d, contiguous, of one dtype and length on all. Collective over the ranks of the host. The tensors
        stay open to all until the next `meet` of the host's memory.
        """
        slots = self._memory.cut(torch.int64, (2,))
        slots[self._me][0].numpy()[:] = pool.find(tensor)
        self._memory.meet()
        places = [slot[0].tolist() for slot in slots]
        if any(descriptor < 0 for descriptor, _ in places):
            return None
        opened = []
        for local, (descriptor, offset) in enumerate(places):
            if local == self._me:
                opened.append(tensor)
                continue
            opened.append(_attach(self._pids[local], descriptor)[offset : offset + tensor.nbytes].view(tensor.dtype))
        return opened


def reach(memory):
    """`Peers` of the ranks of `memory` (host.HostMemory), or None on all where the system forbids it. Collective."""
    comm, token, descriptor = memory.comm, secrets.token_bytes(_TOKEN_BYTES), -1
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.memfd_create("hpcllm")
        os.write(descriptor, token)
    told = comm.allgather((os.getpid(), descriptor, token))
    reached = False
    with contextlib.suppress(OSError, ValueError):
        # Where a container numbers its processes anew, another one has the number, and shows something else.
        reached = all(
            _is_ours(pid, there) and bytes(_attach(pid, there).tolist()) == shown for pid, there, shown in told
        )
    everybody = all(comm.allgather(reached))  # and nobody closes before all have looked
    if descriptor >= 0:
        os.close(descriptor)
    return Peers(memory, [pid for pid, *_ in told]) if everybody else None


def _is_ours(pid, descriptor):
    return os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith("/memfd:hpcllm")


def _attach(pid, descriptor):
    """All of the memory behind `descriptor` of process `pid`, as uint8; mapped once."""
    key, file = (pid, descriptor), f"/proc/{pid}/fd/{descriptor}"
    if key not in _attached or os.stat(file).st_ino != _attached[key][0]:
        _forget()
        handle = os.open(file, os.O_RDWR)
        try:
            seen = os.fstat(handle)
            # Page tables for what is touched alone: of the tensors of many neighbours, a rank sums a slice each.
            mapped = mmap.mmap(handle, seen.st_size, flags=mmap.MAP_SHARED)
            _attached[key] = seen.st_ino, torch.frombuffer(mapped, dtype=torch.uint8)
        finally:
            os.close(handle)
    return _attached[key][1]


def _forget():
    """Unmap what its owner has closed."""
    for (pid, descriptor), (inode, _) in list(_attached.items()):
        try:
            gone = os.stat(f"/proc/{pid}/fd/{descriptor}").st_ino != inode
        except OSError:
            gone = True
        if gone:
            del _attached[pid, descriptor]
