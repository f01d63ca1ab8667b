"""Sums (and other reductions) over ranks that are right for every dtype and the same bytes every time.

MPI moves the bytes and torch adds them up: each rank receives its slice from all ranks, folds the pieces in
rank order, and the slices are gathered. MPI's own reductions are not used, because they are silently wrong for
bfloat16 (mpi4py hands it over as bytes, which Open MPI adds as bytes), and because the order in which they sum
depends on the library, the message size and an element's place in the buffer. Here every element is
((r0 + r1) + r2) + ..., whatever bucket it travels in, so a resumed run repeats an uninterrupted one exactly.
16-bit floats travel as 16 bits (partial sums of hosts in float32), are summed in float32 and rounded once.

Works on flat tensors of a dtype that torch calculates with (see `arithmetic`), on the CPU or where MPI takes them on a
GPU, which then adds them up. Ranks that share memory go through `shared`, which folds as this file does.
"""

import functools
import threading

import torch
import torch.distributed as dist
from mpi4py import MPI

from .device import UNIT, memory

SUM, AVG, PRODUCT, MIN, MAX = "SUM", "AVG", "PRODUCT", "MIN", "MAX"
BAND, BOR, BXOR, PREMUL_SUM = "BAND", "BOR", "BXOR", "PREMUL_SUM"

# What is called here; a device buffer is handed over where all of them take it.
CALLS = ("Allgather", "Allgatherv", "Alltoallv", "Gatherv")
# Bytes of one round: bounds the scratch memory, and keeps MPI-3's counts (C ints) far away.
CHUNK_BYTES = 1 << 26
# Up to this many bytes from all ranks together, one all-gather beats an exchange of slices and a gather.
GATHER_BYTES = 1 << 17
# Elements folded at a time, so that partial sums stay in the cache of a core (measured: 2^18 best of 2^13 to 2^18).
BLOCK = 1 << 18

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_EXACT = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
_SUPPORTED = {torch.float32, torch.float64, torch.complex64, torch.complex128, *_WIDE, *_EXACT}
# torch has no arithmetic on the wider unsigned integers; sums and bit patterns are those of the signed ones.
_UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
# For booleans, the reduction of 0 and 1 that means the same as torch's on bool.
_BOOL_KIND = {SUM: MAX, PRODUCT: MIN, MIN: MIN, MAX: MAX, BAND: BAND, BOR: BOR, BXOR: BXOR}
_FOLD = {
    SUM: torch.add,
    AVG: torch.add,
    PREMUL_SUM: torch.add,
    PRODUCT: torch.mul,
    MIN: torch.minimum,
    MAX: torch.maximum,
    BAND: torch.bitwise_and,
    BOR: torch.bitwise_or,
    BXOR: torch.bitwise_xor,
}
_ROUNDS = {SUM, AVG, PRODUCT, PREMUL_SUM}  # the others pick a piece or a bit, in any precision
_NAMED = [(name, getattr(dist.ReduceOp, name)) for name in (SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR)]


def kind_of(op):
    """(name, factor) of a torch ReduceOp. Compared with `==`, since its hash differs from that of its members."""
    for name, known in _NAMED:
        if op == known:
            return name, None
    if op == dist.ReduceOp.PREMUL_SUM:
        # torch gives the factor as an attribute from 2.13 on, and through the pickling state before.
        return PREMUL_SUM, op.factor if hasattr(op, "factor") else op.__getstate__()[1]
    raise ValueError(f"hpcllm.mpi does not know the reduction {op}")


@functools.cache
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


def arithmetic(tensor, kind):
    """(the same memory, flat, as a dtype that torch calculates with; the reduction to do there).

    tensor: contiguous. Raises TypeError as `check`.
    """
    dtype = tensor.dtype
    check(dtype, kind)
    values = tensor if tensor.dim() == 1 else tensor.view(-1)
    if dtype is torch.bool:
        return values.view(torch.uint8), _BOOL_KIND[kind]
    if dtype.is_complex and kind in (SUM, AVG):
        # As pairs of real numbers: torch divides complex numbers less exactly.
        return values.view(dtype.to_real()), kind
    return values.view(_UNSIGNED[dtype]) if dtype in _UNSIGNED else values, kind


def wide(dtype, kind):
    """The dtype of partial results: float32 for what would round in 16 bits."""
    return _WIDE.get(dtype, dtype) if kind in _ROUNDS else dtype


class _Scratch(threading.local):
    """Two blocks of each dtype and thread, kept: fresh memory costs more than the sum."""

    def __init__(self):
        self.blocks = {}

    def get(self, dtype, like):
        """Two tensors of the length and device of `like`."""
        if not like.is_cpu:
            return torch.empty((2, like.numel()), dtype=dtype, device=like.device).unbind(0)  # torch keeps memory there
        if dtype not in self.blocks:
            with torch.inference_mode(False):  # it is written to outside of it too
                self.blocks[dtype] = torch.empty((2, BLOCK), dtype=dtype).unbind(0)
        return [block[: like.numel()] for block in self.blocks[dtype]]


_scratch = _Scratch()


