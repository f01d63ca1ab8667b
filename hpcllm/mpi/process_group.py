"""The torch.distributed backend "mpi4py": every collective that PyTorch's own parallelism calls, over MPI.

A Python subclass of torch's ProcessGroup with one MPI communicator of its own. Collectives run inline and
are complete when they return (MPI libraries do not progress them in the background without a spare core);
send and receive are MPI requests that complete in `wait` (`work`). What adds up is in `reduce`, which memory MPI
may touch in `device`. Spellings of torch 2.11 to 2.13 are both served, by aliases at the end of the class.
"""

import zlib

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed.distributed_c10d import default_pg_timeout

from . import reduce, watch
from .barrier import MonitoredBarrier
from .device import from_host, to_host
from .work import Done, Pending, timed

BACKEND = "mpi4py"

# MPI-3 counts are C ints; broadcasts and messages are cut into pieces of this many bytes (whole elements of any dtype).
MOVE_CHUNK_BYTES = 1 << 30
_UNIT = {1: MPI.BYTE, 2: MPI.INT16_T, 4: MPI.INT32_T, 8: MPI.INT64_T, 16: MPI.C_DOUBLE_COMPLEX}


def register(comm):
    """Make `init_process_group("mpi4py")` and `new_group` build groups over sub-communicators of `comm`."""
    if hasattr(dist.Backend, BACKEND.upper()):
        return

    def create(options, _):
        ranks = list(options.global_ranks_in_group)
        if options.group_size != (len(ranks) or comm.size):
            raise ValueError(f"a group of {options.group_size} was asked for in an MPI world of {comm.size}")
        # What torch hands over when nobody has asked for a timeout.
        timeout = None if options.timeout == default_pg_timeout else options.timeout
        if not ranks or ranks == list(range(comm.size)):
            return MpiProcessGroup(comm.Dup(), options.group_id, range(comm.size), timeout)
        members = comm.group.Incl(ranks)
        # Only members call this, so the communicator is made by the members alone; the tag keeps apart groups that
        # are being made at the same time. Not from the group's name: torch counts, and ranks may count differently.
        sub = comm.Create_group(members, tag=zlib.crc32(str(ranks).encode()) % 32768)
        members.Free()
        return MpiProcessGroup(sub, options.group_id, ranks, timeout)

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])


def _units(host):
    """A contiguous CPU tensor as an MPI buffer of whole elements, whatever its dtype means."""
    size = host.element_size()
    return [host.reshape(-1).view(torch.uint8).numpy(), host.numel(), _UNIT[size]]


def _bytes(tensor):
    return to_host(tensor).reshape(-1).view(torch.uint8)


def _pieces(host):
    """The same, cut into calls that MPI-3 can count."""
    flat = host.view(-1)
    step = MOVE_CHUNK_BYTES // host.element_size()
    for start in range(0, max(flat.numel(), 1), step):
        yield _units(flat[start : start + step])


def _apart(sent, received):
    """`sent`, or a copy where it shares memory with `received` (FSDP2 gathers in place), which MPI forbids."""
    return sent.clone() if sent.untyped_storage().data_ptr() == received.untyped_storage().data_ptr() else sent


