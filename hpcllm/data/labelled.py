"""Labelled text in: examples of CoNLL columns, TSV and CSV tables, JSON lines and SQuAD, unit by unit as `cut` cuts it.

Nothing here knows labels' numbers, tokens or other ranks. What cannot be read is a DataError (65) with file and line.
"""

import csv
import functools
import os
import re
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, UsageError
from . import squad, text, turns

FORMATS = ("conll", "tsv", "csv", "jsonl", "squad")
_ENDINGS = {"tsv": "tsv", "csv": "csv", "jsonl": "jsonl", "ndjson": "jsonl"}
_ENDINGS |= dict.fromkeys(("conll", "conllu", "bio", "iob", "iob2", "bioes", "txt"), "conll")
# CoNLL-U's lines about a sentence, which are no tokens.
_COMMENT = re.compile(r"# *(\w+ *=|new(doc|par)\b)")
_DOCUMENT = "-DOCSTART-"
# Of kinds of labels, what differs from others: formats, and names of the fields of text, pair and label.
_TAKES = {"tags": ("conll", "jsonl"), "span": ("squad", "jsonl"), "turns": ("jsonl",)}
_USUAL = {"tags": ("tokens", None, "tags"), "span": ("context", "question", "answers")}
_USUAL |= {"text": ("source", None, "target"), "turns": ("messages", None, "completion")}


@dataclass(frozen=True)
class Example:
    """text, pair: str, or words (list of str) and None; label: as read (str, number, list); offset: in its file.

    Of a dialogue text is what each turn says (list of str), label who says it. Of a question pair is the question, text
    what may hold its answer, label a squad.Asked.
    """

    text: Any
    pair: str | None
    label: Any
    offset: int


@dataclass(frozen=True)
class Reading:
    """Where in the input text and labels stand.

    kind: of labels.KINDS, which files have; format: one of FORMATS, None: by each file's ending; text, pair, label:
    name of a column or field, or number of a column (from 0, or from the end as -1), None: as is usual (of CoNLL-U form
    and UPOS), and no pair; columns: names for tables without a header line.
    """

    kind: str = "single"
    format: str | None = None
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    columns: tuple | None = None

    def named(self, kind, universal=False):
        """(name or number of the text, of the pair, of the label) in files of a format. universal: of CoNLL-U."""
        usual = _USUAL.get(self.kind, ("text", None, "label"))
        if kind == "conll":
            usual = ("1", None, "3") if universal else ("0", None, "-1")
        return tuple(given or name for given, name in zip((self.text, self.pair, self.label), usual, strict=True))

    def format_of(self, path):
        """Raises UsageError for an ending that says nothing, and for a format that has no such examples."""
        ending = path.removesuffix(".gz").rpartition(".")[2].lower()
        found = self.format or ("squad" if self.kind == "span" and ending == "json" else _ENDINGS.get(ending))
        if found is None:
            raise UsageError(
                f"input: {path}: its ending does not tell the format; name it: --format {{{','.join(FORMATS)}}}"
            )
        takes = _TAKES.get(self.kind, ("tsv", "csv", "jsonl"))
        if found not in takes:
            needs = " or ".join(filter(None, (", ".join(takes[:-1]), takes[-1])))
            raise UsageError(f"input: {path} is {found} (by its ending or --format), this task reads {needs}")
        return found


def cut(paths, reading):
    """The units (text.Unit) of files, those of SQuAD first, then those of lines, then those of paragraphs."""
    ways = {"squad": 0, "conll": 2}
    groups = [[], [], []]
    for path in paths:
        groups[ways.get(reading.format_of(path), 1)].append(path)
    return [
        unit for way, some in zip((squad.cut, text.cut, text.cut), groups, strict=True) if some for unit in way(some)
    ]


def examples(unit, reading):
    """Yield (Example, bytes of the unit consumed) for each example of `unit` (text.Unit)."""
    kind = reading.format_of(unit.path)
    if kind == "conll":
        yield from _sentences(unit, reading)
    elif kind == "jsonl":
        yield from _records(unit, reading)
    elif kind == "squad":
        for (context, question, asked), offset, position in squad.questions(unit, reading):
            yield Example(context, question, asked, offset), position
    else:
        yield from _rows(unit, reading, kind)


