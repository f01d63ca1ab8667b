"""Text files in, documents out: finding inputs, cutting them into units of work, and reading a unit as a stream.

A unit is a byte range of one file (a .gz file is one unit). Units depend on the input alone, never on the number
of ranks, and a document belongs to exactly one of them. Nothing here tokenises or talks to other ranks.
"""

import glob
import gzip
import json
import os
import stat
import zlib
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import DataError, MissingInput, UsageError

# At most: enough units to balance many ranks; at least: a unit's own cost does not show.
_UNITS = 512
_UNIT_BYTES = (64 << 10, 8 << 20)
_READ_BYTES = 1 << 20
# How much more work a byte of a compressed file is, for balancing: English text shrinks to about a third.
_GZIP_WEIGHT = 3
SEPARATORS = ("newline", "blank-line")


@dataclass(frozen=True)
class Unit:
    """Documents of `path` that begin in bytes [start, stop) (compressed: the whole file); weight ~ text bytes."""

    path: str
    start: int
    stop: int
    size: int

    @property
    def compressed(self):
        return self.path.endswith(".gz")

    @property
    def weight(self):
        return (self.stop - self.start) * (_GZIP_WEIGHT if self.compressed else 1)


def find_inputs(patterns):
    """The files that `patterns` (paths or globs) name: sorted within a glob, each once, in the order given.

    Raises MissingInput (66) for a pattern that matches nothing, DataError (65) for what is not a regular file.
    """
    found = {}
    for pattern in patterns:
        if os.path.lexists(pattern):  # a file whose name holds * or [ is itself
            matches = [pattern]
        else:
            matches = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
        if not matches:
            kind = "no file matches" if glob.has_magic(pattern) else "there is no file"
            raise MissingInput(f"input: {kind} {pattern}")
        for path in matches:
            if not os.path.exists(path):
                raise MissingInput(f"input: {path} is a link to a file that does not exist")
            if os.path.isdir(path):
                raise DataError(f"input: {path} is a folder; name its files, for example {path.rstrip('/')}/*.txt")
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise DataError(f"input: {path} is not a regular file; its parts could not be read by several ranks")
            if not os.access(path, os.R_OK):
                raise MissingInput(f"input: {path} may not be read by this user")
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def unit_size(total):
    """Bytes of a unit of so many bytes of input, by default."""
    return min(max(total // _UNITS, _UNIT_BYTES[0]), _UNIT_BYTES[1])


def cut(paths, unit_bytes=None):
    """The units of the files at `paths`, in order. Raises DataError when there is not one byte of input.

    unit_bytes: length of a unit; by default a part of the input between 64 KiB and 8 MiB.
    """
    units = []
    sizes = [os.path.getsize(path) for path in paths]
    unit_bytes = unit_bytes or unit_size(sum(sizes))
    for path, size in zip(paths, sizes, strict=True):
        step = size if path.endswith(".gz") else unit_bytes
        for start in range(0, size, max(1, step)):
            units.append(Unit(path, start, min(start + step, size), size))
    if not units:
        raise DataError(f"input: nothing to read, {_files(len(paths))} of 0 bytes (first: {paths[0]})")
    return units


def check_format(paths, jsonl_field, document_separator):
    """Refuse a wrong separator, and JSON lines that would be taken for plain text."""
    if document_separator not in SEPARATORS:
        raise UsageError(f'document-separator: "{document_separator}" is not one of {", ".join(SEPARATORS)}')
    for path in paths:
        if jsonl_field is None and path.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
            raise UsageError(
                f"input: {path} looks like JSON lines; name the field that holds the text: --jsonl-field NAME"
            )


def documents(unit, *, jsonl_field=None, document_separator="newline"):
    """Yield (text, position) for each document of `unit`; position: bytes of the unit consumed so far.

    Plain text is one document a line, or, with "blank-line", a document runs to the next blank line. JSONL is an
    object a line whose `jsonl_field` is a string. Blank documents are passed over. Lines end with \\n or \\r\\n.
    Memory: the longest document. Raises DataError (65) with file and line for bytes that are not UTF-8, a line
    that is not such a JSON object, and damaged gzip.
    """
    by_paragraph = jsonl_field is None and document_separator == "blank-line"
    paragraph, position = [], 0
    for line, offset, position in lines(unit, by_paragraph):
        if jsonl_field is not None:
            if line and not line.isspace():
                yield string_field(json_object(line, unit, offset), jsonl_field, unit, offset), position
        elif not by_paragraph:
            if line and not line.isspace():
                yield line, position
        elif line and not line.isspace():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph), position
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph), position