def _same_dtype(what, *tensors):
    """MPI moves bytes, so tensors of different dtypes would arrive as nonsense."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise TypeError(f"{what}: tensors of different dtypes: {', '.join(sorted(map(str, dtypes)))}")


def _same_numel(what, given, expected):
    if given != expected:
        raise ValueError(f"{what}: {given} elements where {expected} are needed")


class MpiProcessGroup(dist.ProcessGroup):
    """One group of ranks; tensors may be on the CPU or a GPU, contiguous or not, of any dtype and shape.

    Reductions refuse float8 and the pairs that have no meaning with TypeError (see `reduce.check`).
    """

    checker = None  # set by `check` where calls are to be compared

    def __init__(self, comm, name, ranks=None, timeout=None):
        """ranks: world ranks of the members; timeout: timedelta that an operation may wait, None: the setting's."""
        super().__init__(comm.rank, comm.size)
        self.comm = comm
        self.place = watch.place(name, ranks, timeout) if ranks else None
        self._name, self._description = name, "undefined"
        self._under_way, self._monitored = [], None

    # ---- names: DeviceMesh and the functional collectives find groups by these

    def getBackendName(self):
        return BACKEND

    def name(self):
        return BACKEND

    def getRank(self):
        return self.comm.rank

    def getSize(self):
        return self.comm.size

    def getGroupName(self):
        return self._name

    def setGroupName(self, name):
        self._name = name

    def getGroupDesc(self):
        return self._description

    def setGroupDesc(self, description):
        self._description = description

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc
    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)

    # torch 2.15 asks a group for the backend of a device, and that for what it can do.
    supports_coalescing = supports_splitting = False

    def _get_backend(self, device=None):
        return self

    def shutdown(self):
        """Free the communicator (collective over the group). Further calls on the group fail."""
        self._under_way = [pending for pending in self._under_way if not pending.is_completed()]
        if self.comm != MPI.COMM_NULL:
            self.comm.Free()
        if self.checker is not None:
            self.checker.free()

    # ---- one tensor to or from all

    @timed
    def broadcast(self, tensors, opts):
        for tensor in tensors:
            host = to_host(tensor, copy_in=opts.rootRank == self.comm.rank)
            for piece in _pieces(host):
                self.comm.Bcast(piece, root=opts.rootRank)
            from_host(host, tensor)
        return Done(tensors)

    @timed
    def allreduce(self, tensors, opts):
        kind, factor = reduce.kind_of(opts.reduceOp)
        for tensor in tensors:
            host = to_host(tensor)
            reduce.all_reduce(self.comm, host, kind, factor)
            from_host(host, tensor)
        return Done(tensors)

    @timed
    def reduce(self, tensors, opts):
        kind, factor = reduce.kind_of(opts.reduceOp)
        for tensor in tensors:
            host = to_host(tensor)
            reduce.reduce(self.comm, host, kind, opts.rootRank, factor)
            if opts.rootRank == self.comm.rank:
                from_host(host, tensor)
        return Done(tensors)

    # ---- pieces of all to all

    def _all_gather(self, outputs, tensor):
        """outputs: one tensor a rank, sizes may differ."""
        _same_dtype("all_gather", tensor, *outputs)
        _same_numel("all_gather: the input", tensor.numel(), outputs[self.comm.rank].numel())
        gathered = torch.empty(sum(o.numel() for o in outputs), dtype=tensor.dtype)
        counts = [output.numel() for output in outputs]
        self.comm.Allgatherv(_units(to_host(tensor)), [_units(gathered)[0], counts, _UNIT[tensor.element_size()]])
        for output, part in zip(outputs, gathered.split(counts), strict=True):
            output.detach().copy_(part.view(output.shape))

    @timed
    def allgather(self, outputs, inputs, opts=None):
        for parts, tensor in zip(outputs, inputs, strict=True):
            self._all_gather(parts, tensor)
        return Done([part for parts in outputs for part in parts])

    @timed
    def allgather_coalesced(self, outputs, inputs, opts=None):
        # outputs[rank][i] receives inputs[i] of that rank
        for i, tensor in enumerate(inputs):
            self._all_gather([parts[i] for parts in outputs], tensor)
        return Done([part for parts in outputs for part in parts])

    @timed
    def all_gather_single(self, output, tensor, opts=None):
        count = tensor.numel()
        _same_dtype("all_gather", tensor, output)
        _same_numel("all_gather: the output", output.numel(), count * self.comm.size)
        host = to_host(output, copy_in=False)
        receive = [_units(host)[0], count, _UNIT[tensor.element_size()]]
        send = _units(_apart(to_host(tensor), host))
        self.comm.Allgather(send, receive)
        from_host(host, output)
        return Done([output])

    def all_gather_single_coalesced(self, outputs, inputs, opts=None):
        for output, tensor in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, tensor, opts)
        return Done(outputs)

    @timed
    def gather(self, outputs, inputs, opts):
        root = opts.rootRank == self.comm.rank
        for i, tensor in enumerate(inputs):
            if root:
                _same_dtype("gather", tensor, *outputs[i])
                for output in outputs[i]:
                    _same_numel("gather: an output", output.numel(), tensor.numel())
            host = to_host(tensor)
            gathered = torch.empty((self.comm.size, *tensor.shape), dtype=tensor.dtype) if root else None
            receive = [_units(gathered)[0], tensor.numel(), _UNIT[tensor.element_size()]] if root else None
            self.comm.Gather(_units(host), receive, root=opts.rootRank)
            if root:
                for output, part in zip(outputs[i], gathered, strict=True):
                    output.detach().copy_(part.view(output.shape))
        return Done([part for parts in outputs for part in parts])

    @timed
    def scatter(self, outputs, inputs, opts):
        root = opts.rootRank == self.comm.rank
        for i, output in enumerate(outputs):
            if root:
                _same_dtype("scatter", output, *inputs[i])
                for part in inputs[i]:
                    _same_numel("scatter: an input", part.numel(), output.numel())
            host = to_host(output, copy_in=False)
            parts = torch.cat([_bytes(part) for part in inputs[i]]) if root else None
            send = [parts.numpy(), output.numel(), _UNIT[output.element_size()]] if root else None
            self.comm.Scatter(send, _units(host), root=opts.rootRank)
            from_host(host, output)
        return Done(outputs)

    # ---- reduce-scatter: exchange blocks as they are, fold them locally in rank order

    def _reduce_scatter(self, output, blocks, opts):
        """blocks: contiguous CPU tensor whose first dim has one entry a rank."""
        kind, factor = reduce.kind_of(opts.reduceOp)
        output.detach().copy_(reduce.reduce_scatter(self.comm, blocks, kind, factor).view(output.shape))

    @timed
    def reduce_scatter(self, outputs, inputs, opts):
        for output, parts in zip(outputs, inputs, strict=True):
            _same_dtype("reduce_scatter", output, *parts)
            _same_numel("reduce_scatter: the output", output.numel(), parts[self.comm.rank].numel())
            if any(part.numel() != output.numel() for part in parts):
                # Ranks hold pieces of different sizes: every piece is summed, and each rank keeps its own.
                kind, factor = reduce.kind_of(opts.reduceOp)
                for rank, part in enumerate(parts):
                    total = to_host(part).clone()
                    reduce.reduce(self.comm, total, kind, rank, factor)
                    if rank == self.comm.rank:
                        output.detach().copy_(total.view(output.shape))
            else:
                self._reduce_scatter(output, torch.stack([to_host(part).view(-1) for part in parts]), opts)
        return Done(outputs)

    @timed
    def reduce_scatter_single(self, output, tensor, opts):
        _same_dtype("reduce_scatter", output, tensor)
        _same_numel("reduce_scatter: the input", tensor.numel(), output.numel() * self.comm.size)
        self._reduce_scatter(output, to_host(tensor).view(self.comm.size, -1), opts)
        return Done([output])

    def reduce_scatter_single_coalesced(self, outputs, inputs, opts):
        for output, tensor in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, tensor, opts)
        return Done(outputs)

    def allreduce_coalesced(self, tensors, opts):
        return self.allreduce(tensors, opts)

    # ---- all to all

    def _all_to_all(self, received, sent, receive_counts, send_counts):
        unit = _UNIT[sent.element_size()]
        self.comm.Alltoallv(
            [_units(sent)[0], list(send_counts), unit], [_units(received)[0], list(receive_counts), unit]
        )

    @timed
    def alltoall(self, outputs, inputs, opts=None):
        _same_dtype("all_to_all", *outputs, *inputs)
        sent = torch.cat([_bytes(part) for part in inputs]).view(inputs[0].dtype)
        counts = [output.numel() for output in outputs]
        received = torch.empty(sum(counts), dtype=sent.dtype)
        self._all_to_all(received, sent, counts, [part.numel() for part in inputs])
        for output, part in zip(outputs, received.split(counts), strict=True):
            output.detach().copy_(part.view(output.shape))
        return Done(outputs)

    @timed
    def all_to_all_single(self, output, tensor, output_splits, input_splits, opts=None):
        _same_dtype("all_to_all_single", output, tensor)

        def counts(splits, whole):
            rows = splits or [whole.shape[0] // self.comm.size] * self.comm.size
            if len(rows) != self.comm.size or sum(rows) != whole.shape[0]:
                raise ValueError(f"all_to_all_single: {whole.shape[0]} rows cannot be split as {rows}")
            row = whole[0].numel() if whole.shape[0] else 0
            return [n * row for n in rows]

        host = to_host(output, copy_in=False)
        self._all_to_all(
            host, _apart(to_host(tensor), host), counts(output_splits, output), counts(input_splits, tensor)
        )
        from_host(host, output)
        return Done([output])

    # ---- point to point

    @timed
    def send(self, tensors, destination, tag):
        (tensor,) = tensors
        host = to_host(tensor)
        requests = [self.comm.Isend(piece, dest=destination, tag=tag) for piece in _pieces(host)]
        return self._keep(Pending(tensor, host, requests, False, self.place, destination))

    def _keep(self, work):
        # A caller may drop the handle; the buffer must live until MPI has read or filled it.
        self._under_way = [pending for pending in self._under_way if not pending.is_completed()] + [work]
        return work

    @timed
    def recv(self, tensors, source, tag):
        (tensor,) = tensors
        host = to_host(tensor, copy_in=False)
        pieces = list(_pieces(host))
        if source == MPI.ANY_SOURCE and len(pieces) > 1:
            # The pieces of two senders could interleave.
            raise ValueError(f"a message of {host.nbytes} bytes (> {MOVE_CHUNK_BYTES}) needs a named source")
        requests = [self.comm.Irecv(piece, source=source, tag=tag) for piece in pieces]
        return self._keep(Pending(tensor, host, requests, True, self.place, source))

    def recv_anysource(self, tensors, tag):
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    @timed
    def barrier(self, opts=None):
        self.comm.Barrier()
        return Done([])

    def monitored_barrier(self, timeout=None, wait_all_ranks=False):
        """A barrier that raises on every rank after `timeout` (timedelta) and names who has not come (`barrier`)."""
        self._monitored = self._monitored or MonitoredBarrier(self.comm)
        self._monitored.wait((timeout or default_pg_timeout).total_seconds(), wait_all_ranks)

    # ---- a block of calls that torch would like to have as one: they are made one by one

    def _start_coalescing(self, device=None):
        pass

    def _end_coalescing(self, device=None):
        return Done([])

    # torch 2.11 and 2.12 call the same operations by these names
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single
