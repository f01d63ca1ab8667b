"""Large files that many ranks write at once, block by block, with a SHA-256 for each block.

What a rank has of a file are stretches of bytes. Where they fill a block, its digest is taken from memory while the
block goes to the disk, past the page cache (O_DIRECT): gigabytes that nobody reads again soon are a burden to it, and
copying them there takes as long as writing them. The rest goes through the cache, from where it is read for its digests
when all ranks have written.

    HPCLLM_DIRECT_IO    "off": everything goes through the page cache
"""

import contextlib
import errno
import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from . import files

BLOCK_BYTES = 1 << 24
_PAGE = 4096  # O_DIRECT wants memory, offsets and lengths to be multiples of this, on all disks of today


@dataclass
class Segment:
    """Bytes of a file, within one block: those of `parts` (uint8 tensors), one after the other, from `offset` on."""

    offset: int
    parts: list = field(default_factory=list)
    length: int = 0

    @property
    def end(self):
        return self.offset + self.length

    def copy_to(self, memory):
        """Copy the bytes to the tensor `memory` (uint8, as long)."""
        at = 0
        for part in self.parts:
            place, at = memory[at : at + part.numel()], at + part.numel()
            if part.is_cpu:
                np.copyto(place.numpy(), part.numpy())  # memcpy, which is faster than what copy_ does here
            else:
                place.copy_(part)


def segments(stretches):
    """The Segments that (offset, uint8 tensor) of a file make up, in order; none may overlap."""
    found = []
    for offset, part in sorted(stretches, key=lambda stretch: stretch[0]):
        while left := part.numel():
            if not found or found[-1].end != offset or offset % BLOCK_BYTES == 0:
                found.append(Segment(offset))
            count = min(left, BLOCK_BYTES - offset % BLOCK_BYTES)
            found[-1].parts.append(part[:count])
            found[-1].length += count
            part, offset = part[count:], offset + count
    return found


class Memory:
    """Host memory for copies of Segments, which is kept from one time to the next: new memory is slow to touch."""

    def __init__(self):
        self._held = torch.empty(0, dtype=torch.uint8)

    def take(self, wanted):
        """Copies of the Segments `wanted`: uint8 tensors, aligned as in the file."""
        places, at = [], 0
        for segment in wanted:
            at += (segment.offset - at) % _PAGE
            places.append(slice(at, at + segment.length))
            at += segment.length
        if len(self._held) < at:
            self._held = _pages(at)
        copies = [self._held[place] for place in places]
        for segment, copy in zip(wanted, copies, strict=True):
            segment.copy_to(copy)
        return copies


def write(path, wanted, copies=None, fit=None):
    """Write the Segments `wanted` of a file that is there at its full length, durably. Raises OSError.

    copies: those that `Memory.take` has made of them; None: they are copied now, a block at a time, while the one
    before is written. fit: called with the bytes of each, a uint8 tensor. Returns {number of a block: its SHA-256 in
    hex} of the blocks that they fill, and None, some being written or none, where something is not `fit`. What may pass
    is tried again, see `files.patiently`.
    """
    return files.patiently(_write, path, wanted, copies, fit)


def _write(path, wanted, copies, fit):
    found, digesting, writing = {}, [None, None], None
    ring = None if copies else [_pages(BLOCK_BYTES + _PAGE) for _ in digesting]
    size = os.stat(path).st_size
    with _Open(path) as file, _one_thread("hpcllm-digest") as digests, _one_thread("hpcllm-disk") as disk:
        for number, segment in enumerate(wanted):
            if copies:
                memory = copies[number]
            else:
                if digesting[number % 2]:
                    digesting[number % 2].result()  # it reads the memory that is needed now
                start = segment.offset % _PAGE
                memory = ring[number % 2][start : start + segment.length]
                segment.copy_to(memory)
            if fit and not fit(memory):
                return None
            memory = memory.numpy()
            fills = segment.offset % BLOCK_BYTES == 0 and (segment.length == BLOCK_BYTES or segment.end == size)
            if fills:
                digesting[number % 2] = found[segment.offset // BLOCK_BYTES] = digests.submit(_digest, memory)
            if writing:
                writing.result()  # so one that fails is the last, and the next but one may have its memory
            writing = disk.submit(file.write, memory, segment.offset, past_the_cache=fills)
        if writing:
            writing.result()
        return {number: digest.result() for number, digest in found.items()}


def _one_thread(name):
    return ThreadPoolExecutor(1, thread_name_prefix=name)


class _Open:
    """A file to write to in both ways, durable when it is left without an error."""

    def __init__(self, path):
        self._path, self._past = path, None

    def __enter__(self):
        self._plain = os.open(self._path, os.O_WRONLY)
        if os.environ.get("HPCLLM_DIRECT_IO", "") != "off":
            with contextlib.suppress(OSError):  # as some file systems do not know it
                self._past = os.open(self._path, os.O_WRONLY | os.O_DIRECT)
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                os.fsync(self._plain)
        finally:
            self._close_past()
            os.close(self._plain)

    def _close_past(self):
        if self._past is not None:
            os.close(self._past)
            self._past = None

    def write(self, memory, offset, past_the_cache):
        """Write an array of bytes, whole pages of it `past_the_cache` where this is possible."""
        left = memoryview(memory)
        while left:
            pages = len(left) // _PAGE * _PAGE if past_the_cache and self._past is not None else 0
            try:
                count = os.pwrite(self._past, left[:pages], offset) if pages else os.pwrite(self._plain, left, offset)
            except OSError as error:
                if not pages or error.errno != errno.EINVAL:
                    raise
                self._close_past()  # the file system wants larger pages
                continue
            left, offset = left[count:], offset + count


def digests(path, numbers=None, block_bytes=None, keep=True):
    """{number: SHA-256 in hex} of blocks of a file, the last one of which may be shorter.

    numbers: None for all; keep: False leaves nothing of them in the page cache.
    """
    block_bytes = block_bytes or BLOCK_BYTES
    memory, found = memoryview(bytearray(1 << 20)), {}
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for number in range(count(size, block_bytes)) if numbers is None else numbers:
            file.seek(number * block_bytes)
            left, made = min(block_bytes, size - number * block_bytes), hashlib.sha256()
            while left > 0 and (got := file.readinto(memory[: min(left, len(memory))])):
                made.update(memory[:got])
                left -= got
            found[number] = made.hexdigest()
            if not keep:
                with contextlib.suppress(OSError):
                    os.posix_fadvise(file.fileno(), number * block_bytes, block_bytes, os.POSIX_FADV_DONTNEED)
    return found


def count(size_bytes, block_bytes=None):
    """How many blocks a file has."""
    return -(-size_bytes // (block_bytes or BLOCK_BYTES))


def share(offset, part, size_bytes, copies, mine):
    """What of a stretch rank `mine` of `copies` that have it writes: (offset, uint8 tensor), one after the other.

    size_bytes: of the file. Ranks take turns by the place in the file, a block at a time, or less in small files.
    """
    if copies == 1:
        yield offset, part
        return
    unit = -(-size_bytes // (4 * copies * _PAGE)) * _PAGE
    unit = min(max(unit, _PAGE), BLOCK_BYTES)
    units = count(size_bytes, unit)
    while left := part.numel():
        number = offset // unit
        length = min(left, (number + 1) * unit - offset)
        if number * copies // units == mine:
            yield offset, part[:length]
        part, offset = part[length:], offset + length


def _digest(memory):
    return hashlib.sha256(memory).hexdigest()


def _pages(size):
    """New memory (uint8 tensor) that begins with a page: large ones where the system has them."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
