"""Labels as numbers: which there are, in which order, and what an example's become. Decided from the training examples.

Kinds of labels, by the run file's task and `prepare`'s options:

    single      one name of several a text
    multi       any of several names a text
    value       a number a text (regression)
    tags        one name of several a word; entities in any scheme (IOB1, IOB2, BIOES, ...) become IOB2
    span        where in a text the answer to a question stands, if it has one
    text        another text (its translation, summary, answer, ...)
    turns       who says each turn of a dialogue
"""

import functools
import re
from dataclasses import dataclass

import numpy as np

from ..errors import DataError, UsageError
from ..files import failing_as_io
from ..metrics.tags import spans
from ..mpi import together
from . import labelled, text

KINDS = ("single", "multi", "value", "tags", "span", "text", "turns")
WITHOUT_NAMES = ("value", "span", "text", "turns")
OUTSIDE = "O"


@dataclass(frozen=True)
class Labels:
    """kind: of KINDS; names: in the order of their numbers, of WITHOUT_NAMES none; separator: between names in a
    table's column ("multi"); chunks: tags are of entities and their parts."""

    kind: str
    names: tuple
    separator: str = ","
    chunks: bool = False

    def numbers(self, example, unit):
        """What a column holds of an example: a number, or one for each word or name. Raises DataError, by line.

        Of kinds whose labels are no numbers the label as it was read.
        """
        if self.kind == "value":
            return _value(example, unit)
        if self.kind in WITHOUT_NAMES:
            return example.label
        names = named(self.kind, example, unit, self.separator)
        if self.chunks:
            _require_chunks(names, unit, example.offset)
            names = to_iob2(names)
        unknown = [name for name in names if name not in self._places]
        if unknown:
            shown = ", ".join(self.names[:12]) + (", ..." if len(self.names) > 12 else "")
            why = f'the label "{unknown[0]}" is none of the {len(self.names)} of the training examples ({shown}); '
            raise text.refusal(unit, example.offset, why + "name all of them: --labels")
        if self.kind == "multi":
            return [name in names for name in self.names]
        numbers = [self._places[name] for name in names]
        return numbers if self.kind == "tags" else numbers[0]

    @functools.cached_property
    def _places(self):
        return {name: number for number, name in enumerate(self.names)}


def in_words(meaning, numbers):
    """The label of an example again, of what a column holds of it: a name, a list of names, or a value.

    meaning: what a manifest says of the labels; numbers: as of `Labels.numbers`, an array.
    """
    if meaning["kind"] == "value":
        return float(str(numbers[0]))  # the shortest that is this fp32
    if meaning["kind"] == "multi":
        numbers = np.flatnonzero(numbers)
    names = [meaning["names"][number] for number in numbers.tolist()]
    return names[0] if meaning["kind"] == "single" else names


def named(kind, example, unit, separator=","):
    """The names of an example's labels, as written: a list. Raises DataError, by line."""
    label = example.label
    if kind == "tags" or (kind == "multi" and isinstance(label, list)):
        found = [_name(one) for one in label]
    elif kind == "multi":
        found = [name.strip() for name in str(label).split(separator) if name.strip()]
    else:
        found = [_name(label)]
    if None in found or (kind == "multi" and len(set(found)) < len(found)):
        raise text.refusal(unit, example.offset, f"{label!r} is no label" if None in found else f"{label!r}: twice")
    return found


def _name(label):
    """A label's name: text, or a whole number or truth value of JSON as it is written; None for anything else."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int):
        return str(label)
    return label.strip() or None if isinstance(label, str) else None


_LARGEST = 3.4028234e38  # of fp32, as which values are kept


def _value(example, unit):
    try:
        value = float(example.label)
        if isinstance(example.label, bool) or not abs(value) <= _LARGEST:
            raise ValueError
        return value
    except (TypeError, ValueError):
        raise text.refusal(unit, example.offset, f"{example.label!r} is not a number") from None


def to_iob2(tags):
    """Tags of one sentence in any scheme of chunks, in IOB2: entities are those that conlleval sees."""
    made = [OUTSIDE] * len(tags)
    for kind, begin, end in spans(tags):
        made[begin:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - begin - 1)]
    return made


def _require_chunks(tags, unit, offset):
    for tag in tags:
        if not is_chunk(tag):
            why = f'the tag "{tag}" is neither {OUTSIDE} nor a part of an entity, such as B-{tag}, as other tags are'
            raise text.refusal(unit, offset, why)


def is_chunk(tag):
    return tag == OUTSIDE or re.fullmatch(r"[BIESLUM]-.+", tag) is not None


def find(comm, kind, units, reading, separator, given):
    """The Labels of the examples in `units` (this rank's part of the training data). Collective.

    given: all names in their order, None: those that occur, names of numbers by value and others by code point, "O"
    first. Raises DataError where there are none, UsageError where `given` does not suit.
    """
    if kind in WITHOUT_NAMES:
        return Labels(kind, ())
    if given is not None and len(set(given)) < len(given):
        raise UsageError("labels: a name is given twice").known_to_all()
    mine = dict.fromkeys(given or ())  # name: where it was first
    with together(comm):
        for unit in units if given is None else ():
            with failing_as_io(unit.path):
                for example, _ in labelled.examples(unit, reading):
                    for name in named(kind, example, unit, separator):
                        mine.setdefault(name, (unit, example.offset))
    names = set().union(*comm.allgather(sorted(mine)))
    chunks = kind == "tags" and any(is_chunk(name) for name in names - {OUTSIDE})
    if given is None:
        with together(comm):
            for name, where in mine.items() if chunks else ():
                _require_chunks([name], *where)
    else:
        chunks = chunks and all(map(is_chunk, names))
    if not names:
        raise DataError("input: the training examples have no labels").known_to_all()
    if given is not None:
        return Labels(kind, tuple(given), separator, chunks)
    if chunks:
        kinds = sorted(name[2:] for name in names if name != OUTSIDE)
        names = {f"{prefix}-{kind}": None for kind in kinds for prefix in "BI"}
        return Labels(kind, (OUTSIDE, *names), separator, True)
    return Labels(kind, tuple(sorted(names, key=_order)), separator, False)


def _order(name):
    number = re.fullmatch(r"-?\d{1,15}", name)
    return (name != OUTSIDE, not number, int(name) if number else 0, name)
