"""Text to shards, on all ranks of a job: train or load a tokenizer, tokenise, lay out, write, check, publish.

Every decision (units, validation split, shard borders) is a function of the input alone, so the files are the same
bytes for any number of ranks; who does what only decides how long it takes. Memory is bounded by the longest
document and by 8 bytes a document. Reading text is `text`'s, the file format `shards`'.
"""

import hashlib
import heapq
import itertools
import os
import shutil
import tempfile
import time
from contextlib import contextmanager

import numpy as np

from ..errors import CannotCreate, DataError, IOFailure, Refusal, UsageError
from ..mpi import agree, on_root, together
from . import shards, text, tokenizer
from .progress import Progress

TRAIN, VALIDATION, TOKENIZER = "train", "validation", "tokenizer"
# Characters that go to the tokenizer at once: bounds the memory of its results, about 60 bytes a character.
_BATCH_CHARACTERS = 1 << 20
_COPY_BYTES = 8 << 20
# Blocks whose CRCs one rank computes in one go when it takes its turn.
_SCAN_BLOCKS = 64


def prepare(
    world,
    *,
    inputs,
    output,
    tokenizer=None,
    tokenizer_kind="wordpiece",
    vocab_size=30522,
    jsonl_field=None,
    document_separator="newline",
    validation_fraction=0.0,
    shard_tokens=1 << 28,
    overwrite=False,
):
    """Write `output`/train, `output`/validation (when a fraction is asked for) and `output`/tokenizer; collective.

    inputs: paths and globs. tokenizer: a Hugging Face tokenizer folder; None trains one of tokenizer_kind.
    document_separator: "newline" or "blank-line", for plain text. shard_tokens: a shard takes documents until it
    has this many tokens; no document is divided. Returns a summary (dict), the same on every rank.
    Raises a Refusal, the same on every rank, and then leaves nothing behind.
    """
    comm, began = world.comm, time.monotonic()
    reading = {"jsonl_field": jsonl_field, "document_separator": document_separator}
    units = on_root(comm, _plan, inputs, output, reading, validation_fraction, shard_tokens, overwrite)
    folder = on_root(comm, _partial_folder, output)
    _use_own_cores(world)
    try:
        split = Split(validation_fraction)
        choice = (tokenizer, tokenizer_kind, vocab_size)
        encoder, facts = _tokenizer_on_all(comm, folder, choice, units, reading, split)
        spool = _tokenise(comm, folder, units, reading, encoder, facts, split)
        counts = _check_counts(comm, spool, split)
        manifests = {
            part: _write_part(comm, folder, part, spool, len(units), facts, shard_tokens) for part in split.parts
        }
        on_root(comm, _publish, folder, output, overwrite)
    finally:
        # Where all is well the folder has its new name. On a refusal every rank arrives here at the same time.
        if world.is_root:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - began
    tokens = sum(manifest["token_count"] for manifest in manifests.values())
    summary = {"output": output, "tokenizer_hash": facts["tokenizer_hash"], "vocab_size": facts["vocab_size"]}
    for part, manifest in manifests.items():
        summary[part] = {key: manifest[key] for key in ("token_count", "document_count", "digest")}
        summary[part]["shards"] = len(manifest["shards"])
    return {
        **summary,
        "empty_documents_skipped": counts["empty"],
        "ranks": comm.size,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds),
    }


# --- before work starts ------------------------------------------------------------------------------------------


def _plan(inputs, output, reading, validation_fraction, shard_tokens, overwrite):
    """Check all that can be checked without reading the text, and return the units of work."""
    if not 0 <= validation_fraction < 1:
        raise UsageError(f"validation-fraction: {validation_fraction} is not at least 0 and below 1")
    if shard_tokens < 1:
        raise UsageError(f"shard-tokens: {shard_tokens} is not a positive number")
    paths = text.find_inputs(inputs)
    text.check_format(paths, **reading)
    if os.path.lexists(output):
        if not overwrite:
            raise CannotCreate(f"output: {output} exists; give another name or --overwrite")
        _check_replaceable(output, paths)
    return text.cut(paths)


