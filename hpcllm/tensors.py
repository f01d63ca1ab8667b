"""A safetensors file that many ranks write at once, each its pieces of the tensors in it.

The file is the one that a single process would write (header of names, dtypes, shapes and offsets in JSON, then the
tensors, row by row; https://huggingface.co/docs/safetensors), so it does not tell who wrote it, and anybody reads it.
Root makes it at its full length (`create`), all ranks write their boxes (`write`); nothing is gathered anywhere.
"""

import itertools
import json
import math
import os

import torch
from safetensors.torch import _TYPES as DTYPES

from . import files

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Outline:
    """Where in a file which tensor lies. tensors: {name: (torch.dtype, shape)}, the same on all ranks."""

    def __init__(self, tensors):
        # The widest first: then all are aligned, the header being padded to a multiple of 8 bytes.
        # Then single numbers, which are not to part what lies between them.
        order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, not tensors[name][1], name))
        entries, at = {"__metadata__": {"format": "pt"}}, 0
        for name in order:
            dtype, shape = tensors[name]
            end = at + dtype.itemsize * math.prod(shape)
            entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.tensors = tensors
        self._starts = {name: len(self.header) + entries[name]["data_offsets"][0] for name in order}
        self.size_bytes = len(self.header) + at

    @property
    def dtypes(self):
        return {dtype for dtype, _ in self.tensors.values()}

    def create(self, path):
        """Make the file at its full length, so that what the disk cannot hold fails here. Raises OSError."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(handle, 0, self.size_bytes)
            files.write_at(handle, self.header, 0)
        finally:
            os.close(handle)

    def write(self, handle, name, box, values):
        """Write `values` (tensor on any device) as the `box` (slices, one a dim) of the tensor `name`."""
        for offset, part in self.stretches(name, box, values.detach().cpu()):
            files.write_at(handle, part.numpy(), offset)

    def stretches(self, name, box, values):
        """(offset in the file, uint8 tensor) of the bytes of `values`, which are the `box` of the tensor `name`."""
        dtype, shape = self.tensors[name]
        memory, at = values.contiguous().reshape(-1).view(torch.uint8), 0
        for start, length in runs(shape, box):
            count = length * dtype.itemsize
            yield self._starts[name] + start * dtype.itemsize, memory[at : at + count]
            at += count


def runs(shape, box):
    """(start, length) in elements of the stretches of a row-major array of `shape` that make up a box of it."""
    box = [range(*part.indices(length)) for part, length in zip(box, shape, strict=True)]
    if any(not len(part) for part in box):
        return
    inner = len(shape)  # dims from here on are whole
    while inner and len(box[inner - 1]) == shape[inner - 1]:
        inner -= 1
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    if inner == 0:
        yield 0, math.prod(shape)
        return
    last = inner - 1
    length = len(box[last]) * strides[last]
    for place in itertools.product(*box[:last]):
        start = sum(index * stride for index, stride in zip(place, strides, strict=False))
        yield start + box[last][0] * strides[last], length


def read(opened, name, boxes, out):
    """Fill `out` with boxes of the tensor `name` of an open file (safetensors.safe_open).

    boxes: (slices of the whole tensor, slices of `out`); see `parallel.pieces.Piece.rows`.
    """
    source = opened.get_slice(name)
    for outer, inner in boxes:
        out[inner] = source[outer] if outer else opened.get_tensor(name)
    return out
