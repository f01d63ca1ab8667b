"""Sums and broadcasts of ranks that share memory: they read each other's data, and MPI only says when.

Small tensors: every rank copies its own into its slot, all meet, and each adds up everything. Large ones: a rank
copies into its slot what others need of it, adds up its slice, and the others take the sum: one copy in and one out,
in pieces that stay in the cache. Tensors that lie in memory that all can reach (`peers`) are not copied: each rank adds
up its slice straight from the tensors of all and writes the sum into all. Over several hosts the ranks of a host reduce
first, then every rank meets its counterparts on the other hosts with its own slice, so that all of them keep the
network busy. The order of a sum is fixed, whatever way it goes: ranks within a host in order, then the hosts in order,
for every size and place in a tensor. What only moves data from each to each is left to MPI, which copies as fast
within a host.
"""

import torch
from mpi4py import MPI

from . import choose, host, numa, peers, reduce
from .reduce import AVG, PREMUL_SUM, SUM

# Of fewer bytes from all ranks of a host together, each rank sums everything itself, which saves a meeting; from so
# many on, each sums its slice. Between the two it is tried out (`choose`).
WHOLE_BYTES, SLICES_BYTES = 1 << 15, 1 << 22
# A broadcast within a host through the slots copies twice, but no rank waits for another one's copy as in MPI's own:
# not for fewer bytes, surely for more.
BROADCAST_MPI_BYTES, BROADCAST_BYTES = 1 << 18, 1 << 26
# From so many bytes on it pays to look whether all tensors can be reached where they lie, which is one more meeting.
LOOK_BYTES, LOOK_GATHER_BYTES = 4 << 20, 16 << 20


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
    reached = peers.reach(memory)
    everywhere = all(comm.allgather(reached is not None))
    return Shared(
        comm, memory, across, [list(row) for row in zip(*table, strict=True)], reached if everywhere else None
    )


def near(comm):
    """Shared of the ranks of `comm` that are near each other: on one host or, where it has several, one NUMA node.

    Collective.
    """
    local, node = comm.Split_type(MPI.COMM_TYPE_SHARED), numa.own_node()
    if comm.allreduce(local.size, MPI.MAX) == 1:
        local.Free()
        return Single(comm)
    sharing = local.Split(0 if node is None else 1 + node)
    places = comm.allgather((node, sharing.size))
    if all(node is not None and size == sharing.size > 1 for node, size in places):
        local.Free()
        return arrange(comm, sharing)
    sharing.Free()
    return arrange(comm, local)


class Single:
    """As Shared, for ranks that have their host to themselves."""

    def __init__(self, comm):
        self.rank, self.size, self.me, self.local_size = comm.rank, comm.size, 0, 1
        self.here, self.table = [comm.rank], [[rank] for rank in range(comm.size)]
        self.across = comm.Dup() if comm.size > 1 else None
        self.memory = self.reached = self

    def meet(self):
        pass

    def first(self, count, dtype):
        return torch.empty(count, dtype=dtype)

    def each(self, count, dtype):
        return [torch.empty(count, dtype=dtype)]


def _onward(kind):
    """The reduction of what hosts have reduced: a factor has been multiplied in by then."""
    return SUM if kind == PREMUL_SUM else kind


