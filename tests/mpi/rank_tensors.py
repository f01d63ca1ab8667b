"""Inputs of the collective tests: numbers that every rank can compute for every rank, in any dtype and layout; and what
their reductions are on one process. And who runs only where there is a GPU."""

import functools

import pytest
import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
COMPLEX = (torch.complex64, torch.complex128)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (torch.bool, *INTEGERS, *UNSIGNED, *FLOATS, *COMPLEX, *FLOAT8)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that this machine does not have")


@functools.cache
def _draw(rank, shape, salt):
    draw = torch.Generator().manual_seed(1000 * salt + rank)
    return torch.randint(-8, 9, (2, *shape), generator=draw)


def numbers(rank, shape, dtype, salt=0):
    """Small whole numbers of `rank`, exact in every dtype: -8 to 8, unsigned 0 to 8."""
    real, imaginary = _draw(rank, shape, salt).clone()
    if dtype is torch.bool:
        return real > 0
    if dtype.is_complex:
        return torch.complex(real.double(), imaginary.double()).to(dtype)
    if not dtype.is_signed:
        real = real.abs()
    return real.to(dtype)


ON_ONE_PROCESS = {
    "SUM": torch.add,
    "AVG": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}


def expected(kind, tensors):
    """The reduction in the widest type, rounded once to the dtype of the tensors."""
    dtype = tensors[0].dtype
    if dtype is torch.bool:
        kind = {"SUM": "BOR", "MAX": "BOR", "PRODUCT": "BAND", "MIN": "BAND"}.get(kind, kind)
        return functools.reduce(ON_ONE_PROCESS[kind], tensors)
    if dtype.is_complex and kind in ("SUM", "AVG"):
        return torch.view_as_complex(expected(kind, [torch.view_as_real(tensor) for tensor in tensors]))
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    total = functools.reduce(ON_ONE_PROCESS[kind], [tensor.to(wide) for tensor in tensors])
    if kind == "AVG":
        total = total / len(tensors) if wide is not torch.int64 else total.div(len(tensors), rounding_mode="trunc")
    return total.to(dtype)


def layouts(tensor):
    """The same values as (name, tensor), laid out in memory in the ways that PyTorch programs do."""
    yield "contiguous", tensor.clone()
    if tensor.dim() == 2:
        yield "transposed", tensor.clone().t().contiguous().t()
    if tensor.dim() == 4:
        yield "channels last", tensor.clone(memory_format=torch.channels_last)
    if tensor.dim() >= 1:
        wide = torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)
        wide[..., 1].copy_(tensor)
        yield "every second element", wide[..., 1]


SHAPES = ((5,), (), (0,), (3, 4), (2, 3, 2, 2))


def inputs(dtype):
    """(what, function of the rank that makes its tensor) for all shapes and layouts."""
    for shape in SHAPES:
        for index, (name, _) in enumerate(layouts(numbers(0, shape, dtype))):

            def make(rank, salt=0, shape=shape, index=index):
                return list(layouts(numbers(rank, shape, dtype, salt)))[index][1]

            yield f"{shape} {name}", make


def same(ours, expected):
    """Equal in dtype, shape and every bit."""
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    plain = [t.detach().clone(memory_format=torch.contiguous_format).view(-1) for t in (ours, expected)]
    return torch.equal(*(tensor.view(torch.uint8) for tensor in plain))


def finish(work, asynchronous):
    """Wait for what a call with async_op=`asynchronous` returned."""
    if asynchronous:
        assert work.wait()
        assert work.is_completed()
        assert work.is_success()
    else:
        assert work is None
