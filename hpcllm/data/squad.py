"""Questions whose answers stand in a text: files of SQuAD, and lines of JSON with a question each.

A file of SQuAD is one JSON object, {"data": [article, ...]}. Where its articles begin is known only to who has read all
before; that pass looks at strings and brackets alone. Units are cut between articles, and parsed one article at a time.
A .gz file is one unit.
"""

import contextlib
import gzip
import hashlib
import json
import os
import re
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from ..files import failing_as_io
from ..mpi import together
from . import text

_READ_BYTES = 1 << 20
# Strings whole, so that no bracket in them counts; "closed" is empty where more must be read to see a string's end.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?P<closed>"?)|[\[\]{}]', re.DOTALL)
_DATA = b'"data"'


class Asked(NamedTuple):
    """name: the question's id; own: whether the input says it; answers: [(text, its first character in the context)],
    none where the context has no answer."""

    name: Any
    own: bool
    answers: list

    @property
    def key(self):
        """64 bits that stand for the name."""
        return int.from_bytes(hashlib.blake2b(str(self.name).encode(), digest_size=8).digest(), "little")


def cut(paths, unit_bytes=None):
    """The units (text.Unit) of the files of SQuAD at `paths`, in order. Raises DataError for what is none."""
    unit_bytes = unit_bytes or text.unit_size(sum(map(os.path.getsize, paths)))
    units = []
    for path in paths:
        size = os.path.getsize(path)
        whole = text.Unit(path, 0, size, size)
        if whole.compressed:
            units.append(whole)
            continue
        start = end = None
        with failing_as_io(path), open(path, "rb") as file:
            for begin, end in _articles(_tokens(file), whole):
                start = begin if start is None else start
                if end - start >= unit_bytes:
                    units.append(text.Unit(path, start, end, size))
                    start = None
        if end is None:
            raise DataError(f'input: {path}: its list "data" is empty')
        if start is not None:
            units.append(text.Unit(path, start, end, size))
    return units


def questions(unit, reading):
    """Yield (what `read` says of a question, byte offset of its article, bytes of the unit consumed).

    Elements of the list "data" may be questions themselves, as in lines of JSON.
    """
    of_text, *_ = reading.named("squad")
    file = os.path.basename(unit.path)
    for article, begin, position in _parsed(unit):
        if "paragraphs" not in article:
            yield read(article, reading, unit, begin, f"{file}:{begin}"), begin, position
            continue
        number, title = 0, article.get("title", "")
        for paragraph in _dicts(article, "paragraphs", title, unit, begin):
            for record in _dicts(paragraph, "qas", title, unit, begin):
                number += 1
                context = {name: paragraph[name] for name in (of_text,) if name in paragraph}
                usual = f"{file}:{begin}:{number}"
                yield read({**record, **context}, reading, unit, begin, usual), begin, position


def read(record, reading, unit, offset, usual):
    """(context, question, Asked) of a question in JSON: {"id", "context", "question", "answers"}.

    reading: labelled.Reading, which names the fields; usual: the name of a question without "id". Answers are a list of
    {"text", "answer_start"}, or {"text": [...], "answer_start": [...]}. Raises DataError, by file, line and name.
    """
    of_text, of_pair, of_label = reading.named("jsonl")
    own = record.get("id") is not None
    name = record["id"] if own else usual
    try:
        if own and (isinstance(text.field(record, "id", unit, offset), bool) or not isinstance(name, str | int)):
            raise text.refusal(unit, offset, 'its "id" is neither text nor a whole number')
        context, question = (text.string_field(record, field, unit, offset) for field in (of_text, of_pair))
        try:
            answers = _answers(text.field(record, of_label, unit, offset))
            if record.get("is_impossible") and answers:
                raise ValueError('there are some, and "is_impossible" is true')
        except ValueError as error:
            raise text.refusal(unit, offset, f'"{of_label}": {error}') from None
    except DataError as error:
        raise DataError(f'{error} (question "{name}")') from None
    return context, question, Asked(name, own, answers)