def _check_replaceable(output, paths):
    """Refuse to overwrite anything but what an earlier `prepare` wrote, or to delete the input with it."""
    if os.path.islink(output) or not os.path.isdir(output):
        raise CannotCreate(f"output: {output} is not a folder that can be overwritten")
    strangers = sorted(set(os.listdir(output)) - {TRAIN, VALIDATION, TOKENIZER})
    if strangers:
        listed = ", ".join(strangers[:5])
        raise CannotCreate(f"output: {output} also holds {listed}; --overwrite would delete what prepare did not write")
    if os.listdir(output) and not os.path.isfile(os.path.join(output, TRAIN, shards.MANIFEST)):
        raise CannotCreate(f"output: {output} is not a folder that prepare wrote, so --overwrite leaves it alone")
    inside = os.path.realpath(output) + os.sep
    for path in paths:
        if os.path.realpath(path).startswith(inside):
            raise CannotCreate(f"output: --overwrite would delete the input {path}")


def _partial_folder(output):
    """Make the hidden folder beside `output` in which everything is built; its name belongs to this run alone."""
    parent, label = os.path.split(os.path.abspath(output))
    try:
        os.makedirs(parent, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{label}.partial-", dir=parent)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(folder, 0o777 & ~mask)  # mkdtemp is private; the result follows the user's umask
    except OSError as error:
        raise CannotCreate(f"output: {output} cannot be created in {parent}: {error.strerror}") from None
    return folder


def _use_own_cores(world):
    """Let the tokenizers library use the cores of this rank, divided by the ranks of the host that share them."""
    mine = (world.host, frozenset(os.sched_getaffinity(0)))
    sharing = world.comm.allgather(mine).count(mine)
    cores = max(1, len(mine[1]) // sharing)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if cores > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(cores)


class Split:
    """Which part a document belongs to: a function of its text, so equal documents fall on one side."""

    def __init__(self, validation_fraction):
        self.fraction = validation_fraction
        self.parts = (TRAIN, VALIDATION) if validation_fraction > 0 else (TRAIN,)
        self._border = int(validation_fraction * 2**64)

    def part(self, document):
        digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
        return VALIDATION if int.from_bytes(digest, "little") < self._border else TRAIN


# --- the tokenizer -----------------------------------------------------------------------------------------------


def _tokenizer_on_all(comm, folder, choice, units, reading, split):
    """Load or train the tokenizer on root, save it in `folder`; returns (its encoder, facts) on every rank."""
    serialised, facts = on_root(comm, _make_tokenizer, folder, choice, units, reading, split)
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(serialised)
    encoder.no_truncation()
    encoder.no_padding()
    # A document that spells [MASK] or <|endoftext|> is text about tokens, not the token.
    encoder.encode_special_tokens = True
    return encoder, facts


def _make_tokenizer(folder, choice, units, reading, split):
    given, kind, vocab_size = choice
    target = os.path.join(folder, TOKENIZER)
    with _disk(target):
        if given is None:
            tokenizer.save(tokenizer.train(kind, vocab_size, lambda: sample(units, reading, split)), kind, target)
        else:
            tokenizer.load(given).save_pretrained(target)
        made = tokenizer.load(target)
        if given is not None and tokenizer.tokenizer_hash(made) != tokenizer.folder_hash(given):
            raise DataError(f"tokenizer: {given} becomes another tokenizer when transformers saves it")
        for path in sorted(os.listdir(target)):
            _sync(os.path.join(target, path))
    facts = {
        # Ids may have gaps, so the vocabulary is as large as its highest id asks for, not its number of entries.
        "vocab_size": max(made.get_vocab().values()) + 1,
        "separator_id": tokenizer.separator_id(made, given or target),
        "tokenizer_hash": tokenizer.tokenizer_hash(made),
    }
    return made.backend_tokenizer.to_str(), facts


def sample(units, reading, split, limit_bytes=1 << 30):
    """Yield training documents for the tokenizer: about `limit_bytes` of text, from the start of every unit alike."""
    total = sum(unit.weight for unit in units)
    for unit in units:
        left = unit.weight * min(1.0, limit_bytes / total) if total > limit_bytes else float("inf")
        for document, _ in text.documents(unit, **reading):
            if split.part(document) == TRAIN:
                yield from pieces(document)
            left -= len(document)
            if left <= 0:
                break


# --- tokenising --------------------------------------------------------------------------------------------------


def share(weights, size):
    """Deal units to ranks, the heaviest first, each to the rank with the least so far: a list of indices per rank."""
    dealt = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]
    for index in sorted(range(len(weights)), key=lambda index: (-weights[index], index)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(index)
        heapq.heappush(loads, (load + weights[index], rank))
    return dealt


def pieces(document, characters=_BATCH_CHARACTERS):
    """Cut a very long document before blanks, where tokenizers cut anyway, so that encoding it takes bounded memory."""
    begin = 0
    while len(document) - begin > characters:
        at = document.rfind(" ", begin + characters // 2, begin + characters)
        end = at if at > begin else begin + characters
        yield document[begin:end]
        begin = end
    yield document[begin:]


class Spool:
    """What this rank tokenised: its tokens in one file per part, and for each unit where they lie.

    units: {part: {unit: (first token in the file, int64 array of document lengths)}}.
    """

    def __init__(self, folder, rank, parts, dtype):
        self.dtype, self.empty = dtype, 0
        self.paths = {part: os.path.join(folder, f"spool-{rank:06d}.{part}") for part in parts}
        self.units = {part: {} for part in parts}
        self._files = {}
        for part, path in self.paths.items():
            self._files[part] = open(path, "xb", buffering=_COPY_BYTES)  # noqa: SIM115 (closed by `close`)
        self._written = dict.fromkeys(parts, 0)
        self._lengths = {part: [] for part in parts}
        self._open_length = 0

    @property
    def tokens(self):
        return sum(self._written.values())

    def append(self, part, ids):
        self._files[part].write(np.array(ids, self.dtype))
        self._written[part] += len(ids)
        self._open_length += len(ids)

    def end_document(self, part, separator_id):
        """Close the document with its separator; one without a single token is left out."""
        if self._open_length == 0:
            self.empty += 1
            return
        self.append(part, [separator_id])
        self._lengths[part].append(self._open_length)
        self._open_length = 0

    def end_unit(self, unit):
        for part, lengths in self._lengths.items():
            lengths = np.array(lengths, np.int64)
            self.units[part][unit] = (self._written[part] - int(lengths.sum()), lengths)
            self._lengths[part] = []

    def close(self):
        for file in self._files.values():
            file.close()


def _tokenise(comm, folder, units, reading, encoder, facts, split):
    """Every rank tokenises its units into its spool. An error on one rank stops all of them."""
    spool, error = None, None
    mine = share([unit.weight for unit in units], comm.size)[comm.rank]
    progress = Progress(comm, "prepare", sum(unit.stop - unit.start for unit in units))
    try:
        with _disk(folder):
            spool = Spool(folder, comm.rank, split.parts, shards.token_dtype(facts["vocab_size"]))
            _tokenise_units(spool, mine, units, reading, encoder, facts["separator_id"], split, progress)
            spool.close()
    except Refusal as refusal:
        error = refusal
    progress.finish(failed=error is not None)
    agree(comm, error)
    return spool


def _tokenise_units(spool, mine, units, reading, encoder, separator_id, split, progress):
    done = 0
    for index in mine:
        batch, characters = [], 0
        for document, position in text.documents(units[index], **reading):
            part = split.part(document)
            for piece in pieces(document):
                batch.append((part, piece, False))
                characters += len(piece)
                if characters >= _BATCH_CHARACTERS:
                    _encode(encoder, batch, spool, separator_id)
                    batch, characters = [], 0
                    if not progress.advance(done + position, spool.tokens):
                        return
            batch.append((part, "", True))
        _encode(encoder, batch, spool, separator_id)
        spool.end_unit(index)
        done += units[index].stop - units[index].start
        if not progress.advance(done, spool.tokens):
            return


def _encode(encoder, batch, spool, separator_id):
    encodings = encoder.encode_batch_fast([piece for _, piece, _ in batch], add_special_tokens=False)
    for (part, _, ends), encoding in zip(batch, encodings, strict=True):
        if ends:
            spool.end_document(part, separator_id)
        else:
            spool.append(part, encoding.ids)


def _check_counts(comm, spool, split):
    """Refuse a part without documents; returns the numbers of all ranks together."""
    mine = {part: sum(len(lengths) for _, lengths in spool.units[part].values()) for part in split.parts}
    total = {part: comm.allreduce(count) for part, count in mine.items()}
    total["empty"] = comm.allreduce(spool.empty)
    documents = sum(total[part] for part in split.parts)
    error = None
    if documents == 0:
        blank = f" ({total['empty']} of blanks only)" if total["empty"] else ""
        error = DataError(f"input: there is no document in it{blank}")
    elif VALIDATION in split.parts and 0 in (total[TRAIN], total[VALIDATION]):
        part = TRAIN if total[TRAIN] == 0 else VALIDATION
        error = DataError(
            f"validation-fraction: {split.fraction} of {documents} documents leaves none for {part}; "
            f"give more documents or another fraction"
        )
    agree(comm, error)
    return total


# --- laying out and writing --------------------------------------------------------------------------------------


def runs(first_token, lengths, shard_tokens):
    """Group a unit's documents by shard: a list of (slot, first document, end document).

    first_token: where the unit begins in the stream of all tokens. A document belongs to the slot in which its
    first token falls, slot k being [k, k + 1) * shard_tokens of that stream; so every rank places its documents
    knowing only how many tokens come before them. Slots in which no document begins become no shard.
    """
    starts = first_token + np.cumsum(lengths) - lengths
    slots, begins = np.unique(starts // shard_tokens, return_index=True)
    return list(zip(slots.tolist(), begins.tolist(), [*begins[1:].tolist(), len(lengths)], strict=True))


def _write_part(comm, folder, part, spool, unit_count, facts, shard_tokens):
    """Write the shards and the manifest of one part from the spools of all ranks; returns the manifest."""
    target = os.path.join(folder, part)
    dtype = spool.dtype

    # Where each unit begins among all tokens.
    totals = np.zeros(unit_count, np.int64)
    for unit, (_, lengths) in spool.units[part].items():
        totals[unit] = lengths.sum()
    totals = comm.allreduce(totals)
    unit_begins = np.cumsum(totals) - totals

    # How much falls into each slot, and which slots become shards.
    slot_count = -(-int(totals.sum()) // shard_tokens)
    sizes = np.zeros((slot_count, 2), np.int64)
    before = {}  # (unit, slot) -> documents of this slot in it
    for unit, (_, lengths) in spool.units[part].items():
        for slot, begin, end in runs(int(unit_begins[unit]), lengths, shard_tokens):
            sizes[slot] += (int(lengths[begin:end].sum()), end - begin)
            before[unit, slot] = end - begin
    sizes = comm.allreduce(sizes)
    slots = np.flatnonzero(sizes[:, 1])
    shard_of = {slot: index for index, slot in enumerate(slots.tolist())}
    sizes = sizes[slots]
    shard_begins = np.cumsum(sizes[:, 0]) - sizes[:, 0]
    # Documents of a slot before each unit's own: units are in order, so a running count over (slot, unit).
    places, counted = {}, {}
    for unit, slot in sorted(itertools.chain.from_iterable(comm.allgather(list(before)))):
        places[unit, slot] = None
    numbers = {}
    for part_of in comm.allgather(before):
        numbers.update(part_of)
    for unit, slot in places:
        places[unit, slot] = counted.get(slot, 0)
        counted[slot] = places[unit, slot] + numbers[unit, slot]

    # One rank makes each file in its final size, then all write side by side.
    paths = [os.path.join(target, shards.name(index)) for index in range(len(slots))]
    on_root(comm, _make_folder, target)
    made = {}
    with together(comm), _disk(target):
        for index in range(comm.rank, len(paths), comm.size):
            tokens, documents = sizes[index].tolist()
            made[index] = shards.create(paths[index], token_count=tokens, document_count=documents, **facts)
    offsets = {index: value for each in comm.allgather(made) for index, value in each.items()}
    with together(comm), _disk(target):
        for unit, (spooled, lengths) in spool.units[part].items():
            for slot, begin, end in runs(int(unit_begins[unit]), lengths, shard_tokens):
                index = shard_of[slot]
                starts = int(unit_begins[unit]) + np.cumsum(lengths) - lengths - int(shard_begins[index])
                source = spooled + int(lengths[:begin].sum())
                count = int(lengths[begin:end].sum())
                _write_run(
                    paths[index],
                    offsets[index],
                    spool.paths[part],
                    dtype,
                    source,
                    count,
                    starts[begin:end],
                    places[unit, slot],
                )
        for index in made:  # the end of the last document, by the rank that made the file
            with open(paths[index], "r+b", buffering=0) as file:
                end = np.array([sizes[index, 0]], np.int64)
                shards.write_at(file.fileno(), end, offsets[index]["document_offsets"] + 8 * int(sizes[index, 1]))
        os.unlink(spool.paths[part])

    entries = _finish(comm, target, paths, offsets, sizes, dtype)
    return on_root(comm, _manifest, target, entries, facts)


def _write_run(path, offsets, spool_path, dtype, source, count, starts, first_document):
    """Copy `count` tokens from token `source` of the spool into a shard, and say where their documents begin."""
    with open(path, "r+b", buffering=0) as file, open(spool_path, "rb", buffering=0) as spool:
        at = offsets["tokens"] + int(starts[0]) * dtype.itemsize
        spool.seek(source * dtype.itemsize)
        left = count * dtype.itemsize
        while left:
            content = spool.read(min(_COPY_BYTES, left))
            shards.write_at(file.fileno(), content, at)
            at, left = at + len(content), left - len(content)
        shards.write_at(file.fileno(), np.ascontiguousarray(starts), offsets["document_offsets"] + 8 * first_document)
        os.fsync(file.fileno())


def _finish(comm, target, paths, offsets, sizes, dtype):
    """CRCs by all ranks, block range by block range; then each shard's maker completes it. Returns all entries."""
    tasks = []
    for index, tokens in enumerate(sizes[:, 0].tolist()):
        blocks = -(-tokens * dtype.itemsize // shards.BLOCK_BYTES)
        tasks += [(index, first, min(first + _SCAN_BLOCKS, blocks)) for first in range(0, blocks, _SCAN_BLOCKS)]
    scanned = {}
    with together(comm), _disk(target):
        for index, first, last in tasks[comm.rank :: comm.size]:
            tokens = int(sizes[index, 0])
            scanned[index, first] = shards.scan(paths[index], offsets[index]["tokens"], dtype, tokens, first, last)
    found = {task: result for each in comm.allgather(scanned) for task, result in each.items()}
    entries = {}
    with together(comm), _disk(target):
        for index in range(comm.rank, len(paths), comm.size):
            ranges = [found[task] for task in sorted(found) if task[0] == index]
            crcs = [crc for each, _ in ranges for crc in each]
            entries[index] = shards.finish(paths[index], crcs, max(highest for _, highest in ranges))
    entries = {index: entry for each in comm.allgather(entries) for index, entry in each.items()}
    return [entries[index] for index in sorted(entries)]


def _make_folder(target):
    with _disk(target):
        os.mkdir(target)


def _manifest(target, entries, facts):
    with _disk(target):
        return shards.write_manifest(target, entries, **facts)


def _publish(folder, output, overwrite):
    """Give the finished folder its name. What it replaces is moved aside first and deleted last."""
    output = os.path.abspath(output)
    with _disk(output):
        _sync(folder)
        aside = None
        if os.path.lexists(output):
            if not overwrite:
                raise CannotCreate(f"output: {output} appeared while this job ran; it is left as it is")
            aside = tempfile.mkdtemp(prefix=f".{os.path.basename(output)}.old-", dir=os.path.dirname(output))
            os.rename(output, os.path.join(aside, "old"))
        os.rename(folder, output)
        _sync(os.path.dirname(output))
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _disk(path):
    """An error of the file system inside becomes an IOFailure that names the place."""
    try:
        yield
    except OSError as error:
        raise IOFailure(f"{error.filename or path}: {error.strerror or error}") from None


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
