"""Documents to token ids: dealing units to ranks, encoding them in bounded memory, and spooling the result.

The spools are scratch files of one run; `layout` makes shards of them. Deals may differ with the number of ranks, what
a unit's spooled documents are does not.
"""

import heapq
import os
from array import array

import numpy as np

from ..errors import Refusal
from ..files import failing_as_io
from ..mpi import agree
from . import shards, text
from .progress import Progress
from .scratch import COPY_BYTES

# Characters that go to the tokenizer at once: bounds the memory of its results, about 60 bytes a character.
BATCH_CHARACTERS = 1 << 20
_AT_ONCE = 1 << 16  # token ids that are written at once


def share(weights, size):
    """Deal units to ranks, the heaviest first, each to the rank with the least so far: a list of indices per rank."""
    dealt = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]
    for index in sorted(range(len(weights)), key=lambda index: (-weights[index], index)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(index)
        heapq.heappush(loads, (load + weights[index], rank))
    return dealt


def pieces(document, characters=BATCH_CHARACTERS):
    """Cut a very long document before blanks, where tokenizers cut anyway, so that encoding it takes bounded memory."""
    begin = 0
    while len(document) - begin > characters:
        at = document.rfind(" ", begin + characters // 2, begin + characters)
        end = at if at > begin else begin + characters
        yield document[begin:end]
        begin = end
    yield document[begin:]


class Spool:
    """What this rank tokenised: its tokens, and what columns stand beside them, in a file each per part.

    paths: {part: [the file of the tokens, that of each column]}; units: {part: {unit: (its first token in the file,
    its first document, int64 array of document lengths)}}. The last path is of lines of text, where there are such;
    lines: {part: {unit: bytes of its lines}}, in the order in which they stand there.
    """

    def __init__(self, folder, rank, parts, dtype, columns=(), with_lines=False):
        """dtype: of tokens; columns: of shards.Column; with_lines: documents have such."""
        self.dtype, self.columns, self.empty = dtype, columns, 0
        names = ["", *(f".{column.name}" for column in columns), *[".lines"] * with_lines]
        self.paths = {p: [os.path.join(folder, f"spool-{rank:06d}.{p}{name}") for name in names] for p in parts}
        self.units, self.lines = {part: {} for part in parts}, {part: {} for part in parts}
        self._files = {}
        for part, paths in self.paths.items():
            self._files[part] = [open(path, "xb", buffering=COPY_BYTES) for path in paths]  # noqa: SIM115 (see `close`)
        self._written, self._documents = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)
        self._line_bytes, self._with_lines = dict.fromkeys(parts, 0), with_lines
        self._lengths = {part: [] for part in parts}
        self._waiting = {part: [] for part in parts}
        self._open_length = 0

    @property
    def tokens(self):
        return sum(self._written.values())

    def append(self, part, ids):
        self._waiting[part] += ids
        self._written[part] += len(ids)
        self._open_length += len(ids)
        if len(self._waiting[part]) >= _AT_ONCE:
            self._flush(part)

    def _flush(self, part):
        # array reads a list of ints in half of numpy's time.
        ids = np.frombuffer(array("I", self._waiting[part]), np.uintc)
        self._files[part][0].write(ids.astype(self.dtype, copy=False))
        self._waiting[part] = []

    def end_document(self, part, separator_id):
        """Close the document with its separator; one without a single token is left out."""
        if self._open_length == 0:
            self.empty += 1
            return
        self.append(part, [separator_id])
        self._end(part)

    def example(self, part, ids, beside):
        """Add a document as it is, with what stands beside it: {column name: a number, or numbers; "line": bytes}."""
        self.append(part, ids)
        self._end(part)
        for column, file in zip(self.columns, self._files[part][1:], strict=False):
            file.write(np.ascontiguousarray(beside[column.name], column.dtype))
        if self._with_lines:
            self._files[part][-1].write(beside["line"])
            self._line_bytes[part] += len(beside["line"])

    def _end(self, part):
        self._lengths[part].append(self._open_length)
        self._open_length = 0

    def end_unit(self, unit):
        for part, lengths in self._lengths.items():
            lengths = np.array(lengths, np.int64)
            self.units[part][unit] = self._written[part] - int(lengths.sum()), self._documents[part], lengths
            self._documents[part] += len(lengths)
            self._lengths[part] = []
            self.lines[part][unit], self._line_bytes[part] = self._line_bytes[part], 0

    def close(self):
        for part, files in self._files.items():
            self._flush(part)
            for file in files:
                file.close()


def tokenise(comm, folder, units, reading, encoder, facts, split):
    """Every rank tokenises its units into its spool. An error on one rank stops all of them."""
    mine = share([unit.weight for unit in units], comm.size)[comm.rank]

    def work(spool, progress):
        _tokenise_units(spool, mine, units, reading, encoder, facts["separator_id"], split, progress)

    return fill(comm, folder, units, split.parts, facts, work)


def fill(comm, folder, units, parts, facts, work, columns=(), with_lines=False):
    """The Spool that `work(spool, progress)` fills on this rank, of all `units`. An error on one rank stops all."""
    spool, error = None, None
    progress = Progress(comm, "prepare", sum(unit.stop - unit.start for unit in units))
    try:
        with failing_as_io(folder):
            spool = Spool(folder, comm.rank, parts, shards.token_dtype(facts["vocab_size"]), columns, with_lines)
            work(spool, progress)
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
            part, begun = split.part(document), 0
            for piece in pieces(document):
                begun += len(piece)
                batch.append((part, piece, begun == len(document)))
                characters += len(piece)
                if characters >= BATCH_CHARACTERS:
                    _encode(encoder, batch, spool, separator_id)
                    batch, characters = [], 0
                    if not progress.advance(done + position, spool.tokens):
                        return
        _encode(encoder, batch, spool, separator_id)
        spool.end_unit(index)
        done += units[index].stop - units[index].start
        if not progress.advance(done, spool.tokens):
            return


def _encode(encoder, batch, spool, separator_id):
    encodings = encoder.encode_batch_fast([piece for _, piece, _ in batch], add_special_tokens=False)
    for (part, _, ends), encoding in zip(batch, encodings, strict=True):
        spool.append(part, encoding.ids)
        if ends:
            spool.end_document(part, separator_id)
