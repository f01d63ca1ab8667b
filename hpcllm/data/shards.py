"""Token shards: the HDF5 file format, the manifest of a folder of shards, and reading them in parallel.

The only importer of h5py. A shard is an ordinary HDF5 file whose data sets are contiguous and without filters, so
that the place of every token in the file is known: ranks write a shard side by side without parallel HDF5, and a
reader maps it. HDF5's own checksums need chunks; a shard carries a CRC-32 of each 1 MiB of tokens instead.
What goes into which shard is decided in `prepare`, the order of samples in `order`.

    shard-00000.h5
      tokens            uint16 or uint32 [token_count], at a file offset that is a multiple of 1 MiB
      document_offsets  int64 [document_count + 1], where each document begins in `tokens`; its end last
      token_crc32       uint32 [blocks], zlib.crc32 of each BLOCK_BYTES of `tokens` (the last may be shorter)
      attributes        format, version, tokenizer_hash, vocab_size, highest_id, separator_id, token_count,
                        document_count, complete (1; written last)
    manifest.json       the same for the folder, and of each shard its size, counts, SHA-256 and, of the bytes
                        around `tokens`, a CRC-32; written after all shards

Labelled data are documents, too: an example is one, and what else belongs to it stands in columns beside the tokens.

      columns/NAME      of any number type, [document_count, width] or [token_count, width]
      labelled          uint8, JSON: what the columns mean (names of labels, ...), as in the manifest
    texts.jsonl         where an evaluation needs text: a line for each example (`texts`); as long as the manifest says
"""

import fcntl
import functools
import hashlib
import os
import time
import zlib

import numpy as np

from .. import files
from ..errors import DataError, IOFailure, UsageError
from ..files import sync_file
from .manifest import (  # noqa: F401 (read and written through here)
    FORMAT,
    MANIFEST,
    TEXTS,
    VERSION,
    Column,
    as_json,
    columns_of,
    read_manifest,
    token_dtype,
    without,
    write_manifest,
)
from .stream import BLOCK_BYTES, CollectiveStream, TokenStream

# One value for every open: a second one in the same process is an error in HDF5, and locks fail on Lustre and GPFS.
LOCKING = False
# Fixed, so that any HDF5 since 1.8 reads the files and every HDF5 writes the same bytes.
LIBVER = ("v108", "v108")
# Allocations from this size on begin at a multiple of BLOCK_BYTES; HDF5's own header blocks are smaller.
_ALIGNED_FROM_BYTES = 4096
_PATIENCE_S = 5.0  # for another program to close a shard that it writes
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_ATTRIBUTES = {
    "version": np.int64,
    "vocab_size": np.int64,
    "highest_id": np.int64,
    "separator_id": np.int64,
    "token_count": np.int64,
    "document_count": np.int64,
    "complete": np.uint8,
}


def name(index):
    return f"shard-{index:05d}.h5"


# --- writing -----------------------------------------------------------------------------------------------------


