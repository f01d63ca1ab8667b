"""Sums and broadcasts of ranks that share memory: they read each other's data, and MPI only says when.

A rank copies into its slot what others need of it, all meet, and each reads what it needs: one copy in and one out,
in pieces that stay in the cache. Over several hosts the ranks of a host reduce first, then every rank meets its
counterparts on the other hosts with its own slice, so that all of them keep the network busy. The order of a sum is
fixed: ranks within a host in order, then the hosts in order, for every size and place in a tensor. What only moves
data from each to each is left to MPI, which copies as fast within a host.
"""

import torch
from mpi4py import MPI

from . import host, reduce
from .reduce import AVG, PREMUL_SUM, SUM

# Up to this many bytes from all ranks of a host together, each rank sums everything itself, which saves a meeting.
SMALL_BYTES = 1 << 20
# From so many bytes on, a broadcast within a host is faster than MPI's own, which copies once but has every rank wait.
BROADCAST_BYTES = 4 << 20


def arrange(comm, local=None):
    """A Shared for the ranks of `comm`, or None where nobody shares memory or hosts have unequal shares. Collective.

    local: communicator of the ranks of `comm` on this host; None asks MPI for it.
    """
    if comm.size == 1:
        return None
    local = local or comm.Split_type(MPI.COMM_TYPE_SHARED)
    sizes = set(comm.allgather(local.size))
    memory = host.open_memory(local) if len(sizes) == 1 and sizes != {1} else None
    if not all(comm.allgather(memory is not None)):
        local.Free()
        return None
    across = None
    if local.size < comm.size:
        across = comm.Split(local.rank, comm.rank)
    # Row a, column l: the rank that is number l on the a-th host.
    table = local.allgather(across.allgather(comm.rank) if across else [comm.rank])
    return Shared(comm, memory, across, [list(row) for row in zip(*table, strict=True)])


class Shared:
    """The ranks of a group as hosts x ranks within a host. Tensors are flat, on the CPU, of arithmetic dtypes.

    memory: host.HostMemory; across: communicator of this rank's counterparts on all hosts, None on one host;
    table: group rank by host and rank within it. All methods are collective over the group.
    """

    def __init__(self, comm, memory, across, table):
        self.rank, self.size, self.memory, self.across, self.table = comm.rank, comm.size, memory, across, table
        self.me, self.local_size = memory.comm.rank, memory.comm.size
        self.others = [local for local in range(self.local_size) if local != self.me]

    def free(self):
        """Free the communicators; the memory goes with the last tensor that looks at it."""
        self.memory.comm.Free()
        if self.across is not None:
            self.across.Free()

    def all_reduce(self, values, kind, factor=None, root=None):
        """Reduce `values` in place, on every rank or, with `root` (a group rank), there alone."""
        keeps = root is None or root == self.rank
        length = values.numel()
        if values.nbytes * self.local_size <= SMALL_BYTES:
            slots = [slot[0] for slot in self.memory.cut(values.dtype, (length,))]
            slots[self.me].copy_(values)
            self.memory.meet()
            if keeps or self.across is not None:
                self._fold(slots, kind, factor, values if keeps else values.clone())
            return
        for part in values.split(self.memory.slot_bytes // values.element_size()):
            self._reduce_part(part, kind, factor, keeps)

    def _reduce_part(self, part, kind, factor, keeps):
        """Each rank of a host gives the others their slices, sums its own, and they take the sums from each other.

        In its own slot a rank needs no place for its own slice: the sum goes there.
        """
        lengths = tuple(reduce.shares(part.numel(), self.local_size))
        slots, parts = self.memory.cut(part.dtype, lengths), part.split(lengths)
        for local in self.others:
            slots[self.me][local].copy_(parts[local])
        self.memory.meet()
        pieces = [slot[self.me] for slot in slots]
        total, pieces[self.me] = pieces[self.me], parts[self.me]
        self._fold(pieces, kind, factor, total, copy=parts[self.me] if keeps else None)
        self.memory.meet()
        if keeps:
            for local in self.others:
                parts[local].copy_(slots[local][local])

    def _fold(self, pieces, kind, factor, out, copy=None):
        """out (and copy) = the pieces of this host, and after them those of the counterparts on the other hosts."""
        count = self.size if kind == AVG else None
        if self.across is None:
            reduce.fold(pieces, kind, out, factor, count, copy)
            return
        between = torch.empty(out.numel(), dtype=reduce.wide(out.dtype, kind))
        reduce.fold(pieces, kind, between, factor)
        reduce.reduce(self.across, between, SUM if kind == PREMUL_SUM else kind, out, count=count)
        if copy is not None:
            copy.copy_(out)

    def reduce_scatter(self, blocks, kind, out, factor=None):
        """Reduce `blocks` [ranks, n] (rows contiguous) over ranks; this rank's row goes to `out` [n]."""
        step = self.memory.slot_bytes // blocks.element_size() // self.size
        hosts = len(self.table)
        mine = [row[self.me] for row in self.table]  # the rows of this rank's counterparts and its own
        for part, result in zip(blocks.split(step, dim=1), out.split(step), strict=True):
            length = result.numel()
            # In a slot: for every rank of the host, the rows of it and of its counterparts.
            slots, rows = self.memory.cut(blocks.dtype, (length,) * self.size), part.unbind(0)
            for local in self.others:
                for index, row in enumerate(self.table):
                    slots[self.me][local * hosts + index].copy_(rows[row[local]])
            self.memory.meet()
            if self.across is None:
                pieces = [slot[self.me] for slot in slots]
                pieces[self.me] = rows[self.rank]
                reduce.fold(pieces, kind, result, factor, self.size)
                continue
            between = torch.empty((hosts, length), dtype=reduce.wide(blocks.dtype, kind))
            for index, total in enumerate(between):
                pieces = [slot[self.me * hosts + index] for slot in slots]
                pieces[self.me] = rows[mine[index]]
                reduce.fold(pieces, kind, total, factor)
            onward = SUM if kind == PREMUL_SUM else kind
            reduce.reduce_scatter(self.across, between, onward, result, count=self.size)

    def broadcast(self, tensor, root):
        """Every rank gets the `tensor` (uint8 [n]) of group rank `root`. For ranks of one host."""
        source = self.table[0].index(root)
        for part in tensor.split(self.memory.slot_bytes):
            slot = self.memory.cut(torch.uint8, (part.numel(),))[source][0]
            if source == self.me:
                slot.copy_(part)
            self.memory.meet()
            if source != self.me:
                part.copy_(slot)
