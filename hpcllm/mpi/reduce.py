"""Sums (and other reductions) over ranks that are right for every dtype and the same bytes every time.

MPI moves the bytes and torch adds them up: each rank receives its slice from all ranks, folds the pieces in
rank order, and the slices are gathered. MPI's own reductions are not used, because they are silently wrong for
bfloat16 (mpi4py hands it over as bytes, which Open MPI adds as bytes), and because the order in which they sum
depends on the library, the message size and an element's place in the buffer. Here every element is
((r0 + r1) + r2) + ..., whatever bucket it travels in, so a resumed run repeats an uninterrupted one exactly.
16-bit floats travel as 16 bits, are summed in float32 and rounded once.

Works on contiguous CPU tensors; device buffers are staged by `process_group`.
"""

import torch
import torch.distributed as dist
from mpi4py import MPI

SUM, AVG, PRODUCT, MIN, MAX = "SUM", "AVG", "PRODUCT", "MIN", "MAX"
BAND, BOR, BXOR, PREMUL_SUM = "BAND", "BOR", "BXOR", "PREMUL_SUM"

# Bytes of one round: bounds the scratch memory, and keeps MPI-3's counts (C ints) far away.
CHUNK_BYTES = 1 << 26
# Up to this many bytes from all ranks together, one all-gather beats an exchange of slices and a gather.
GATHER_BYTES = 1 << 17

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_EXACT = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
_SUPPORTED = {torch.float32, torch.float64, torch.complex64, torch.complex128, *_WIDE, *_EXACT}
# torch has no arithmetic on the wider unsigned integers; sums and bit patterns are those of the signed ones.
_UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
# For booleans, the reduction of 0 and 1 that means the same as torch's on bool.
_BOOL_KIND = {SUM: MAX, PRODUCT: MIN, MIN: MIN, MAX: MAX, BAND: BAND, BOR: BOR, BXOR: BXOR}
_FOLD = {
    SUM: torch.Tensor.add_,
    AVG: torch.Tensor.add_,
    PREMUL_SUM: torch.Tensor.add_,
    PRODUCT: torch.Tensor.mul_,
    MIN: lambda a, b: torch.minimum(a, b, out=a),
    MAX: lambda a, b: torch.maximum(a, b, out=a),
    BAND: torch.Tensor.bitwise_and_,
    BOR: torch.Tensor.bitwise_or_,
    BXOR: torch.Tensor.bitwise_xor_,
}


def kind_of(op):
    """(name, factor) of a torch ReduceOp. Compared with `==`, since its hash differs from that of its members."""
    for name in (SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR):
        if op == getattr(dist.ReduceOp, name):
            return name, None
    if op == dist.ReduceOp.PREMUL_SUM:
        # torch gives the factor as an attribute from 2.13 on, and through the pickling state before.
        return PREMUL_SUM, op.factor if hasattr(op, "factor") else op.__getstate__()[1]
    raise ValueError(f"hpcllm.mpi does not know the reduction {op}")


def check(dtype, kind):
    """Raise TypeError for a pair that has no meaning or no right answer."""
    if dtype is torch.bool:
        if kind not in _BOOL_KIND:
            raise TypeError(f"{kind} of torch.bool has no meaning")
    elif dtype in _UNSIGNED:
        if kind not in (SUM, PRODUCT, BAND, BOR, BXOR):
            raise TypeError(f"torch has no {kind} of {dtype}; cast it to int64 first")
    elif dtype not in _SUPPORTED:
        raise TypeError(f"hpcllm.mpi cannot reduce {dtype}; cast it to bfloat16 or float32 first")
    elif kind in (BAND, BOR, BXOR) and dtype not in _EXACT:
        raise TypeError(f"{kind} of {dtype} has no meaning: bitwise reductions need integers")
    elif kind == PREMUL_SUM and dtype in _EXACT:
        raise TypeError(f"{kind} of {dtype} has no exact answer, since its factor is a real number; cast it to float64")
    elif kind in (MIN, MAX) and dtype.is_complex:
        raise TypeError(f"{kind} of {dtype} has no meaning: complex numbers have no order")