def create(path, *, token_count, document_count, vocab_size, separator_id, tokenizer_hash, labelled=None):
    """Make a shard of its final size, its data still unwritten and `complete` 0; fails if `path` exists.

    labelled: of labelled data, what its columns are and mean: {"columns": [of each Column its fields], ...}.
    Returns {data set: its byte offset in the file}: afterwards any process may write there, see `files.write_at`.
    """
    import h5py
    from h5py import h5d, h5p, h5s, h5t

    dtype = token_dtype(vocab_size)
    blocks = -(-token_count * dtype.itemsize // BLOCK_BYTES)
    plain = h5p.create(h5p.DATASET_CREATE)
    plain.set_layout(h5d.CONTIGUOUS)
    plain.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    plain.set_fill_time(h5d.FILL_TIME_NEVER)
    plain.set_obj_track_times(False)  # a time in the file would make every run's bytes differ
    threshold = min(_ALIGNED_FROM_BYTES, token_count * dtype.itemsize)
    with h5py.File(
        path, "w-", libver=LIBVER, locking=LOCKING, alignment_threshold=threshold, alignment_interval=BLOCK_BYTES
    ) as file:
        values = {
            "version": VERSION,
            "vocab_size": vocab_size,
            "highest_id": 0,
            "separator_id": separator_id,
            "token_count": token_count,
            "document_count": document_count,
            "complete": 0,
        }
        file.attrs["format"] = np.bytes_(FORMAT)
        file.attrs["tokenizer_hash"] = np.bytes_(tokenizer_hash)
        for attribute, kind in _ATTRIBUTES.items():
            file.attrs[attribute] = kind(values[attribute])
        data = [
            ("tokens", dtype, (token_count,)),
            ("document_offsets", np.dtype("<i8"), (document_count + 1,)),
            ("token_crc32", np.dtype("<u4"), (blocks,)),
        ]
        if labelled is not None:
            meaning = as_json(labelled).encode()
            data.append(("labelled", np.dtype("|u1"), (len(meaning),)))
            file.create_group("columns")
            for column in columns_of(labelled):
                data.append((column.label, np.dtype(column.dtype), column.shape(token_count, document_count)))
        offsets = {}
        for label, kind, shape in data:
            made = h5d.create(file.id, label.encode(), h5t.py_create(kind), h5s.create_simple(shape), plain)
            offsets[label] = made.get_offset()
        if labelled is not None:
            file["labelled"][:] = np.frombuffer(meaning, np.uint8)
    return offsets


def scan(path, offset, dtype, token_count, first, last):
    """(CRC-32s, highest id) of the token blocks [first, last) as they are on disk."""
    crcs, highest = [], 0
    end = token_count * dtype.itemsize
    with open(path, "rb", buffering=0) as file:
        for block in range(first, last):
            size = min(BLOCK_BYTES, end - block * BLOCK_BYTES)
            content = os.pread(file.fileno(), size, offset + block * BLOCK_BYTES)
            if len(content) != size:
                raise DataError(f"data: {path} ends within its tokens while it is being written")
            crcs.append(zlib.crc32(content))
            highest = max(highest, int(np.frombuffer(content, dtype).max()))
    return crcs, highest


def finish(path, crcs, highest_id):
    """Store block CRCs and highest id, then, once those are on disk, `complete`; returns the file's manifest entry."""
    import h5py

    with h5py.File(path, "r+", libver=LIBVER, locking=LOCKING) as file:
        file["token_crc32"][:] = np.asarray(crcs, np.uint32)
        file.attrs.modify("highest_id", np.int64(highest_id))
    sync_file(path)
    with h5py.File(path, "r+", libver=LIBVER, locking=LOCKING) as file:
        file.attrs.modify("complete", np.uint8(1))
    sync_file(path)
    return entry(path)


def entry(path):
    """What the manifest says of the shard at `path`, computed from the file."""
    import h5py

    with h5py.File(path, "r", locking=LOCKING) as file:
        tokens = file["tokens"]
        result = {
            "name": os.path.basename(path),
            "size_bytes": os.path.getsize(path),
            "token_count": int(tokens.shape[0]),
            "document_count": int(file.attrs["document_count"]),
            "highest_id": int(file.attrs["highest_id"]),
            "tokens_offset": int(tokens.id.get_offset()),
            "tokens_bytes": int(tokens.id.get_storage_size()),
        }
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while content := file.read(8 * BLOCK_BYTES):
            digest.update(content)
    return {**result, "sha256": digest.hexdigest(), "crc32_without_tokens": _crc_without_tokens(path, result)}


def _crc_without_tokens(path, shard):
    crc, after = 0, shard["tokens_offset"] + shard["tokens_bytes"]
    with open(path, "rb", buffering=0) as file:
        for start, stop in ((0, shard["tokens_offset"]), (after, shard["size_bytes"])):
            file.seek(start)
            while start < stop and (content := file.read(min(BLOCK_BYTES, stop - start))):
                crc = zlib.crc32(content, crc)
                start += len(content)
    return crc


def try_locking(path):
    """Write and reopen a file with the locks that other HDF5 programs use; OSError where the file system has none."""
    import h5py

    for mode in ("w", "r"):
        h5py.File(path, mode, locking=True).close()


# --- checking ----------------------------------------------------------------------------------------------------


def check(folder, shard, manifest, whole=False):
    """Raise DataError (65) unless the file of manifest entry `shard` is whole and a shard of this format.

    Every byte but the tokens is compared with a CRC before HDF5 is let near the file; tokens are checked as read, or
    now, with all of the file, by its SHA-256: `whole`. Raises IOFailure (74) for a file that is being written.
    """
    path = os.path.join(folder, shard["name"])
    with files.failing_as_io(path):
        _wait_for_writer(path)
        _check_bytes(path, shard, whole)
    import h5py

    try:
        with h5py.File(path, "r", locking=LOCKING) as file:
            _check_content(path, file, shard, manifest)
    except DataError:
        raise
    except Exception as error:  # of every kind, for bytes that HDF5 or NumPy cannot make sense of
        raise DataError(f"data: {path} cannot be read as HDF5: {error}") from None


def _wait_for_writer(path):
    """Return once no program has the file open for writing, as HDF5's own lock tells; IOFailure if that takes long."""
    deadline = time.monotonic() + _PATIENCE_S
    with open(path, "rb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back with the file
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise IOFailure(
                        f"data: {path} is open for writing elsewhere; start again when it is done"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return
            else:
                return


def _check_bytes(path, shard, whole):
    size = os.path.getsize(path)
    if size != shard["size_bytes"]:
        raise DataError(f"data: {path} has {size} bytes, the manifest says {shard['size_bytes']}")
    with open(path, "rb") as file:
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            raise DataError(f"data: {path} is not an HDF5 file")
    crc = _crc_without_tokens(path, shard)
    if crc != shard["crc32_without_tokens"]:
        raise DataError(
            f"data: {path} is damaged outside its tokens (CRC-32 {crc:08x}, "
            f"the manifest says {shard['crc32_without_tokens']:08x})"
        )
    if whole and (found := files.digest(path)) != shard["sha256"]:
        raise DataError(f"data: {path} is damaged (SHA-256 {found[:12]}, the manifest says {shard['sha256'][:12]})")


def _check_content(path, file, shard, manifest):
    import h5py
    from h5py import h5d

    def refuse(what):
        raise DataError(f"data: {path} {what}")

    attributes = {key: file.attrs[key] for key in file.attrs}
    kind = bytes(attributes.get("format", b"")).decode("utf-8", "replace") if "format" in attributes else None
    if kind != FORMAT:
        refuse(f"is an HDF5 file but not of the format {FORMAT!r}")
    if attributes.get("version") != VERSION:
        refuse(f"has format version {attributes.get('version')}, this program reads version {VERSION}")
    if attributes.get("complete") != 1:
        refuse("is incomplete: the run that wrote it did not finish")
    dtype, tokens = token_dtype(manifest["vocab_size"]), shard["token_count"]
    expected = {
        "tokens": (dtype, (tokens,)),
        "document_offsets": (np.dtype("<i8"), (shard["document_count"] + 1,)),
        "token_crc32": (np.dtype("<u4"), (-(-tokens * dtype.itemsize // BLOCK_BYTES),)),
    }
    meaning = as_json(manifest["labelled"]).encode() if "labelled" in manifest else b""
    if meaning:
        expected["labelled"] = np.dtype("|u1"), (len(meaning),)
    for column in columns_of(manifest.get("labelled")):
        expected[column.label] = np.dtype(column.dtype), column.shape(tokens, shard["document_count"])
    for label, (wanted, shape) in expected.items():
        link = file.get(label, getlink=True)
        if link is None:
            refuse(f"has no data set {label!r}")
        if not isinstance(link, h5py.HardLink):
            refuse(f"keeps {label!r} behind an external or soft link; shards hold their own data")
        data = file[label]
        if not isinstance(data, h5py.Dataset):
            refuse(f"has a group where the data set {label!r} belongs")
        creation = data.id.get_create_plist()
        if data.is_virtual or data.external or creation.get_layout() != h5d.CONTIGUOUS:
            refuse(f"does not store {label!r} contiguously in itself (chunked, compact, virtual or external)")
        if creation.get_nfilters():
            refuse(f"has a filter on {label!r}")
        if data.dtype != wanted:
            refuse(f"has {data.dtype} {label}, expected {wanted}")
        if data.shape != shape:
            refuse(f"has {label} of shape {data.shape}, the manifest says {shape}")
    if meaning and file["labelled"][:].tobytes() != meaning:
        refuse("says other things of its labels than the manifest")
    if shard["tokens_bytes"] != tokens * dtype.itemsize:
        refuse(f"has {tokens * dtype.itemsize} bytes of tokens, the manifest says {shard['tokens_bytes']}")
    offsets = file["document_offsets"][:]
    if offsets[0] != 0 or offsets[-1] != tokens or (offsets[1:] < offsets[:-1]).any():
        refuse(f"has document_offsets that do not go from 0 up to its {tokens} tokens")
    if file["tokens"].id.get_offset() != shard["tokens_offset"] or shard["tokens_offset"] % BLOCK_BYTES:
        offset = file["tokens"].id.get_offset()
        refuse(f"has its tokens at byte {offset}, not at the {shard['tokens_offset']} of the manifest")
    for key in ("token_count", "document_count", "highest_id"):
        if attributes.get(key) != shard[key]:
            refuse(f"says {key} {attributes.get(key)}, the manifest {shard[key]}")
    for key in ("vocab_size", "separator_id"):
        if attributes.get(key) != manifest[key]:
            refuse(f"says {key} {attributes.get(key)}, the manifest {manifest[key]}")
    if bytes(attributes.get("tokenizer_hash", b"")).decode() != manifest["tokenizer_hash"]:
        refuse("was made with another tokenizer than the manifest says")


# --- reading -----------------------------------------------------------------------------------------------------


def open_folder(folder, *, reader="mapped", comm=None, quarantine=False):
    """Open a folder that `hpcllm prepare` wrote and return a `TokenStream`.

    reader: "mapped" (each process by itself) or "mpio" (collective, needs a parallel h5py and `comm`).
    comm: an mpi4py communicator; with it the call is collective, the ranks share the checking of shards, and all
    raise alike. quarantine: shards that are not what was written are left out, told, and named in the stream's
    `left_out`; all are read for that, once, ranks sharing them out. Raises MissingInput (66), DataError (65),
    UsageError (2), IOFailure (74).
    """
    folder = os.fspath(folder)
    if reader not in ("mapped", "mpio"):
        raise UsageError(f'reader: "{reader}" is not one of "mapped", "mpio"').known_to_all()
    if comm is None:
        manifest = read_manifest(folder)
        left_out = _damaged(folder, manifest, manifest["shards"], quarantine)
    else:
        from ..mpi import on_root, together

        manifest = on_root(comm, read_manifest, folder)
        left_out = {}
        with together(comm):
            left_out = _damaged(folder, manifest, manifest["shards"][comm.rank :: comm.size], quarantine)
        if quarantine:
            left_out = {name: why for part in comm.allgather(left_out) for name, why in part.items()}
    if left_out:
        manifest = _reduced(manifest, left_out, folder)
        if comm is None or comm.rank == 0:
            print(
                f"data: {len(left_out)} damaged of {len(manifest['shards']) + len(left_out)} shards left out "
                f"(data.quarantine): {'; '.join(left_out[name] for name in sorted(left_out))}",
                flush=True,
            )
    stream = _stream(folder, manifest, reader, comm)
    stream.left_out = left_out
    return stream


def _damaged(folder, manifest, some, quarantine):
    """{name: sentence} of the shards of `some` that are not whole; raises the first one's DataError unless told to."""
    found = {}
    for shard in some:
        try:
            check(folder, shard, manifest, whole=quarantine)
        except DataError as error:
            if not quarantine:
                raise
            found[shard["name"]] = str(error).removeprefix("data: ")
    return found


def _reduced(manifest, left_out, folder):
    """The manifest without what is left out. Raises DataError, on every rank, where that is all."""
    if len(left_out) == len(manifest["shards"]):
        first = left_out[min(left_out)]
        raise DataError(f"data: all {len(left_out)} shards of {folder} are damaged: {first}").known_to_all()
    return without(manifest, left_out)


def _stream(folder, manifest, reader, comm):
    if reader == "mapped":
        known = {os.path.join(folder, shard["name"]): shard for shard in manifest["shards"]}
        return TokenStream(folder, manifest, functools.partial(_locate, known))
    import h5py

    if not h5py.get_config().mpi:
        raise UsageError(
            f'reader: "mpio" needs an h5py built with parallel HDF5; this one ({h5py.__version__}, HDF5 '
            f'{h5py.version.hdf5_version}) was built without. Use "mapped", which reads at least as fast'
        ).known_to_all()
    if comm is None:
        raise UsageError('reader: "mpio" reads collectively and needs the communicator of the ranks that read')

    def open_shard(path):
        file = h5py.File(path, "r", driver="mpio", comm=comm, locking=LOCKING)
        return file, file["token_crc32"][:]

    return CollectiveStream(folder, manifest, comm, open_shard, _read_collectively)


def map_beside(path, columns):
    """{"document_offsets": int64 [documents + 1], column name: [rows, width]}: of a shard that `check` found whole,
    what is not tokens, mapped; leaves no HDF5 file open."""
    import h5py

    with h5py.File(path, "r", locking=LOCKING) as file:
        labels = {"document_offsets": "document_offsets", **{column.name: column.label for column in columns}}
        places = {
            name: (file[label].dtype, file[label].shape, file[label].id.get_offset()) for name, label in labels.items()
        }
    return {
        name: np.memmap(path, dtype, "r", offset, shape) if np.prod(shape) else np.zeros(shape, dtype)
        for name, (dtype, shape, offset) in places.items()
    }


def _locate(known, path):
    """(byte offset of the tokens, CRC-32 of each block) of a shard; leaves no HDF5 file open.

    known: {path: manifest entry}. Raises DataError where the file is another one by now: a folder may be made anew
    hours after its shards were checked, and before this rank needs them.
    """
    _check_bytes(path, known[path], whole=False)
    import h5py

    with h5py.File(path, "r", locking=LOCKING) as file:
        return file["tokens"].id.get_offset(), file["token_crc32"][:]


def _read_collectively(file, intervals, dtype):
    """Read the tokens in sorted, disjoint `intervals`, one after the other, in one collective call (none is fine)."""
    from h5py import h5fd, h5p, h5s, h5t

    count = sum(stop - start for start, stop in intervals)
    content = np.empty(count, dtype)
    data = file["tokens"].id
    in_file, in_memory = data.get_space(), h5s.create_simple((max(count, 1),))
    in_file.select_none()
    if not intervals:
        in_memory.select_none()
    for start, stop in intervals:
        in_file.select_hyperslab((start,), (stop - start,), op=h5s.SELECT_OR)
    transfer = h5p.create(h5p.DATASET_XFER)
    transfer.set_dxpl_mpio(h5fd.MPIO_COLLECTIVE)
    target = content if count else np.empty(1, dtype)
    data.read(in_memory, in_file, target, h5t.py_create(dtype), transfer)
    return content
