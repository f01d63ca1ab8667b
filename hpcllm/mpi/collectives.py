"""The operations of the backend: every collective and message that torch.distributed calls, over one communicator.

Collectives run inline and are complete when they return, unless `overlap` has a thread to carry them; send and receive
are MPI requests that complete in `wait` (`work`). What adds up is in `reduce`, what
ranks of one host do in memory that they share in `shared`, which memory MPI may touch in `device`. Spellings of torch
2.11 to 2.13 are both served, by aliases at the end of the class. How groups come and go is `process_group`'s business.
"""

import torch
import torch.distributed as dist
from mpi4py import MPI

from . import overlap, reduce, shared, staging
from .device import UNIT, from_mpi, memory, to_mpi, units
from .overlap import carried
from .work import Done, Pending, timed

# MPI-3 counts are C ints; broadcasts and messages are cut into pieces of this many bytes (whole elements of any dtype).
MOVE_CHUNK_BYTES = 1 << 30


def _bytes(host):
    """A contiguous tensor as flat uint8."""
    return host.reshape(-1).view(torch.uint8)


def _pieces(host):
    """The units of a contiguous tensor, cut into calls that MPI-3 can count."""
    if host.nbytes <= MOVE_CHUNK_BYTES:
        return [units(host)]
    return [units(part) for part in host.view(-1).split(MOVE_CHUNK_BYTES // host.element_size())]


def _overlap(one, other):
    """True where two contiguous tensors share memory."""
    first, second = one.data_ptr(), other.data_ptr()
    return first < second + other.nbytes and second < first + one.nbytes


def _apart(sent, received):
    """`sent`, or a copy where it shares memory with `received`, which MPI forbids."""
    return sent.clone() if _overlap(sent, received) else sent


def _is_row(part, whole, index):
    """True where the contiguous tensor `part` is the row `index` of `whole`, which is made up of such rows."""
    return part.data_ptr() == whole.data_ptr() + index * part.nbytes


def _same_dtype(what, first, *others):
    """MPI moves bytes, so tensors of different dtypes would arrive as nonsense."""
    for other in others:
        if other.dtype is not first.dtype:
            dtypes = sorted({str(tensor.dtype) for tensor in (first, *others)})
            raise TypeError(f"{what}: tensors of different dtypes: {', '.join(dtypes)}")


def _same_numel(what, given, expected):
    if given != expected:
        raise ValueError(f"{what}: {given} elements where {expected} are needed")


class Collectives(dist.ProcessGroup):
    """Operations on tensors on the CPU or a GPU (of one kind on all ranks), contiguous or not, of any dtype and shape.

    Reductions refuse float8 and the pairs that have no meaning with TypeError (see `reduce.check`).
    """

    checker = None  # set by `check` where calls are to be compared

    def __init__(self, comm):
        super().__init__(comm.rank, comm.size)
        self.comm = comm
        self._under_way = []
        self._arranged, self._shared = False, None

    def neighbours(self):
        """shared.Shared of this group, or None; found out by its first collective call, which is one of all ranks."""
        if not self._arranged:
            self._shared, self._arranged = shared.arrange(self.comm), True
        return self._shared

    def _moves_inside(self, host):
        """True for a tensor on the CPU, in a group whose ranks share the memory of one host."""
        neighbours = self.neighbours()
        return neighbours is not None and neighbours.across is None and host.is_cpu

    def free(self):
        """Free the communicators (collective over the group). Further calls on the group fail."""
        overlap.drain()
        self._under_way = [pending for pending in self._under_way if not _over(pending)]
        if self._shared is not None:
            self._shared.free()
            self._shared = None
        if self.comm != MPI.COMM_NULL:
            self.comm.Free()
        if self.checker is not None:
            self.checker.free()

    # ---- one tensor to or from all

    @carried
    @timed
    def broadcast(self, tensors, opts):
        root = opts.rootRank
        for tensor in tensors:
            if staging.pays(tensor, "Bcast"):
                whole, mine = staging.plain(tensor), root == self.comm.rank
                row = _bytes(whole).view(1, -1)
                sent, received = (row, None) if mine else (None, row)
                staging.through_host(sent, received, lambda out, to: self._broadcast(to if out is None else out, root))
            else:
                whole = to_mpi(tensor, "Bcast", copy_in=root == self.comm.rank)
                self._broadcast(whole, root)
            from_mpi(whole, tensor)
        return Done(tensors)

    def _broadcast(self, host, root):
        if host.nbytes < shared.BROADCAST_MPI_BYTES or not self._moves_inside(host):
            self._broadcast_by_mpi(host, root)
        elif host.nbytes >= shared.BROADCAST_BYTES:
            self._shared.broadcast(_bytes(host), root)
        else:
            slots = {"slots": lambda host, root: self._shared.broadcast(_bytes(host), root)}
            ways = {"MPI": self._broadcast_by_mpi, **slots}
            self._shared.choices.take("broadcast", host.nbytes, ways, host, root)

    def _broadcast_by_mpi(self, host, root):
        for piece in _pieces(host):
            self.comm.Bcast(piece, root=root)

    def _reduce(self, tensors, op, root=None):
        kind, factor = reduce.kind_of(op)

        def add_up(values, how):
            if self.neighbours() is not None and values.is_cpu:
                self._shared.all_reduce(values, how, factor, root)
            else:
                reduce.reduce(self.comm, values, how, values, factor, self.comm.size, root)

        for tensor in tensors:
            gets = root is None or root == self.comm.rank
            if staging.pays(tensor, *reduce.CALLS):
                whole = staging.plain(tensor)
                values, how = reduce.arithmetic(whole, kind)
                row = values.view(1, -1)
                staging.through_host(row, row if gets else None, lambda out, _, how=how: add_up(out[0], how))
            else:
                whole = to_mpi(tensor, *reduce.CALLS)
                add_up(*reduce.arithmetic(whole, kind))
            if gets:
                from_mpi(whole, tensor)
        return Done(tensors)

    @carried
    @timed
    def allreduce(self, tensors, opts):
        return self._reduce(tensors, opts.reduceOp)

    @carried
    @timed
    def reduce(self, tensors, opts):
        return self._reduce(tensors, opts.reduceOp, opts.rootRank)

    # ---- pieces of all to all

    def _all_gather(self, outputs, tensor):
        """outputs: one tensor a rank, sizes may differ."""
        _same_dtype("all_gather", tensor, *outputs)
        _same_numel("all_gather: the input", tensor.numel(), outputs[self.comm.rank].numel())
        host, counts = to_mpi(tensor, "Allgatherv"), [output.numel() for output in outputs]
        gathered = torch.empty(sum(counts), dtype=tensor.dtype, device=host.device)
        self.comm.Allgatherv(units(host), [memory(gathered), counts, UNIT[tensor.element_size()]])
        for output, part in zip(outputs, gathered.split(counts), strict=True):
            output.detach().copy_(part.view(output.shape))

    @carried
    @timed
    def allgather(self, outputs, inputs, opts=None):
        for parts, tensor in zip(outputs, inputs, strict=True):
            self._all_gather(parts, tensor)
        return Done([part for parts in outputs for part in parts])

    @carried
    @timed
    def allgather_coalesced(self, outputs, inputs, opts=None):
        # outputs[rank][i] receives inputs[i] of that rank
        for i, tensor in enumerate(inputs):
            self._all_gather([parts[i] for parts in outputs], tensor)
        return Done([part for parts in outputs for part in parts])

    def _gather_single(self, output, tensor):
        count = tensor.numel()
        _same_dtype("all_gather", tensor, output)
        _same_numel("all_gather: the output", output.numel(), count * self.comm.size)
        staged = staging.pays(output, "Allgather")
        whole = staging.plain(output) if staged else to_mpi(output, "Allgather", copy_in=False)
        sent = staging.plain(tensor) if staged else to_mpi(tensor, "Allgather")
        in_place = _is_row(sent, whole, self.comm.rank)  # as FSDP2 gathers
        if not in_place:
            sent = _apart(sent, whole)
        if staged:
            rows = whole.view(self.comm.size, -1)
            staging.through_host(sent.view(1, -1), rows, lambda out, to: self._gather_rows(to, out, in_place=False))
        else:
            self._gather_rows(whole, sent, in_place)
        from_mpi(whole, output)

    def _gather_rows(self, host, sent, in_place):
        done = False
        if host.nbytes >= shared.LOOK_GATHER_BYTES and self._moves_inside(host):
            done = self._shared.all_gather(host.view(self.comm.size, -1).view(torch.uint8), _bytes(sent))
        if not done:
            sent = sent.clone() if in_place else sent
            self.comm.Allgather(units(sent), [memory(host), sent.numel(), UNIT[sent.element_size()]])

    @carried
    @timed
    def all_gather_single(self, output, tensor, opts=None):
        self._gather_single(output, tensor)
        return Done([output])

    @carried
    @timed
    def all_gather_single_coalesced(self, outputs, inputs, opts=None):
        for output, tensor in zip(outputs, inputs, strict=True):
            self._gather_single(output, tensor)
        return Done(outputs)

    @carried
    @timed
    def gather(self, outputs, inputs, opts):
        root = opts.rootRank == self.comm.rank
        for i, tensor in enumerate(inputs):
            if root:
                _same_dtype("gather", tensor, *outputs[i])
                for output in outputs[i]:
                    _same_numel("gather: an output", output.numel(), tensor.numel())
            host, receive = to_mpi(tensor, "Gather"), None
            if root:
                gathered = torch.empty((self.comm.size, *tensor.shape), dtype=tensor.dtype, device=host.device)
                receive = [memory(gathered), tensor.numel(), UNIT[tensor.element_size()]]
            self.comm.Gather(units(host), receive, root=opts.rootRank)
            if root:
                for output, part in zip(outputs[i], gathered, strict=True):
                    output.detach().copy_(part.view(output.shape))
        return Done([part for parts in outputs for part in parts])

    @carried
    @timed
    def scatter(self, outputs, inputs, opts):
        root = opts.rootRank == self.comm.rank
        for i, output in enumerate(outputs):
            if root:
                _same_dtype("scatter", output, *inputs[i])
                for part in inputs[i]:
                    _same_numel("scatter: an input", part.numel(), output.numel())
            host = to_mpi(output, "Scatter", copy_in=False)
            parts = torch.cat([_bytes(to_mpi(part, "Scatter")) for part in inputs[i]]) if root else None
            send = [memory(parts), output.numel(), UNIT[output.element_size()]] if root else None
            self.comm.Scatter(send, units(host), root=opts.rootRank)
            from_mpi(host, output)
        return Done(outputs)

    # ---- reduce-scatter: exchange blocks as they are, fold them locally in rank order

    def _reduce_scatter(self, output, blocks, opts):
        """blocks: tensor of any shape whose elements are the blocks of the ranks, one after the other."""
        kind, factor = reduce.kind_of(opts.reduceOp)

        def add_up(values, how, out):
            if self.neighbours() is not None and values.is_cpu:
                self._shared.reduce_scatter(values, how, out, factor)
            else:
                reduce.reduce_scatter(self.comm, values, how, out, factor, self.comm.size)

        staged = staging.pays(blocks, *reduce.CALLS)
        blocks = staging.plain(blocks) if staged else to_mpi(blocks, *reduce.CALLS)
        whole = staging.plain(output) if staged else to_mpi(output, *reduce.CALLS, copy_in=False)
        if not _is_row(whole, blocks, self.comm.rank):
            blocks = _apart(blocks, whole)
        values, how = reduce.arithmetic(blocks, kind)
        rows, out = values.view(self.comm.size, -1), reduce.arithmetic(whole, kind)[0]
        if staged:
            staging.through_host(rows, out.view(1, -1), lambda given, to: add_up(given, how, to[0]))
        else:
            add_up(rows, how, out)
        from_mpi(whole, output)

    @carried
    @timed
    def reduce_scatter(self, outputs, inputs, opts):
        for output, parts in zip(outputs, inputs, strict=True):
            _same_dtype("reduce_scatter", output, *parts)
            _same_numel("reduce_scatter: the output", output.numel(), parts[self.comm.rank].numel())
            if any(part.numel() != output.numel() for part in parts):
                # Ranks hold pieces of different sizes: every piece is summed, and each rank keeps its own.
                for rank, part in enumerate(parts):
                    total = part.detach().clone()
                    self._reduce([total], opts.reduceOp, rank)
                    if rank == self.comm.rank:
                        output.detach().copy_(total.view(output.shape))
            else:
                self._reduce_scatter(
                    output, torch.stack([to_mpi(part, *reduce.CALLS).view(-1) for part in parts]), opts
                )
        return Done(outputs)

    def _scatter_single(self, output, tensor, opts):
        _same_dtype("reduce_scatter", output, tensor)
        _same_numel("reduce_scatter: the input", tensor.numel(), output.numel() * self.comm.size)
        self._reduce_scatter(output, tensor, opts)

    @carried
    @timed
    def reduce_scatter_single(self, output, tensor, opts):
        self._scatter_single(output, tensor, opts)
        return Done([output])

    @carried
    @timed
    def reduce_scatter_single_coalesced(self, outputs, inputs, opts):
        for output, tensor in zip(outputs, inputs, strict=True):
            self._scatter_single(output, tensor, opts)
        return Done(outputs)

    def allreduce_coalesced(self, tensors, opts):
        return self.allreduce(tensors, opts)

    # ---- all to all

    def _all_to_all(self, received, sent, receive_counts, send_counts):
        """received, sent: contiguous tensors of one dtype; counts: elements from and to each rank."""
        unit, sent = UNIT[sent.element_size()], _apart(sent, received)
        self.comm.Alltoallv([memory(sent), send_counts, unit], [memory(received), receive_counts, unit])

    @carried
    @timed
    def alltoall(self, outputs, inputs, opts=None):
        _same_dtype("all_to_all", *outputs, *inputs)
        sent = torch.cat([_bytes(to_mpi(part, "Alltoallv")) for part in inputs]).view(inputs[0].dtype)
        counts = [output.numel() for output in outputs]
        received = torch.empty(sum(counts), dtype=sent.dtype, device=sent.device)
        self._all_to_all(received, sent, counts, [part.numel() for part in inputs])
        for output, part in zip(outputs, received.split(counts), strict=True):
            output.detach().copy_(part.view(output.shape))
        return Done(outputs)

    @carried
    @timed
    def all_to_all_single(self, output, tensor, output_splits, input_splits, opts=None):
        _same_dtype("all_to_all_single", output, tensor)

        def counts(splits, whole):
            rows, size = whole.shape[0], self.comm.size
            splits = splits or [rows // size] * size
            if len(splits) != size or sum(splits) != rows:
                raise ValueError(f"all_to_all_single: {rows} rows cannot be split as {splits}")
            row = whole.numel() // max(rows, 1)
            return splits if row == 1 else [n * row for n in splits]

        host = to_mpi(output, "Alltoallv", copy_in=False)
        self._all_to_all(host, to_mpi(tensor, "Alltoallv"), counts(output_splits, output), counts(input_splits, tensor))
        from_mpi(host, output)
        return Done([output])

    # ---- point to point

    @timed
    def send(self, tensors, destination, tag):
        (tensor,) = tensors
        host = to_mpi(tensor, "Isend")
        requests = [self.comm.Isend(piece, dest=destination, tag=tag) for piece in _pieces(host)]
        return self._keep(Pending(tensor, host, requests, False, self.place, destination))

    def _keep(self, work):
        # A caller may drop the handle; the buffer must live until MPI has read or filled it.
        self._under_way = [pending for pending in self._under_way if not pending.is_completed()] + [work]
        return work

    @timed
    def recv(self, tensors, source, tag):
        (tensor,) = tensors
        host = to_mpi(tensor, "Isend", copy_in=False)
        pieces = _pieces(host)
        if source == MPI.ANY_SOURCE and len(pieces) > 1:
            # The pieces of two senders could interleave.
            raise ValueError(f"a message of {host.nbytes} bytes (> {MOVE_CHUNK_BYTES}) needs a named source")
        requests = [self.comm.Irecv(piece, source=source, tag=tag) for piece in pieces]
        return self._keep(Pending(tensor, host, requests, True, self.place, source))

    def recv_anysource(self, tensors, tag):
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    @carried
    @timed
    def barrier(self, opts=None):
        self.comm.Barrier()
        return Done([])

    # ---- a block of calls that torch would like to have as one: they are made one by one

    def _start_coalescing(self, device=None):
        pass

    def _end_coalescing(self, device=None):
        overlap.drain()
        return Done([])

    # torch 2.11 and 2.12 call the same operations by these names
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _over(pending):
    """Whether a Work is over, one way or another: those of a group in which ranks have died end with errors."""
    try:
        return pending.is_completed()
    except MPI.Exception:
        return True
