"""A folder of shards as one long stream of tokens, from which samples are gathered a micro-batch at a time.

Two readers with the same answers: `TokenStream` maps the shards, each process by itself; `CollectiveStream` has
all ranks read together through parallel HDF5. Which sample comes when is `order`'s business. Knows nothing of HDF5:
`shards.open_folder` makes these and hands in how to open a shard.
"""

import bisect
import mmap
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .. import files
from ..errors import DataError, IOFailure

BLOCK_BYTES = 1 << 20
_AT_ONCE, _THREADS = 64, 4  # blocks that are read, and at most how many threads look at them


@dataclass
class _Mapped:
    """A shard in memory: the map, where its tokens begin in it, and which blocks have been checked."""

    memory: mmap.mmap
    skip: int
    tokens: np.ndarray
    crcs: np.ndarray
    checked: list
    unchecked: int
    windows: np.ndarray | None = None


class TokenStream:
    """All tokens of a folder, in order, mapped into memory; made by `shards.open_folder`.

    token_count, document_count, vocab_size, highest_id, separator_id: as in the manifest.
    tokenizer_hash, digest: 64 hex digits; which tokenizer made the tokens, and which data set this is. labelled: what
    stands beside the tokens and means what, None for plain text (`shards`); paths: of the shards; left_out: {name: why}
    of damaged ones that are in none of these numbers.
    Nothing is mapped before it is first needed, and no HDF5 file stays open. A process forked from this one maps
    the shards anew.
    """

    def __init__(self, folder, manifest, locate):
        """locate(path) -> (byte offset of the tokens, CRC-32 of each block), by whatever reads the format."""
        self.folder, self.left_out = folder, {}
        for key in ("token_count", "document_count", "vocab_size", "highest_id", "separator_id"):
            setattr(self, key, manifest[key])
        self.tokenizer_hash, self.digest = manifest["tokenizer_hash"], manifest["digest"]
        self.labelled = manifest.get("labelled")
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.paths = [os.path.join(folder, shard["name"]) for shard in manifest["shards"]]
        counts = [shard["token_count"] for shard in manifest["shards"]]
        self._borders = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._places = self._borders.tolist()  # to look one up, a list is quicker
        self._locate = locate
        self._pid = os.getpid()
        self._opened = {}

    def gather(self, starts, length):
        """The samples [start, start + length) for each of `starts` (int64 [B], B may be 0) as int64 [B, length].

        Positions count tokens of the whole folder; a sample may cross shards. Raises IndexError outside the
        stream, DataError when a block read for the first time does not have its CRC.
        """
        starts, lowest, end = self._checked_starts(starts, length)
        if not len(starts) or not length:
            return np.empty((len(starts), length), np.int64)
        if os.getpid() != self._pid:
            self._opened, self._pid = {}, os.getpid()
        shard = bisect.bisect_right(self._places, lowest) - 1
        if end <= self._places[shard + 1]:  # all in one shard
            local = starts - self._places[shard]
            return self._windows(self._verified(shard, local, length), length)[local].astype(np.int64)
        out = np.empty((len(starts), length), np.int64)
        first = self._borders.searchsorted(starts, side="right") - 1
        inside = starts + length <= self._borders[first + 1]
        for shard in set(first[inside].tolist()):
            rows = (inside & (first == shard)).nonzero()[0]
            local = starts[rows] - self._borders[shard]
            # One call copies all rows; a window is a view, so rows are plain memory copies.
            out[rows] = self._windows(self._verified(shard, local, length), length)[local]
        for row in (~inside).nonzero()[0].tolist():
            for shard, begin, count, column in self._pieces(int(starts[row]), length):
                tokens = self._verified(shard, np.array([begin]), count).tokens
                out[row, column : column + count] = tokens[begin : begin + count]
        return out

    def close(self):
        """Forget the mapped shards; memory is returned when the last array that looks at it goes."""
        self._opened = {}

    def _checked_starts(self, starts, length):
        """(starts as int64 [B], where the first sample begins, where the last one ends)."""
        starts = np.asarray(starts, np.int64).reshape(-1)
        lowest, end = (int(starts.min()), int(starts.max()) + length) if len(starts) else (0, 0)
        if length < 0 or lowest < 0 or end > self.token_count:
            raise IndexError(
                f"samples of {length} tokens between {lowest} and {end} are not all within "
                f"the {self.token_count} tokens of {self.folder}"
            )
        return starts, lowest, end

    def _pieces(self, start, length):
        """Yield (shard, first token within it, token count, column) of one sample."""
        column, shard = 0, bisect.bisect_right(self._places, start) - 1
        while column < length:
            begin = start + column - self._places[shard]
            count = min(length - column, self._places[shard + 1] - start - column)
            if count > 0:
                yield shard, begin, count, column
            column, shard = column + count, shard + 1

    def _verified(self, shard, starts, length):
        """The mapped shard, after checking the blocks that hold [start, start + length) for each start."""
        if shard not in self._opened:
            with files.failing_as_io(self.paths[shard]):
                self._opened[shard] = files.patiently(self._map, shard)
        mapped = self._opened[shard]
        if mapped.unchecked == 0:
            return mapped
        per_block = BLOCK_BYTES // self._dtype.itemsize
        first, last = (starts // per_block).tolist(), ((starts + length - 1) // per_block).tolist()
        touched = {block for begin, end in zip(first, last, strict=True) for block in range(begin, end + 1)}
        fresh = sorted(block for block in touched if not mapped.checked[block])
        for some in range(0, len(fresh), _AT_ONCE):
            self._check(shard, mapped, fresh[some : some + _AT_ONCE])
        return mapped

    def _check(self, shard, mapped, blocks):
        """Read blocks for the first time, and compare their CRCs."""
        spans = []
        for block in blocks:
            start = mapped.skip + block * BLOCK_BYTES
            spans.append(slice(start, min(start + BLOCK_BYTES, len(mapped.memory))))
            # A cold parallel file system then delivers the block in one request, not page by page, and the next ones
            # meanwhile.
            mapped.memory.madvise(mmap.MADV_WILLNEED, start - start % mmap.PAGESIZE, spans[-1].stop - start)
        content = memoryview(mapped.memory)
        for block, crc in zip(blocks, _by_threads(lambda span: zlib.crc32(content[span]), spans), strict=True):
            _check_crc(self.paths[shard], block, crc, mapped.crcs)
            mapped.checked[block] = True
            mapped.unchecked -= 1

    def _windows(self, mapped, length):
        """[start, position] -> token, a view; kept, since making it takes longer than reading a sample."""
        if mapped.windows is None or mapped.windows.shape[1] != length:
            mapped.windows = sliding_window_view(mapped.tokens, length)
        return mapped.windows

    def _map(self, shard):
        path = self.paths[shard]
        offset, crcs = self._locate(path)
        count = int(self._borders[shard + 1] - self._borders[shard])
        skip = offset % mmap.ALLOCATIONGRANULARITY
        with open(path, "rb") as file:
            size = skip + count * self._dtype.itemsize
            if offset - skip + size > os.fstat(file.fileno()).st_size:
                raise DataError(f"data: {path} was cut short after it was opened")
            memory = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, offset=offset - skip)
        tokens = np.frombuffer(memory, self._dtype, count, skip)
        return _Mapped(memory, skip, tokens, crcs, [False] * len(crcs), len(crcs))


