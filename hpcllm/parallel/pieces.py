"""Which part of a named tensor of the whole model a rank holds; what checkpoints and norms must know of a layout.

A tensor is cut along one dim at most by the tensor axis, into ranges of it (several where parts are packed, as the
queries, keys and values of GPT-2 are), and what is left along its first dim by the shard axis.
"""

from dataclasses import dataclass

import torch

from ..mpi.reduce import shares


@dataclass(frozen=True)
class Piece:
    """shape: of the whole tensor. dim, ranges: what of which dim is here; dim None: all of it."""

    shape: torch.Size
    dim: int | None = None
    ranges: tuple = ()

    @property
    def local_shape(self):
        if self.dim is None:
            return self.shape
        shape = list(self.shape)
        shape[self.dim] = sum(stop - start for start, stop in self.ranges)
        return torch.Size(shape)

    def take(self, whole):
        """This piece of the tensor `whole`, as a tensor of its own."""
        if self.dim is None:
            return whole.clone()
        parts = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return torch.cat(parts, dim=self.dim).contiguous()

    def rows(self, start, stop):
        """The part [start, stop) of this piece along its first dim, as boxes of the whole tensor.

        Each box is (slices of the whole, one a dim; slices of the part's own rows, one a dim).
        """
        whole = [slice(0, length) for length in self.shape]
        count = stop - start
        if not self.shape:
            return [((), ())]
        if self.dim is None or self.dim > 0:
            boxes, at = [], 0
            for begin, end in self.ranges if self.dim else [(None, None)]:
                outer, inner = list(whole), [slice(0, length) for length in self.local_shape]
                outer[0], inner[0] = slice(start, stop), slice(0, count)
                if self.dim:
                    outer[self.dim], inner[self.dim] = slice(begin, end), slice(at, at + end - begin)
                    at += end - begin
                boxes.append((tuple(outer), tuple(inner)))
            return boxes if count else []
        boxes, at = [], 0  # at: row of this piece where the range begins
        for begin, end in self.ranges:
            first, last = max(start, at), min(stop, at + end - begin)
            if first < last:
                outer = (slice(begin + first - at, begin + last - at), *whole[1:])
                inner = (slice(first - start, last - start), *(slice(0, length) for length in self.shape[1:]))
                boxes.append((outer, inner))
            at += end - begin
        return boxes


def cut(shape, dim, size, index, packed=1):
    """The Piece number `index` of `size` along `dim`, which holds `packed` things of equal length side by side."""
    each = shape[dim] // packed
    lengths = shares(each, size)
    start = sum(lengths[:index])
    stop = start + lengths[index]
    return Piece(torch.Size(shape), dim, tuple((i * each + start, i * each + stop) for i in range(packed)))
