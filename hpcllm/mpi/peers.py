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
import threading
import weakref

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_TOKEN_BYTES = 32
# Memory that is less than so much larger than what is wanted is given out again; and so many times what is in use may
# lie idle.
_SLACK = 2


class _Chunk:
    """One file of the pool, mapped. `start`: its address."""

    def __init__(self, size):
        self.gone = False
        self.descriptor = os.memfd_create("hpcllm")
        try:
            os.posix_fallocate(self.descriptor, 0, size)  # a page that cannot be had later would be a SIGBUS
            self.array = _map(f"/proc/self/fd/{self.descriptor}", size).numpy()
        except (OSError, RuntimeError):
            os.close(self.descriptor)
            raise
        self.start, self.size = self.array.ctypes.data, size

    def drop(self):
        self.gone = True
        os.close(self.descriptor)


class _Adopted:
    """The memory of a tensor that torch has moved into a file of its own, for as long as that lives."""

    def __init__(self, storage):
        self.descriptor, self.size = storage._share_fd_cpu_()[:2]  # as torch.multiprocessing does to send a tensor
        self.start, self._storage = storage.data_ptr(), StorageWeakRef(storage)

    @property
    def gone(self):
        return self._storage.expired()


class Pool:
    """Memory of this process that others may map. What is freed is kept for a while and given out again."""

    def __init__(self):
        self._index = [], []  # addresses and chunks, in order; replaced as one, since other threads look at it
        self._free = []
        self._lock = threading.Lock()

    def allocate(self, count, dtype):
        """A 1-d tensor of `count` elements, not initialised. OSError or RuntimeError where the memory is not there."""
        length = count * dtype.itemsize
        with self._lock:
            fitting = [chunk for chunk in self._free if length <= chunk.size <= _SLACK * length]
            if fitting:
                chunk = min(fitting, key=lambda chunk: chunk.size)
                self._free.remove(chunk)
            else:
                self._drop_idle(length)
                chunk = _Chunk(max(1, -(-length // mmap.PAGESIZE)) * mmap.PAGESIZE)
                self._enter(chunk)
        # The tensor holds on to this array, and all that looks at the tensor's memory holds on to the tensor's.
        given = chunk.array[:length]
        weakref.finalize(given, self._free.append, chunk).atexit = False
        return torch.from_numpy(given).view(dtype)

    def _drop_idle(self, wanted):
        """Give memory back, the longest idle first, where more lies idle than is likely to be wanted again."""
        idle = sum(chunk.size for chunk in self._free)
        used = sum(chunk.size for chunk in self._index[1]) - idle
        while self._free and idle > _SLACK * (used + wanted):
            chunk = self._free.pop(0)
            idle -= chunk.size
            chunk.drop()

    def _enter(self, new):
        chunks = [chunk for chunk in self._index[1] if not chunk.gone]
        chunks = sorted((*chunks, new), key=lambda chunk: chunk.start)
        self._index = [chunk.start for chunk in chunks], chunks

    def adopt(self, tensor, sharers=1):
        """Move the memory of `tensor`, and so of all its views, to where others can map it. True if it is there.

        Only for a tensor whose address nobody else keeps (a NumPy array that looks at it would look at freed memory).
        sharers: processes of this host that do the same at this moment; where their memory would not fit into
        /dev/shm, nothing happens.
        """
        if self.find(tensor)[0] >= 0:
            return True
        forget()  # what others have adopted before, as a rule, is freed when there is something new
        storage = tensor.untyped_storage()
        with contextlib.suppress(OSError, RuntimeError, AttributeError), self._lock:
            room = os.statvfs("/dev/shm")
            if room.f_bavail * room.f_frsize >= _SLACK * sharers * storage.nbytes():
                self._enter(_Adopted(storage))
                return True
        return False

    def find(self, tensor):
        """(descriptor, offset in bytes) of a contiguous tensor that lies in the pool; (-1, 0) for any other."""
        address = tensor.data_ptr()
        starts, chunks = self._index
        at = bisect.bisect(starts, address) - 1
        # One that is gone may lie in the place of, or before, one that lives.
        while at >= 0 and chunks[at].gone:
            at -= 1
        if at >= 0 and address + tensor.nbytes <= chunks[at].start + chunks[at].size:
            return chunks[at].descriptor, address - chunks[at].start
        return -1, 0


pool = Pool()
_attached = {}  # (process, descriptor): (which file, its memory here)


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

    def first(self, count, dtype):
        """A 1-d tensor of `count` elements, not initialised, that is one and the same on all ranks of the host.

        None on all of them where there is not so much memory. Collective over the ranks of the host.
        """
        mine, place = None, None
        with contextlib.suppress(OSError, RuntimeError, AttributeError):
            if self._me == 0:
                mine = pool.allocate(count, dtype)
                place = pool.find(mine)
        place = self._memory.comm.bcast(place)
        if self._me == 0 or place is None:
            return mine
        descriptor, offset = place
        memory = _attach(self._pids[0], descriptor)[offset : offset + count * dtype.itemsize]
        return memory.view(dtype)

    def each(self, count, dtype):
        """A list of such tensors, one of each rank of the host, which made it; None where any has not so much memory.

        Collective over the ranks of the host.
        """
        mine = None
        with contextlib.suppress(OSError, RuntimeError, AttributeError):
            mine = pool.allocate(count, dtype)
        if not all(self._memory.comm.allgather(mine is not None)):
            return None
        return self.open(mine)


def reach(memory):
    """`Peers` of the ranks of `memory` (host.HostMemory), or None on all where the system forbids it. Collective."""
    comm, token, descriptor = memory.comm, secrets.token_bytes(_TOKEN_BYTES), -1
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.memfd_create("hpcllm")
        os.write(descriptor, token)
    told = comm.allgather((os.getpid(), descriptor, token))
    reached = False
    with contextlib.suppress(OSError, RuntimeError):
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


def _map(file, size):
    """`size` bytes of a file, shared, as uint8. Unlike Python's mmap it keeps no descriptor, of which there are few.

    Pages are mapped as they are touched: of the tensors of many neighbours, a rank sums a slice each.
    """
    with torch.inference_mode(False):  # it is kept for calls outside of it
        return torch.from_file(file, shared=True, size=size, dtype=torch.uint8)


def _identity(pid, descriptor):
    seen = os.stat(f"/proc/{pid}/fd/{descriptor}")
    return seen.st_dev, seen.st_ino, seen.st_size


def _attach(pid, descriptor):
    """All of the memory behind `descriptor` of process `pid`, as uint8; mapped once."""
    which = _identity(pid, descriptor)
    known = _attached.get((pid, descriptor))
    if known is None or known[0] != which:
        forget()
        _attached[pid, descriptor] = known = which, _map(f"/proc/{pid}/fd/{descriptor}", which[2])
    return known[1]


def forget():
    """Unmap what its owners have closed."""
    for key, (which, _) in list(_attached.items()):
        try:
            gone = _identity(*key) != which
        except OSError:
            gone = True
        if gone:
            _attached.pop(key, None)