def lines(unit, by_paragraph=False):
    """Yield (line without its end, its byte offset in the text, bytes of the unit consumed) of `unit`.

    by_paragraph: units are cut where a blank line has ended a paragraph, not within one. Raises DataError (65) with
    file and line for bytes that are not UTF-8, and for damaged gzip.
    """
    for raw, offset, position in _gzip_lines(unit) if unit.compressed else _range_lines(unit, by_paragraph):
        yield decode(raw, unit, offset).rstrip("\r\n"), offset, position


def _range_lines(unit, by_paragraph):
    """Yield (line, its offset in the file, bytes of the unit consumed) for the lines this unit owns.

    The border of a cut at byte c is where the first document after c begins; c = 0 and the end of the file are
    their own borders. Both neighbours of a cut compute the same border from the file, so they share nothing.
    """
    with open(unit.path, "rb", buffering=_READ_BYTES) as file:
        begin = border(file, unit.start, unit.size, by_paragraph, limit=unit.stop)
        if begin is None:
            return
        end = border(file, unit.stop, unit.size, by_paragraph)
        file.seek(begin)
        offset = begin
        while offset < end:
            raw = file.readline()
            if not raw:
                raise DataError(
                    f"input: {unit.path} ends at byte {offset}; it had {unit.size} when it was looked at first"
                )
            yield raw, offset, min(offset + len(raw), unit.stop) - unit.start
            offset += len(raw)


def border(file, cut, size, by_paragraph=False, limit=None):
    """Offset of the first document that begins after byte `cut` of an open file of `size` bytes.

    None as soon as the border of a later cut `limit` is known to be the same one, so that no unit reads far past
    its own end for its begin. Reads in blocks: a line of many gigabytes takes no memory.
    """
    if cut == 0 or cut >= size:
        return min(cut, size)
    file.seek(cut)
    offset, line, has_text, seen_blank = cut, None, False, False  # line: its offset; None in the line of the cut
    while piece := file.readline(_READ_BYTES):
        if line is not None and piece.strip():
            if seen_blank:
                return line
            has_text = True
        offset += len(piece)
        if piece.endswith(b"\n"):
            if not by_paragraph:
                return offset
            seen_blank = line is not None and not has_text
            line, has_text = offset, False
        elif limit is not None and offset > limit and not seen_blank and (line is None or has_text):
            return None  # inside one line that reaches past `limit`, from where the search goes the same way
    return size


def _gzip_lines(unit):
    with unzipping(unit.path), open(unit.path, "rb") as raw_file, gzip.GzipFile(fileobj=raw_file) as file:
        offset = 0
        while raw := file.readline():
            yield raw, offset, min(raw_file.tell(), unit.stop)
            offset += len(raw)


@contextmanager
def unzipping(path):
    """What gzip finds wrong with a file becomes a DataError (exit 65) that names it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"input: {path} is damaged or not gzip: {error}") from None


def decode(raw, unit, offset):
    """The line `raw` at byte `offset` (uncompressed) of a unit's file as str, without the file's byte order mark.

    unit: has `path` and `compressed`. Raises DataError with file, line and byte where it is not UTF-8.
    """
    if offset == 0 and raw.startswith(b"\xef\xbb\xbf"):
        raw, offset = raw[3:], 3
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(
            f"input: {unit.path} is not UTF-8: byte 0x{raw[error.start]:02x} in line {line_number(unit, at)} "
            f"at byte offset {at}{' of the uncompressed text' if unit.compressed else ''} ({error.reason})"
        ) from None


def refusal(unit, offset, why):
    """The DataError that says what is wrong with the line at byte `offset` of a unit's file."""
    return DataError(f"input: {unit.path} line {line_number(unit, offset)}: {why}")


def json_object(line, unit, offset):
    """The JSON object (dict) that a line is."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise refusal(unit, offset, f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise refusal(unit, offset, f"a JSON {type(record).__name__} where an object was expected")
    return record


def field(record, name, unit, offset):
    """What the JSON object `record` holds as `name`."""
    if name not in record:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        raise refusal(unit, offset, f"no field {name!r}; it has {names}")
    value = record[name]
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode("utf-8")
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair, which no text encoding holds
        raise refusal(unit, offset, f"the field {name!r} holds a lone surrogate escape such as \\ud800") from None
    return value


def string_field(record, name, unit, offset):
    """The string that the JSON object `record` holds as `name`."""
    text = field(record, name, unit, offset)
    if not isinstance(text, str):
        raise refusal(unit, offset, f"the field {name!r} is a {type(text).__name__}, not a string")
    return text


def line_number(unit, offset):
    """Number, from 1, of the line that holds byte `offset`; counted only when an error must be told."""
    count = 1
    with gzip.open(unit.path, "rb") if unit.compressed else open(unit.path, "rb") as file:
        while offset > 0 and (block := file.read(min(_READ_BYTES, offset))):
            count += block.count(b"\n")
            offset -= len(block)
    return count


def _files(count):
    return "1 file" if count == 1 else f"{count} files"
