"""Sums (and other reductions) over ranks that are right for every dtype of torch.

MPI libraries know neither bfloat16 nor, reliably, float16: mpi4py hands them over as bytes, and Open MPI adds
the bytes up without an error. So 16-bit floats never reach an MPI reduction: they are added up in float32 and
rounded once. Works on contiguous CPU tensors; device buffers are staged by `process_group`.
"""

import torch
import torch.distributed as dist
from mpi4py import MPI

SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR, PREMUL_SUM = (
    "SUM",
    "AVG",
    "PRODUCT",
    "MIN",
    "MAX",
    "BAND",
    "BOR",
    "BXOR",
    "PREMUL_SUM",
)

_MPI_OP = {
    SUM: MPI.SUM,
    AVG: MPI.SUM,
    PREMUL_SUM: MPI.SUM,
    PRODUCT: MPI.PROD,
    MIN: MPI.MIN,
    MAX: MPI.MAX,
    BAND: MPI.BAND,
    BOR: MPI.BOR,
    BXOR: MPI.BXOR,
}
_BITWISE = {BAND, BOR, BXOR}
_ORDER = {MIN, MAX}

# The dtypes that MPI standard types cover one to one. Everything else is refused by name, never guessed.
_DIRECT = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
}
_WIDENED = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
# Or, for booleans, the reduction of 0 and 1 that means the same as torch's on bool.
_BOOL_OP = {SUM: MAX, AVG: MAX, PRODUCT: MIN, MIN: MIN, MAX: MAX, BAND: BAND, BOR: BOR, BXOR: BXOR}

# Elements per MPI call: counts are C ints in MPI-3, and a bound keeps the float32 scratch of 16-bit sums small.
DIRECT_CHUNK = 1 << 28
WIDENED_CHUNK = 1 << 22


def kind_of(op):
    """Name of a torch ReduceOp. Compared with `==`, since ReduceOp's hash differs from that of its members."""
    for name in (SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR):
        if op == getattr(dist.ReduceOp, name):
            return name, None
    if op == dist.ReduceOp.PREMUL_SUM:
        # torch gives the factor as an attribute from 2.13 on, and through the pickling state before.
        factor = op.factor if hasattr(op, "factor") else op.__getstate__()[1]
        return PREMUL_SUM, factor
    raise ValueError(f"hpcllm.mpi does not know the reduction {op}")


def check(dtype, kind):
    """Raise TypeError for a pair that has no meaning or no right answer over MPI."""
    if dtype is torch.bool:
        if kind not in _BOOL_OP:
            raise TypeError(f"{kind} of torch.bool has no meaning")
    elif dtype not in _DIRECT and dtype not in _WIDENED:
        raise TypeError(f"hpcllm.mpi cannot reduce {dtype}; cast it to bfloat16 or float32 first")
    elif kind in _BITWISE and (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"{kind} of {dtype} has no meaning: bitwise reductions need integers")
    elif kind in _ORDER and dtype.is_complex:
        raise TypeError(f"{kind} of {dtype} has no meaning: complex numbers have no order")


def _before(values, kind, factor):
    if kind == PREMUL_SUM:
        values.mul_(factor.to(values) if isinstance(factor, torch.Tensor) else factor)


def _after(values, kind, size):
    if kind == AVG:
        if values.is_floating_point() or values.is_complex():
            values.div_(size)
        else:
            values.copy_(values.div(size, rounding_mode="trunc"))


def all_reduce(comm, tensor, kind, factor=None):
    """Reduce a contiguous CPU tensor over `comm`, in place on every rank.

    kind: one of the names above; factor: multiplied into every rank's values first (PREMUL_SUM).
    16-bit floats travel and add up as float32 in chunks of WIDENED_CHUNK elements, then are rounded once.
    """
    _chunked(comm, tensor, kind, factor, root=None)


def reduce(comm, tensor, kind, root, factor=None):
    """As `all_reduce`, but only `root` gets the result; the other ranks keep their tensor."""
    _chunked(comm, tensor, kind, factor, root=root)


def _chunked(comm, tensor, kind, factor, root):
    check(tensor.dtype, kind)
    flat = tensor.view(-1)
    if flat.dtype is torch.bool:
        kind, flat = _BOOL_OP[kind], flat.view(torch.uint8)
    wide = _WIDENED.get(flat.dtype)
    step = WIDENED_CHUNK if wide else DIRECT_CHUNK
    op = _MPI_OP[kind]
    keeps = root is not None and comm.rank != root
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        # A rank that must keep its input reduces a copy wherever the arithmetic would touch it.
        values = part.to(wide) if wide else part.clone() if keeps and kind == PREMUL_SUM else part
        _before(values, kind, factor)
        buffer = [values.numpy(), values.numel(), _DIRECT[values.dtype]]
        if root is None:
            comm.Allreduce(MPI.IN_PLACE, buffer, op=op)
        elif keeps:
            comm.Reduce(buffer, None, op=op, root=root)
            continue
        else:
            comm.Reduce(MPI.IN_PLACE, buffer, op=op, root=root)
        _after(values, kind, comm.size)
        if values is not part:
            part.copy_(values)


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


def fold(blocks, kind, factor=None):
    """Reduce equally shaped CPU tensors, one of each rank, in rank order; returns a new tensor of their dtype.

    16-bit floats are folded in float32 and rounded once. The fixed order makes the result the same bytes
    whichever rank computes it.
    """
    dtype = blocks[0].dtype
    check(dtype, kind)
    if dtype is torch.bool:
        kind, blocks = _BOOL_OP[kind], [block.view(torch.uint8) for block in blocks]
    total = blocks[0].to(_WIDENED.get(dtype, blocks[0].dtype), copy=True)
    _before(total, kind, factor)
    for block in blocks[1:]:
        term = block.to(total.dtype, copy=kind == PREMUL_SUM)
        _before(term, kind, factor)
        _FOLD[kind](total, term)
    _after(total, kind, len(blocks))
    return total.view(torch.bool) if dtype is torch.bool else total.to(dtype)