def fold(pieces, kind, out, factor=None, count=None, copy=None):
    """out = pieces[0] + pieces[1] + ... (or another reduction), in that order.

    pieces: flat tensors of one dtype and length; out: of that length, of their dtype or `wide` of it, its memory
    its own or exactly that of one piece. factor: multiplied into every piece first (PREMUL_SUM). count: what AVG
    divides by, None where a later fold will do it; the quotient of integers is truncated towards zero. copy: where
    the result goes a second time, while it is in the cache (on the CPU).
    """
    length = out.numel()
    if not out.is_cpu:  # a GPU has no use for pieces
        _fold_block(pieces, kind, out, factor, count)
        return
    for start in range(0, length, BLOCK):
        if length > BLOCK:
            block = slice(start, start + BLOCK)
            _fold_block([piece[block] for piece in pieces], kind, out[block], factor, count)
        else:
            block = slice(None)
            _fold_block(pieces, kind, out, factor, count)
        if copy is not None:
            copy[block].copy_(out[block])


def _fold_block(pieces, kind, out, factor, count):
    dtype, add = pieces[0].dtype, _FOLD[kind]
    between = wide(dtype, kind)
    divides = kind == AVG and count is not None
    # torch, too, adds two 16-bit numbers in float32 and rounds once.
    plain = between is dtype or (len(pieces) == 2 and not divides)
    if factor is None and plain and out.dtype is dtype:
        if len(pieces) == 1:
            out.copy_(pieces[0])
        elif len(pieces) == 2:
            add(pieces[0], pieces[1], out=out)
        else:
            # `out` may be a piece that is still to be read.
            total = _scratch.get(dtype, out)[0]
            add(pieces[0], pieces[1], out=total)
            for piece in pieces[2:-1]:
                add(total, piece, out=total)
            add(total, pieces[-1], out=out)
        if divides:
            _divide(out, count)
        return
    total, term = _scratch.get(between, out)
    if out.dtype is between is not dtype:
        total = out
    if isinstance(factor, torch.Tensor):
        factor = factor.to(total)
    total.copy_(pieces[0])
    if factor is not None:
        total.mul_(factor)
    for piece in pieces[1:]:
        if factor is not None:
            piece = torch.mul(term.copy_(piece), factor, out=term)
        add(total, piece, out=total)  # widens `piece` as it goes
    if divides:
        _divide(total, count)
    if total is not out:
        out.copy_(total)


def _divide(total, count):
    if total.dtype in _EXACT:
        torch.div(total, count, rounding_mode="trunc", out=total)
    else:
        total.div_(count)


def exchange(comm, send, send_counts, receive, receive_counts):
    """All-to-all of slices of contiguous tensors; counts in elements, fewer than 2^31 bytes in all."""
    size = send.element_size()
    comm.Alltoallv(
        [memory(send), [n * size for n in send_counts], MPI.BYTE],
        [memory(receive), [n * size for n in receive_counts], MPI.BYTE],
    )


def gather_in_place(comm, whole, counts):
    """Each rank's part of the contiguous tensor `whole`, `counts` elements one after the other, goes to all ranks."""
    step, unit = CHUNK_BYTES // whole.element_size(), UNIT[whole.element_size()]
    starts = [sum(counts[:rank]) for rank in range(comm.size)]
    for offset in range(0, max(counts), step):  # MPI-3's counts are C ints
        now = [max(0, min(count - offset, step)) for count in counts]
        places = [start + offset if length else 0 for start, length in zip(starts, now, strict=True)]
        comm.Allgatherv(MPI.IN_PLACE, [memory(whole), now, places, unit])


def shares(length, size):
    """Lengths of `size` slices of `length` elements that differ by at most one."""
    return [length // size + (index < length % size) for index in range(size)]


def reduce(comm, source, kind, target, factor=None, count=None, root=None):
    """Reduce the flat tensor `source` over the ranks of `comm` into `target`, on every rank or only on `root`.

    target: `source` itself, or a tensor of the narrower dtype that the result is rounded to, as `count` says (see
    `fold`); on the ranks that get no result it is left as it is. Collective.
    """
    step = CHUNK_BYTES // source.element_size()
    for start in range(0, source.numel(), step):
        part, result = source[start : start + step], target[start : start + step]
        if part.nbytes * comm.size <= GATHER_BYTES:
            pieces = torch.empty((comm.size, part.numel()), dtype=part.dtype, device=part.device)
            comm.Allgather([memory(part), MPI.BYTE], [memory(pieces), part.nbytes, MPI.BYTE])
            if root is None or root == comm.rank:
                fold(pieces.unbind(0), kind, result, factor, count)
            continue
        # Rank r reduces the r-th slice.
        counts = shares(part.numel(), comm.size)
        mine = counts[comm.rank]
        pieces = torch.empty((comm.size, mine), dtype=part.dtype, device=part.device)
        exchange(comm, part, counts, pieces, [mine] * comm.size)
        total = torch.empty(mine, dtype=result.dtype, device=part.device)
        fold(pieces.unbind(0), kind, total, factor, count)
        sizes = [n * result.element_size() for n in counts]
        if root is None:
            comm.Allgatherv([memory(total), MPI.BYTE], [memory(result), sizes, MPI.BYTE])
        else:
            receive = [memory(result), sizes, MPI.BYTE] if comm.rank == root else None
            comm.Gatherv([memory(total), MPI.BYTE], receive, root=root)


def reduce_scatter(comm, blocks, kind, out, factor=None, count=None):
    """Reduce `blocks` [ranks of `comm`, n] (rows contiguous) over ranks; this rank's row goes to `out` [n]."""
    step = max(1, CHUNK_BYTES // blocks.element_size() // comm.size)
    for start in range(0, blocks.shape[1], step):
        part = blocks[:, start : start + step].contiguous()
        pieces = torch.empty_like(part)
        counts = [part.shape[1]] * comm.size
        exchange(comm, part, counts, pieces, counts)
        fold(pieces.unbind(0), kind, out[start : start + step], factor, count)
