"""Spooled documents to shards: which document goes where, and writing the files on all ranks side by side.

Shard borders are a function of the documents' lengths alone. HDF5 makes each file in its final size on one rank;
then every rank writes its own tokens at their place in the file, which needs no parallel HDF5. The format of a file
is `shards`'.
"""

import contextlib
import os

import numpy as np

from ..errors import IOFailure
from ..files import failing_as_io, write_at
from ..mpi import on_root, together
from . import shards
from .scratch import COPY_BYTES

# Blocks whose CRCs a rank computes in one turn.
_SCAN_BLOCKS = 64


def runs(first_token, lengths, shard_tokens):
    """Group a unit's documents by shard: a list of (slot, first document, end document).

    first_token: where the unit begins in the stream of all tokens. A document belongs to the slot in which its
    first token falls, slot k being [k, k + 1) * shard_tokens of that stream; so every rank places its documents
    knowing only how many tokens come before them. Slots in which no document begins become no shard.
    """
    starts = first_token + np.cumsum(lengths) - lengths
    slots, begins = np.unique(starts // shard_tokens, return_index=True)
    ends = np.append(begins, len(lengths))[1:]
    return list(zip(slots.tolist(), begins.tolist(), ends.tolist(), strict=True))


def write_part(comm, folder, part, spool, unit_count, facts, shard_tokens):
    """Write the shards and the manifest of `folder`/`part` from the spools of all ranks; returns the manifest.

    spool: this rank's `tokenise.Spool`; facts: vocab_size, separator_id, tokenizer_hash. Collective. Raises
    IOFailure, the same on every rank.
    """
    target = os.path.join(folder, part)
    on_root(comm, _make_folder, target)
    unit_begins = _begins(comm, {unit: _size(lengths) for unit, (*_, lengths) in spool.units[part].items()}, unit_count)
    placed = []  # (slot, tokens, documents, first token, first document, unit, document of the unit)
    for unit, (*_, lengths) in sorted(spool.units[part].items()):
        first_token, first_document = unit_begins[unit].tolist()
        for slot, begin, end in runs(first_token, lengths, shard_tokens):
            token = first_token + int(lengths[:begin].sum())
            placed.append((slot, *_size(lengths[begin:end]), token, first_document + begin, unit, begin))
    slot_count = 1 + max([-1, *(slot for slot, *_ in placed)])
    slot_count = max(comm.allgather(slot_count))
    sizes = np.zeros((slot_count, 2), np.int64)
    for slot, tokens, documents, *_ in placed:
        sizes[slot] += (tokens, documents)
    sizes = comm.allreduce(sizes)
    slots = np.flatnonzero(sizes[:, 1])
    shard_of = {slot: index for index, slot in enumerate(slots.tolist())}
    sizes = sizes[slots]
    begins = np.cumsum(sizes, axis=0) - sizes

    paths = [os.path.join(target, shards.name(index)) for index in range(len(slots))]
    offsets = _create(comm, target, paths, sizes, facts)
    with together(comm), failing_as_io(target), contextlib.ExitStack() as opened:
        files = [opened.enter_context(open(path, "rb", buffering=0)) for path in spool.paths[part]]
        source, beside = files[0], files[1 : 1 + len(spool.columns)]
        # In the order of shards, so that each is opened once and reaches the disk once.
        for index, mine in _by_shard(placed, shard_of):
            with open(paths[index], "r+b", buffering=0) as file:
                for tokens, documents, token, document, unit, begin in mine:
                    spooled, earlier, lengths = spool.units[part][unit]
                    spooled += int(lengths[:begin].sum())
                    size = spool.dtype.itemsize
                    at = offsets[index]["tokens"] + (token - int(begins[index, 0])) * size
                    _copy(source, file, spooled * size, tokens * size, at)
                    for column, rows in zip(spool.columns, beside, strict=True):
                        size, by_document = column.row_bytes, column.of == "document"
                        first, count = (earlier + begin, documents) if by_document else (spooled, tokens)
                        row = document - int(begins[index, 1]) if by_document else token - int(begins[index, 0])
                        _copy(rows, file, first * size, count * size, offsets[index][column.label] + row * size)
                    lengths = lengths[begin : begin + documents]
                    starts = token - begins[index, 0] + np.cumsum(lengths) - lengths
                    at = offsets[index]["document_offsets"] + 8 * (document - int(begins[index, 1]))
                    write_at(file.fileno(), starts.astype("<i8"), at)
                os.fsync(file.fileno())
        for path in spool.paths[part]:
            os.unlink(path)
    entries = _finish(comm, target, paths, offsets, sizes, spool.dtype)
    return on_root(comm, _manifest, target, entries, facts)


def write_lines(comm, folder, part, spool, unit_count):
    """Write the lines beside the documents of `folder`/`part`, in their order; returns their bytes. Collective.

    Before `write_part`, whose manifest says how many there are.
    """
    target = os.path.join(folder, part)
    path = os.path.join(target, shards.TEXTS)
    sizes = np.zeros(unit_count, np.int64)
    for unit, size in spool.lines[part].items():
        sizes[unit] = size
    sizes = comm.allreduce(sizes)
    begins, total = np.cumsum(sizes) - sizes, int(sizes.sum())
    on_root(comm, _make_file, target, path, total)
    with together(comm), failing_as_io(target), contextlib.ExitStack() as opened:
        source = opened.enter_context(open(spool.paths[part][-1], "rb", buffering=0))
        file = opened.enter_context(open(path, "r+b", buffering=0))
        spooled = 0
        for unit, size in spool.lines[part].items():
            _copy(source, file, spooled, size, int(begins[unit]))
            spooled += size
        os.fsync(file.fileno())
    return total


def _make_file(target, path, size):
    with failing_as_io(target):
        _make_folder(target)
        with open(path, "xb") as file:
            file.truncate(size)


def _size(lengths):
    return int(lengths.sum()), len(lengths)


def _begins(comm, sizes, unit_count):
    """int64 [unit_count, 2]: tokens and documents before each unit; sizes: {unit: (tokens, documents)} of this rank."""
    table = np.zeros((unit_count, 2), np.int64)
    for unit, size in sizes.items():
        table[unit] = size
    table = comm.allreduce(table)
    return np.cumsum(table, axis=0) - table


def _by_shard(placed, shard_of):
    mine = {}
    for slot, *rest in placed:
        mine.setdefault(shard_of[slot], []).append(rest)
    return sorted(mine.items())


def _create(comm, target, paths, sizes, facts):
    """One rank makes each file, its last document offset already in it; returns the data sets' offsets of all files."""
    made = {}
    with together(comm), failing_as_io(target):
        for index in range(comm.rank, len(paths), comm.size):
            tokens, documents = sizes[index].tolist()
            with _closing(paths[index]):
                made[index] = shards.create(paths[index], token_count=tokens, document_count=documents, **facts)
            with open(paths[index], "r+b", buffering=0) as file:
                at = made[index]["document_offsets"] + 8 * documents
                write_at(file.fileno(), np.array([tokens], "<i8"), at)
                os.fsync(file.fileno())
    return {index: offsets for each in comm.allgather(made) for index, offsets in each.items()}


def _copy(source, target, begin, size_bytes, at):
    """`size_bytes` of one file from byte `begin` to another at byte `at`."""
    source.seek(begin)
    while size_bytes:
        content = source.read(min(COPY_BYTES, size_bytes))
        if not content:
            raise OSError(f"a spool of {target.name} ended {size_bytes} bytes early")
        write_at(target.fileno(), content, at)
        at, size_bytes = at + len(content), size_bytes - len(content)


def _finish(comm, target, paths, offsets, sizes, dtype):
    """CRCs by all ranks, some blocks each in turn; then one rank completes each file. Returns all entries, in order."""
    tasks = []
    for index, tokens in enumerate(sizes[:, 0].tolist()):
        blocks = -(-tokens * dtype.itemsize // shards.BLOCK_BYTES)
        tasks += [(index, first, min(first + _SCAN_BLOCKS, blocks)) for first in range(0, blocks, _SCAN_BLOCKS)]
    scanned = []
    with together(comm), failing_as_io(target):
        for index, first, last in tasks[comm.rank :: comm.size]:
            offset, tokens = offsets[index]["tokens"], int(sizes[index, 0])
            scanned.append((index, first, *shards.scan(paths[index], offset, dtype, tokens, first, last)))
    crcs, highest = {}, {}
    for index, _, part_crcs, part_highest in sorted(task for each in comm.allgather(scanned) for task in each):
        crcs.setdefault(index, []).extend(part_crcs)
        highest[index] = max(highest.get(index, 0), part_highest)
    entries = {}
    with together(comm), failing_as_io(target):
        for index in range(comm.rank, len(paths), comm.size):
            with _closing(paths[index]):
                entries[index] = shards.finish(paths[index], crcs[index], highest[index])
    entries = {index: entry for each in comm.allgather(entries) for index, entry in each.items()}
    return [entries[index] for index in sorted(entries)]


@contextlib.contextmanager
def _closing(path):
    """What HDF5 fails with when it closes a file, for want of room perhaps, is a RuntimeError; here an IOFailure."""
    try:
        yield
    except RuntimeError as error:
        raise IOFailure(f"{path}: {error}") from None


def _make_folder(target):
    with failing_as_io(target):
        os.makedirs(target, exist_ok=True)


def _manifest(target, entries, facts):
    with failing_as_io(target):
        return shards.write_manifest(target, entries, **facts)