class CollectiveStream(TokenStream):
    """As TokenStream, but `gather` is collective over `comm`: every rank calls it equally often, with any B.

    For each shard that some rank needs, all ranks make one collective read; a rank that needs nothing of it
    selects nothing. Blocks are read whole the first time, to check their CRC.
    """

    def __init__(self, folder, manifest, comm, open_shard, read_intervals):
        """open_shard(path) -> (handle, CRCs); read_intervals(handle, [(start, stop)], dtype) -> 1-d array."""
        super().__init__(folder, manifest, locate=None)
        self._comm, self._open_shard, self._read_intervals = comm, open_shard, read_intervals

    def gather(self, starts, length):
        starts, *_ = self._checked_starts(starts, length)
        if os.getpid() != self._pid:
            raise RuntimeError("a forked process cannot read collectively; open the folder after the fork")
        out = np.empty((len(starts), length), np.int64)
        needed = {}
        for row, start in enumerate(starts.tolist()):
            for shard, begin, count, column in self._pieces(start, length):
                needed.setdefault(shard, []).append((begin, count, row, column))
        from ..mpi import agree

        error = None
        for shard in sorted(set().union(*self._comm.allgather(set(needed)))):
            try:
                with files.failing_as_io(self.paths[shard]):
                    self._read(shard, needed.get(shard, []), out)
            except (
                DataError,
                IOFailure,
            ) as damaged:  # told after the last collective read, so that no rank waits in one
                error = error or damaged
        agree(self._comm, error)
        return out

    def close(self):
        """Close the shards; collective."""
        for shard in sorted(self._opened):
            self._opened[shard][0].close()
        self._opened = {}

    def _read(self, shard, pieces, out):
        if shard not in self._opened:
            handle, crcs = self._open_shard(self.paths[shard])
            self._opened[shard] = handle, crcs, np.zeros(len(crcs), bool)
        handle, crcs, checked = self._opened[shard]
        per_block = BLOCK_BYTES // self._dtype.itemsize
        end = int(self._borders[shard + 1] - self._borders[shard])
        touched = {
            block
            for begin, count, _, _ in pieces
            for block in range(begin // per_block, (begin + count - 1) // per_block + 1)
        }
        fresh = sorted(block for block in touched if not checked[block])
        whole = [(block * per_block, min((block + 1) * per_block, end)) for block in fresh]
        intervals = merge([(begin, begin + count) for begin, count, _, _ in pieces] + whole)
        content = self._read_intervals(handle, intervals, self._dtype)
        # Where each interval begins in `content`.
        places = np.concatenate([[0], np.cumsum([stop - start for start, stop in intervals], dtype=np.int64)])

        def cut(begin, count):
            interval = bisect.bisect_right(intervals, (begin, end + 1)) - 1
            place = int(places[interval]) + begin - intervals[interval][0]
            return content[place : place + count]

        for block, (start, stop) in zip(fresh, whole, strict=True):
            _check_crc(self.paths[shard], block, zlib.crc32(cut(start, stop - start)), crcs)
            checked[block] = True
        for begin, count, row, column in pieces:
            out[row, column : column + count] = cut(begin, count)


def _by_threads(function, items):
    """map, by several threads where there are cores for them."""
    cores = min(_THREADS, len(os.sched_getaffinity(0)), len(items))
    if cores < 2:
        return map(function, items)
    with ThreadPoolExecutor(cores, thread_name_prefix="hpcllm-crc") as pool:
        return list(pool.map(function, items))


def merge(intervals):
    """The union of half-open intervals as sorted, disjoint ones: [(0, 2), (1, 5), (7, 8)] -> [(0, 5), (7, 8)]."""
    merged = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _check_crc(path, block, crc, crcs):
    if crc != int(crcs[block]):
        raise DataError(
            f"data: {path} is damaged in block {block} of its tokens "
            f"(CRC-32 {crc:08x}, written as {int(crcs[block]):08x})"
        )