def _sentences(unit, reading):
    words, labels, width, begin, position = [], [], 0, 0, 0
    universal = unit.path.removesuffix(".gz").endswith(".conllu")
    word_column, _, label_column = reading.named("conll", universal)
    for line, offset, position in text.lines(unit, by_paragraph=True):
        if not line.strip() or line.startswith(_DOCUMENT):
            if words:
                yield Example(words, None, labels, begin), position
                words, labels = [], []
            continue
        if _COMMENT.match(line):
            continue
        fields = line.split("\t") if "\t" in line else line.split()
        if universal and re.match(r"\d+[-.]", line):  # several words written as one, or words that are not there
            continue
        if not words:
            width, begin = len(fields), offset
        if len(fields) != width:
            why = f"{len(fields)} columns where the first line of the sentence has {width}"
            raise text.refusal(unit, offset, why)
        words.append(_field(fields, word_column, unit, offset))
        labels.append(_field(fields, label_column, unit, offset))
    if words:
        yield Example(words, None, labels, begin), position


def _field(fields, number, unit, offset):
    try:
        return fields[int(number)].strip()
    except ValueError:
        raise UsageError(
            f'column "{number}": columns of CoNLL files have numbers, from 0, or from the end as -1'
        ) from None
    except IndexError:
        raise text.refusal(unit, offset, f"no column {number}, there are {len(fields)}") from None


def _rows(unit, reading, kind):
    names = reading.columns or _header(unit.path, kind)
    if not names:  # a compressed file of nothing; plain ones are passed over before
        return
    of_text, of_pair, of_label = reading.named(kind)
    wanted = [name for name in (of_text, of_pair, of_label) if name is not None]
    missing = [name for name in wanted if name not in names]
    if missing:
        said = ", ".join(name[:30] for name in names[:8]) + ", ..." * (len(names) > 8)
        if reading.columns:
            raise UsageError(f'input: there is no column "{missing[0]}"; --columns names {said}')
        raise UsageError(
            f'input: there is no column "{missing[0]}"; the first line of {unit.path} names {said}. If that line is an '
            "example, name the columns: --columns"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f'input: {unit.path} has two columns "{twice[:30]}"')
    for line, offset, position in text.lines(unit):
        if not line.strip() or (offset == 0 and not reading.columns):
            continue
        fields = _split(line, kind, unit, offset)
        if len(fields) != len(names):
            raise text.refusal(unit, offset, f"{len(fields)} columns, not the {len(names)} ({', '.join(names)})")
        row = dict(zip(names, fields, strict=True))
        pair = None if of_pair is None else row[of_pair]
        yield Example(row[of_text], pair, row[of_label], offset), position


def _split(line, kind, unit, offset):
    if kind == "tsv":
        return line.split("\t")
    try:
        csv.field_size_limit(2**31 - 1)  # its default would refuse a text of 128 KiB
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        why = f"not a row of CSV ({error}); a quoted field ends in the line where it begins, or write JSON lines"
        raise text.refusal(unit, offset, why) from None


@functools.lru_cache(maxsize=1024)
def _header(path, kind):
    unit = text.cut([path], unit_bytes=1 << 40)[0]
    for line, offset, _ in text.lines(unit):
        return tuple(_split(line, kind, unit, offset))
    return ()


def _records(unit, reading):
    of_text, of_pair, of_label = reading.named("jsonl")
    for line, offset, position in text.lines(unit):
        if not line or line.isspace():
            continue
        found = text.json_object(line, unit, offset)
        if reading.kind == "turns":
            yield Example(*turns.read(found, reading, unit, offset), offset), position
            continue
        if reading.kind == "span":
            usual = f"{os.path.basename(unit.path)}:{offset}"
            yield Example(*squad.read(found, reading, unit, offset, usual), offset), position
            continue
        label = (text.string_field if reading.kind == "text" else text.field)(found, of_label, unit, offset)
        pair = None if of_pair is None else text.string_field(found, of_pair, unit, offset)
        if reading.kind == "tags":
            words = text.field(found, of_text, unit, offset)
            if not _all_words(words) or not isinstance(label, list):
                raise text.refusal(unit, offset, f'"{of_text}" and "{of_label}" are not lists of words and tags')
            if len(words) != len(label):
                raise text.refusal(unit, offset, f"{len(words)} words and {len(label)} tags")
        else:
            words = text.string_field(found, of_text, unit, offset)
        yield Example(words, pair, label, offset), position


def _all_words(value):
    return isinstance(value, list) and all(isinstance(word, str) for word in value)