def _arithmetic(tensor, kind):
    """The same memory seen as a dtype that torch calculates with, and the reduction to do there."""
    if tensor.dtype is torch.bool:
        return tensor.view(torch.uint8), _BOOL_KIND[kind]
    if tensor.dtype.is_complex and kind in (SUM, AVG):
        # As pairs of real numbers: torch divides complex numbers less exactly.
        return tensor.view(tensor.dtype.to_real()), kind
    return tensor.view(_UNSIGNED.get(tensor.dtype, tensor.dtype)), kind


def fold(pieces, kind, factor=None):
    """Reduce the equally shaped CPU tensors of all ranks, in rank order; returns a new tensor of their dtype.

    factor: multiplied into every piece first (PREMUL_SUM). AVG of integers truncates towards zero.
    """

    def term(piece):
        wide = piece.to(_WIDE.get(piece.dtype, piece.dtype), copy=kind == PREMUL_SUM)
        return (
            wide.mul_(factor.to(wide) if isinstance(factor, torch.Tensor) else factor) if factor is not None else wide
        )

    dtype = pieces[0].dtype
    total = term(pieces[0])
    if total is pieces[0]:
        total = total.clone()
    for piece in pieces[1:]:
        _FOLD[kind](total, term(piece))
    if kind == AVG and dtype in _EXACT:
        total = total.div(len(pieces), rounding_mode="trunc")
    elif kind == AVG:
        total.div_(len(pieces))
    return total.to(dtype)


def _raw(tensor):
    return tensor.view(-1).view(torch.uint8).numpy()


def exchange(comm, send, send_counts, receive, receive_counts):
    """All-to-all of slices of contiguous CPU tensors; counts in elements, fewer than 2^31 bytes in all."""
    size = send.element_size()
    comm.Alltoallv(
        [_raw(send), [n * size for n in send_counts], MPI.BYTE],
        [_raw(receive), [n * size for n in receive_counts], MPI.BYTE],
    )


def all_reduce(comm, tensor, kind, factor=None):
    """Reduce a contiguous CPU tensor over the ranks of `comm`, in place on every rank."""
    _reduce(comm, tensor, kind, factor, root=None)


def reduce(comm, tensor, kind, root, factor=None):
    """As `all_reduce`, but only `root` gets the result; the other ranks keep their tensor."""
    _reduce(comm, tensor, kind, factor, root=root)


def _reduce(comm, tensor, kind, factor, root):
    check(tensor.dtype, kind)
    values, kind = _arithmetic(tensor.view(-1), kind)
    step = CHUNK_BYTES // values.element_size()
    for start in range(0, values.numel(), step):
        part = values[start : start + step]
        if part.nbytes * comm.size <= GATHER_BYTES:
            pieces = torch.empty((comm.size, part.numel()), dtype=part.dtype)
            comm.Allgather([_raw(part), MPI.BYTE], [_raw(pieces), part.nbytes, MPI.BYTE])
            if root is None or root == comm.rank:
                part.copy_(fold(pieces.unbind(0), kind, factor))
            continue
        # Slices that differ by at most one element: rank r reduces the r-th.
        counts = [part.numel() // comm.size + (rank < part.numel() % comm.size) for rank in range(comm.size)]
        mine = counts[comm.rank]
        pieces = torch.empty((comm.size, mine), dtype=part.dtype)
        exchange(comm, part, counts, pieces, [mine] * comm.size)
        total = fold(pieces.unbind(0), kind, factor)
        sizes = [n * part.element_size() for n in counts]
        if root is None:
            comm.Allgatherv([_raw(total), MPI.BYTE], [_raw(part), sizes, MPI.BYTE])
        else:
            receive = [_raw(part), sizes, MPI.BYTE] if comm.rank == root else None
            comm.Gatherv([_raw(total), MPI.BYTE], receive, root=root)


def reduce_scatter(comm, blocks, kind, factor=None):
    """Reduce `blocks` (contiguous, first dim one entry a rank) over ranks; returns this rank's block."""
    check(blocks.dtype, kind)
    values, kind = _arithmetic(blocks.view(comm.size, -1), kind)
    total = torch.empty(values.shape[1], dtype=values.dtype)
    step = max(1, CHUNK_BYTES // values.element_size() // comm.size)
    for start in range(0, values.shape[1], step):
        part = values[:, start : start + step].contiguous()
        pieces = torch.empty_like(part)
        counts = [part.shape[1]] * comm.size
        exchange(comm, part, counts, pieces, counts)
        total[start : start + step] = fold(pieces.unbind(0), kind, factor)
    return total.view(blocks.dtype).view(blocks.shape[1:])