def _answers(value):
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError('"text" and "answer_start" are not two lists of the same length')
        found = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
        found = [(one.get("text"), one.get("answer_start")) for one in value]
    else:
        raise ValueError('neither a list of {"text", "answer_start"} nor {"text": [...], "answer_start": [...]}')
    for number, (said, start) in enumerate(found, 1):
        if not isinstance(said, str) or not isinstance(start, int) or isinstance(start, bool):
            raise ValueError(f'answer {number} has no "text" that is a string, or no whole number "answer_start"')
        if not said or said.isspace():
            raise ValueError(f"answer {number} is blank; a question without an answer has an empty list")
    return found


def refuse_twice(comm, keys, find):
    """Raise DataError where two questions have one name. Collective.

    keys: uint64 array of this rank's names; find(key): the [(name, path)] among this rank's that have it, which takes
    another pass over the input. A rank holds its part of all keys, by value.
    """
    dealt = comm.alltoall([keys[keys % np.uint64(comm.size) == rank] for rank in range(comm.size)])
    values, counts = np.unique(np.concatenate(dealt), return_counts=True)
    twice = values[counts > 1][:1].tolist()  # one will do
    for key in sorted(one for each in comm.allgather(twice) for one in each):
        found = []
        with together(comm):
            found = find(key)
        found = sorted(one for each in comm.allgather(found) for one in each)
        if len({name for name, _ in found}) < len(found):
            places = " and ".join(dict.fromkeys(path for _, path in found))
            raise DataError(f'input: there are {len(found)} questions "{found[0][0]}", in {places}').known_to_all()


# --- JSON, an article at a time ------------------------------------------------------------------------------------


def _tokens(file, offset=0, stop=None):
    """Yield (a string or a bracket of JSON, its offset) from where `file` stands, byte `offset`, to byte `stop`.

    Memory: the longest string.
    """
    rest = b""
    while piece := file.read(_READ_BYTES if stop is None else min(_READ_BYTES, stop - offset - len(rest))):
        rest += piece
        done = len(rest)
        for found in _TOKEN.finditer(rest):
            if found[0].startswith(b'"') and not found["closed"]:
                done = found.start()
                break
            yield found[0], offset + found.start()
        offset, rest = offset + done, rest[done:]


def _articles(tokens, unit, depth=0):
    """Yield (begin, end) of each element of the list "data", in bytes. depth: 2 where `tokens` begin within it."""
    outside, begin, key = depth, 0, None
    inside = known = depth == 2
    for token, at in tokens:
        if token.startswith(b'"'):
            key = token
        elif token in (b"{", b"["):
            if depth == 1:
                inside = token == b"[" and key == _DATA
                known = known or inside
            elif depth == 2 and inside:
                begin = at
            depth += 1
        else:
            depth -= 1
            if depth == 2 and inside:
                yield begin, at + 1
            if depth < 0:
                break
    if depth != outside:
        raise DataError(f"input: {unit.path} is not JSON: it ends within an object or a list, or ends one too many")
    if not known:
        raise DataError(
            f'input: {unit.path} has no list "data", as files of SQuAD have; of a question a line say --format jsonl'
        )


def _parsed(unit):
    """Yield (article, its byte offset, bytes of the unit consumed)."""
    with text.unzipping(unit.path), contextlib.ExitStack() as opened:
        ahead, raw = (opened.enter_context(open(unit.path, "rb")) for _ in range(2))
        scanned, file, stop, depth = ahead, raw, unit.stop, 2
        if unit.compressed:
            scanned, file = (opened.enter_context(gzip.GzipFile(fileobj=one)) for one in (ahead, raw))
            stop, depth = None, 0
        scanned.seek(unit.start)
        for begin, end in _articles(_tokens(scanned, unit.start, stop), unit, depth):
            file.seek(begin)
            content = text.decode(file.read(end - begin), unit, begin)
            yield _object(content, unit, begin), begin, min(raw.tell(), unit.stop) if stop is None else end - unit.start


def _object(content, unit, begin):
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        at = begin + len(content[: getattr(error, "pos", 0)].encode())
        raise text.refusal(unit, at, f"not JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(found, dict):
        raise text.refusal(unit, begin, "a list where an article was expected")
    return found


def _dicts(record, name, title, unit, offset):
    """The list of objects that `record`, of the article `title`, holds as `name`."""
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise text.refusal(unit, offset, f'the article "{title}" has no list of objects "{name}"')
    return value
