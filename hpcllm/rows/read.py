"""Input files to rows: four formats, the cuts between units of work, and reading a unit.

- text: a row a line, {"text": line}; what is nothing but white space is no row.
- jsonl (.jsonl, .ndjson): an object a line; what is nothing but white space is no row.
- tsv: a line of names, then a row a line, cut at tabs; a quote is a letter like any other. An empty line is no row.
- csv: a line of names, then rows by the rules of Python's csv module: a quoted field may hold commas and lines. An
  empty line is no row.

Any of them may be compressed (.gz). UTF-8 with or without a byte order mark; lines end with \\n or \\r\\n.

Units depend on the input alone. Those of plain lines are found by a look at each cut; what is compressed, and CSV,
where only who has read all before knows whether a quote is open, is read through once to find them. Nothing here
talks to other ranks.
"""

import csv
import gzip
import math
import os
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..data import text
from ..errors import DataError, UsageError
from ..files import failing_as_io

FORMATS = ("jsonl", "tsv", "csv", "text")
TEXT = "text"  # the column that a line of plain text is
_TABLES = ("tsv", "csv")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".csv": "csv"}
# As many units as many ranks can share evenly; not so small that a unit's own cost shows, not so large that one of
# slow rows keeps all others waiting for it.
_UNITS = 1024
_UNIT_BYTES = (16 << 10, 1 << 20)
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """An input file; header: the names of a table's columns."""

    path: str
    format: str
    header: tuple[str, ...] = ()

    @property
    def compressed(self):
        return self.path.endswith(".gz")

    def open(self):
        return gzip.open(self.path, "rb") if self.compressed else open(self.path, "rb", buffering=_READ_BYTES)


class Unit(NamedTuple):
    """The rows in bytes [start, stop) of the (uncompressed) source; a row begins at either."""

    source: Source
    start: int
    stop: int

    @property
    def size(self):
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Row:
    """fields: {column: value}, values being str but for JSON's; offset: byte of the (uncompressed) file."""

    fields: dict
    source: Source
    offset: int

    def refusal(self, why):
        """A DataError (exit 65) to raise for this row: names its file and line."""
        return text.refusal(self.source, self.offset, why)


def unit_bytes(paths):
    """How long units of these files are."""
    return unit_size(sum(text.Unit(path, 0, size, size).weight for path in paths for size in [os.path.getsize(path)]))


def unit_size(total):
    """Bytes of a unit of so many bytes: enough to be worth a message, few enough to share evenly."""
    return min(max(total // _UNITS, _UNIT_BYTES[0]), _UNIT_BYTES[1])


def format_of(path, columns, format=None):
    """The format of a file: `format`, or what its name says. Raises UsageError where it cannot have the columns."""
    if format is None:
        format = _SUFFIXES.get(os.path.splitext(path.removesuffix(".gz"))[1].lower(), "text")
    if format not in FORMATS:
        raise UsageError(f'format: "{format}" is not one of {", ".join(FORMATS)}')
    if format == "text" and set(columns) - {TEXT}:
        raise UsageError(
            f"input: {path} is read as plain text, whose lines are the column {TEXT!r}; "
            f"there is no {', '.join(repr(name) for name in columns if name != TEXT)} in it"
        )
    return format


def cut(path, format, columns, unit_bytes):
    """The units of a file, in order: each the rows that begin in about `unit_bytes`, none where there are no rows.

    Raises DataError for a table whose header lacks one of `columns`, and for what reading it through finds damaged.
    """
    source = Source(path, format)
    with failing_as_io(path), text.unzipping(path), source.open() as file:
        if format in _TABLES:
            source = replace(source, header=_header(file, source, columns))
        begin, units = file.tell(), []
        ends = _ends_by_reading if source.compressed or format == "csv" else _ends_by_seeking
        for end in ends(file, source, begin, unit_bytes):
            units.append(Unit(source, begin, end))
            begin = end
    return units


class Reader:
    """Reads units; keeps the last file open, since a compressed one can only be read forwards."""

    def __init__(self, columns):
        self._columns = columns
        self._source = self._file = None

    def rows(self, unit):
        """The rows (list of Row) of a unit. Raises DataError (65) with file and line for a row that is none."""
        source = unit.source
        with failing_as_io(source.path), text.unzipping(source.path):
            if source != self._source:
                self.close()
                self._source, self._file = source, source.open()
            found = _records(self._file, source, unit.start, unit.stop)
            return [Row(self._fields(source, offset, record), source, offset) for offset, record in found]

    def close(self):
        if self._file is not None:
            self._file.close()

    def _fields(self, source, offset, record):
        if source.format == "text":
            return {TEXT: record}
        if source.format == "jsonl":
            fields = text.json_object(record, source, offset)
            for name in self._columns:
                text.string_field(fields, name, source, offset)
            return fields
        if len(record) != len(source.header):
            names = ", ".join(source.header[:8])
            why = f"{len(record)} fields where the header names {len(source.header)} ({names})"
            raise text.refusal(source, offset, why)
        return dict(zip(source.header, record, strict=True))


def _records(file, source, start, stop=math.inf):
    """Yield (offset, line, or for a table the list of its fields) of all but blank lines in bytes [start, stop)."""
    lines = _lines(file, source, start, stop)
    if source.format == "csv":
        yield from _csv_records(lines, source)
        return
    for offset, line in lines:
        line = line.rstrip("\r\n")
        if source.format == "tsv":
            if line:
                yield offset, line.split("\t")
        elif line and not line.isspace():
            yield offset, line


def _lines(file, source, start, stop):
    offset = file.seek(start)
    while offset < stop and (raw := file.readline()):
        yield offset, text.decode(raw, source, offset)
        offset += len(raw)
    if offset < stop < math.inf:
        raise DataError(f"input: {source.path} ends at byte {offset}; it had {stop} when it was looked at first")


def _csv_records(lines, source):
    taken = []  # offsets of the lines of the record being read; the csv module takes no line of the next one

    def take():
        for offset, line in lines:
            taken.append(offset)
            yield line

    csv.field_size_limit(2**31 - 1)  # its default would refuse a text of 128 KiB
    try:
        for fields in csv.reader(take(), strict=True):
            if fields:
                yield taken[0], fields
            taken.clear()
    except csv.Error as error:
        raise text.refusal(source, taken[0], f"not CSV ({error})") from None


def _header(file, source, columns):
    _, names = next(_records(file, source, 0), (0, []))
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"input: {source.path} has two columns {twice[0]!r} in its header")
    for name in columns:
        if name not in names:
            raise DataError(
                f"input: {source.path} has no column {name!r} in its header, the first line; "
                f"it has {', '.join(map(repr, names[:8])) or 'none'}"
            )
    return tuple(names)


def _ends_by_seeking(file, source, begin, unit_bytes):
    size = os.fstat(file.fileno()).st_size
    while begin < size:
        begin = text.border(file, begin + unit_bytes, size)
        yield begin


def _ends_by_reading(file, source, begin, unit_bytes):
    for offset, _ in _records(file, source, begin):
        if offset - begin >= unit_bytes:
            yield offset
            begin = offset
    if file.tell() > begin:
        yield file.tell()