class Shared:
    """The ranks of a group as hosts x ranks within a host. Tensors are flat, on the CPU, of arithmetic dtypes.

    memory: host.HostMemory; across: communicator of this rank's counterparts on all hosts, None on one host;
    table: group rank by host and rank within it; reached: peers.Peers or None. All methods are collective over the
    group.
    """

    def __init__(self, comm, memory, across, table, reached):
        self.rank, self.size, self.memory, self.across, self.table = comm.rank, comm.size, memory, across, table
        self.reached, self.choices = reached, choose.Choices(comm)
        self.me, self.local_size = memory.comm.rank, memory.comm.size
        self.here = next(row for row in table if comm.rank in row)  # group ranks of this host
        self.others = [local for local in range(self.local_size) if local != self.me]

    def free(self):
        """Free the communicators; the memory goes with the last tensor that looks at it."""
        peers.forget()
        self.memory.comm.Free()
        if self.across is not None:
            self.across.Free()

    def all_reduce(self, values, kind, factor=None, root=None):
        """Reduce `values` in place, on every rank or, with `root` (a group rank), there alone."""
        ways = {"each rank sums all": self._reduce_whole, "each rank sums a slice": self._reduce_slices}
        self._by_size("all_reduce", values, ways, values, kind, factor, root)

    def _by_size(self, operation, tensor, ways, *arguments):
        """The first of two `ways` for a small `tensor`, the second for a large one, the quicker one between them."""
        whole, slices = ways.values()
        together = tensor.nbytes * self.local_size
        if together < WHOLE_BYTES or not together:
            whole(*arguments)
        elif together >= SLICES_BYTES or tensor.nbytes > self.memory.slot_bytes:
            slices(*arguments)
        else:
            self.choices.take(operation, together, ways, *arguments)

    def _reduce_whole(self, values, kind, factor, root):
        keeps = root is None or root == self.rank
        slots = [slot[0] for slot in self.memory.cut(values.dtype, (values.numel(),))]
        slots[self.me].copy_(values)
        self.memory.meet()
        if keeps or self.across is not None:
            self._fold(slots, kind, factor, values if keeps else values.clone())

    def _reduce_slices(self, values, kind, factor, root):
        keeps = root is None or root == self.rank
        given = self._open(values, values.nbytes >= LOOK_BYTES)
        if given is not None:
            self._reduce_in_place(given, kind, factor, root)
            return
        step = self.memory.slot_bytes // values.element_size()
        if self.across is None:
            for part in values.split(step):
                self._reduce_part(part, kind, factor, keeps)
            return
        for many in values.split(step * max(1, reduce.CHUNK_BYTES * self.local_size // self.memory.slot_bytes)):
            self._reduce_parts_between_hosts(many.split(step), kind, factor, keeps)

    def _open(self, tensor, worth):
        """The tensors of the ranks of this host where they lie, if that is `worth` it and all hosts can.

        All hosts go the same way, since between them other elements travel the one way than the other.
        """
        if not worth or self.reached is None:
            return None
        given = self.reached.open(tensor)
        if self.across is not None and not self.across.allreduce(given is not None, op=MPI.LAND):
            return None
        return given

    def _reduce_in_place(self, given, kind, factor, root):
        """Each rank of a host sums its slice of the tensors in `given`, and writes the sum where it is wanted."""
        lengths = tuple(reduce.shares(given[self.me].numel(), self.local_size))
        slices = [tensor.split(lengths)[self.me] for tensor in given]
        wanting = [slices[local] for local in self.others if root in (None, self.here[local])]
        own, keeps = slices[self.me], root in (None, self.rank)
        step = reduce.BLOCK if self.across is None else reduce.CHUNK_BYTES // own.element_size()
        for start in range(0, own.numel(), step):
            part = slice(start, start + step)
            pieces = [piece[part] for piece in slices]
            total = own[part] if keeps else torch.empty_like(own[part])
            self._fold(pieces, kind, factor, total)
            for other in wanting:
                other[part].copy_(total)
        self.memory.meet()

    def _reduce_part(self, part, kind, factor, keeps):
        """Each rank of a host gives the others their slices, sums its own, and they take the sums from each other.

        In its own slot a rank needs no place for its own slice: the sum goes there.
        """
        slots, parts, pieces = self._give_slices(part)
        total = slots[self.me][self.me]
        reduce.fold(pieces, kind, total, factor, self._count(kind), copy=parts[self.me] if keeps else None)
        self.memory.meet()
        if keeps:
            self._take_slices(slots, parts)

    def _reduce_parts_between_hosts(self, parts, kind, factor, keeps):
        """The same over several hosts: the sums of a rank's slices of many parts go to its counterparts at once."""
        lengths = [reduce.shares(part.numel(), self.local_size)[self.me] for part in parts]
        dtype = parts[0].dtype
        of_host = torch.empty(sum(lengths), dtype=reduce.wide(dtype, kind))
        for part, total in zip(parts, of_host.split(lengths), strict=True):
            _, _, pieces = self._give_slices(part)
            reduce.fold(pieces, kind, total, factor)
        of_all = of_host if of_host.dtype is dtype else torch.empty(len(of_host), dtype=dtype)
        reduce.reduce(self.across, of_host, _onward(kind), of_all, count=self._count(kind))
        for part, total in zip(parts, of_all.split(lengths), strict=True):
            slots, slices = self._cut_slices(part)
            slots[self.me][self.me].copy_(total)
            self.memory.meet()
            if keeps:
                slices[self.me].copy_(total)
                self._take_slices(slots, slices)

    def _cut_slices(self, part):
        """(slots, part), both cut into a slice for each rank of the host."""
        lengths = tuple(reduce.shares(part.numel(), self.local_size))
        return self.memory.cut(part.dtype, lengths), part.split(lengths)

    def _give_slices(self, part):
        """As `_cut_slices`, and this rank's slice of all ranks in their order, once everybody has given."""
        slots, parts = self._cut_slices(part)
        for local in self.others:
            slots[self.me][local].copy_(parts[local])
        self.memory.meet()
        pieces = [slot[self.me] for slot in slots]
        pieces[self.me] = parts[self.me]
        return slots, parts, pieces

    def _take_slices(self, slots, parts):
        for local in self.others:
            parts[local].copy_(slots[local][local])

    def _count(self, kind):
        return self.size if kind == AVG else None

    def _fold(self, pieces, kind, factor, out):
        """out = the pieces of this host, and after them those of the counterparts on the other hosts."""
        if self.across is None:
            reduce.fold(pieces, kind, out, factor, self._count(kind))
            return
        of_host = torch.empty(out.numel(), dtype=reduce.wide(out.dtype, kind))
        reduce.fold(pieces, kind, of_host, factor)
        reduce.reduce(self.across, of_host, _onward(kind), out, count=self._count(kind))

    def reduce_scatter(self, blocks, kind, out, factor=None):
        """Reduce `blocks` [ranks, n] (rows contiguous) over ranks; this rank's row goes to `out` [n]."""
        if self.across is not None:
            self._scatter_slices(blocks, kind, out, factor)
            return
        ways = {"all through the slots": self._scatter_whole, "what others need": self._scatter_slices}
        self._by_size("reduce_scatter", blocks, ways, blocks, kind, out, factor)

    def _scatter_whole(self, blocks, kind, out, factor):
        slots = [slot[0] for slot in self.memory.cut(blocks.dtype, (blocks.numel(),))]
        slots[self.me].copy_(blocks.view(-1))
        self.memory.meet()
        start = self.rank * out.numel()
        self._fold([slot.narrow(0, start, out.numel()) for slot in slots], kind, factor, out)

    def _scatter_slices(self, blocks, kind, out, factor):
        given = self._open(blocks.view(-1), blocks.nbytes >= LOOK_BYTES)
        if given is not None:
            self._reduce_scatter_in_place([tensor.view(blocks.shape) for tensor in given], kind, out, factor)
            return
        size, hosts = blocks.element_size(), len(self.table)
        step = max(1, self.memory.slot_bytes // size // self.size)
        if self.across is None:
            for part, total in zip(blocks.split(step, dim=1), out.split(step), strict=True):
                self._reduce_rows(part.unbind(0), kind, factor, [total], self._count(kind))
            return
        many = step * max(1, reduce.CHUNK_BYTES // (hosts * step * size))
        for columns, result in zip(blocks.split(many, dim=1), out.split(many), strict=True):
            of_host = torch.empty((hosts, result.numel()), dtype=reduce.wide(blocks.dtype, kind))
            for part, totals in zip(columns.split(step, dim=1), of_host.split(step, dim=1), strict=True):
                self._reduce_rows(part.unbind(0), kind, factor, totals.unbind(0), None)
            reduce.reduce_scatter(self.across, of_host, _onward(kind), result, count=self._count(kind))

    def _reduce_rows(self, rows, kind, factor, totals, count):
        """totals[h] = the sum over this host's ranks of the row that is for this rank's counterpart on host h."""
        # In a slot: for every rank of the host, the rows of it and of its counterparts.
        slots, hosts = self.memory.cut(rows[0].dtype, (rows[0].numel(),) * self.size), len(self.table)
        for local in self.others:
            for index, row in enumerate(self.table):
                slots[self.me][local * hosts + index].copy_(rows[row[local]])
        self.memory.meet()
        for index, (row, total) in enumerate(zip(self.table, totals, strict=True)):
            pieces = [slot[self.me * hosts + index] for slot in slots]
            pieces[self.me] = rows[row[self.me]]
            reduce.fold(pieces, kind, total, factor, count)

    def _reduce_scatter_in_place(self, given, kind, out, factor):
        if self.across is None:
            self._fold([blocks[self.rank] for blocks in given], kind, factor, out)
        else:
            hosts, dtype = len(self.table), out.dtype
            step = max(1, reduce.CHUNK_BYTES // (hosts * dtype.itemsize))
            for start in range(0, out.numel(), step):
                part = slice(start, start + step)
                of_host = torch.empty((hosts, out[part].numel()), dtype=reduce.wide(dtype, kind))
                for row, total in zip(self.table, of_host, strict=True):
                    reduce.fold([blocks[row[self.me], part] for blocks in given], kind, total, factor)
                reduce.reduce_scatter(self.across, of_host, _onward(kind), out[part], count=self._count(kind))
        self.memory.meet()

    def broadcast(self, tensor, root):
        """Every rank gets the `tensor` (uint8 [n]) of group rank `root`. For ranks of one host."""
        source = self.here.index(root)
        for part in tensor.split(self.memory.slot_bytes):
            slot = self.memory.cut(torch.uint8, (part.numel(),))[source][0]
            if source == self.me:
                slot.copy_(part)
            self.memory.meet()
            if source != self.me:
                part.copy_(slot)

    def all_gather(self, whole, tensor):
        """Rank r's `tensor` (1-d) becomes `whole[r]` on every rank. For ranks of one host.

        False, and nothing done, where a tensor lies where others cannot reach it: MPI's own copies as fast then.
        """
        given = self._open(tensor, True)
        if given is None:
            return False
        for rank, theirs in zip(self.here, given, strict=True):
            if theirs.data_ptr() != whole[rank].data_ptr():  # FSDP2 gathers in place
                whole[rank].copy_(theirs)
        self.memory.meet()
        return True
