"""Tags that mark entities in a sentence: the schemes IOB1, IOB2 and BIOES, and how to read and write them.

A tag is "O" (outside) or a letter, "-" and the entity's type, which may contain "-"; a letter alone is of type "_".
IOB1 (Ramshaw and Marcus 1995): I- on every token, B- only where an entity follows another of its type directly. IOB2,
also called BIO: B- on the first token of every entity, I- on the rest. BIOES, also called IOBES: B-, I-, E- (end), and
S- for an entity of one token; BILOU writes L and U for E and S, BMES writes M for I.
"""

import functools

from ..errors import DataError

# The letters of each scheme, and what they mean in the letters of BIOES. `scheme` prefers those before.
SCHEMES = {
    "IOB2": {"O": "O", "B": "B", "I": "I"},
    "BIOES": {"O": "O", "B": "B", "I": "I", "E": "E", "S": "S"},
    "BILOU": {"O": "O", "B": "B", "I": "I", "L": "E", "U": "S"},
    "BMES": {"O": "O", "B": "B", "M": "I", "E": "E", "S": "S"},
    "IOB1": {"O": "O", "B": "B", "I": "I"},
}
ALIASES = {"BIO": "IOB2", "IOBES": "BIOES"}
_MEANING = {letter: meaning for letters in SCHEMES.values() for letter, meaning in letters.items()}
_LETTERS = [letter for letter in _MEANING if letter != "O"]
_OUTSIDE = ("O", "")  # an "O" as letter and type, and what is on either side of a sentence


def named(scheme):
    """The scheme's name in SCHEMES, from it or an alias in any case; DataError for another."""
    name = ALIASES.get(scheme.upper(), scheme.upper())
    if name not in SCHEMES:
        raise DataError(f"{scheme!r} is not a scheme of tags; known are {', '.join([*SCHEMES, *ALIASES])}")
    return name


@functools.cache
def split(tag):
    """Letter as it is written, and type; DataError for what is no tag."""
    letter, _, kind = tag.partition("-")
    if tag != "O" and letter not in _LETTERS:
        raise DataError(f"{tag!r} is not a tag; tags are O and, as B-PER, one of {', '.join(_LETTERS)} with a type")
    return letter, "" if tag == "O" else kind or "_"


@functools.cache
def _meant(tag):
    """Letter in those of BIOES, and type."""
    letter, kind = split(tag)
    return _MEANING[letter], kind


def _continues(before, tag):
    """True where a tag, as (letter, type), goes on with the entity of the tag before it."""
    return tag[0] in "IE" and before[0] in "BI" and before[1] == tag[1]


def _follows(scheme, before, tag):
    """True where `scheme` lets `tag` come after the tag `before`."""
    if scheme == "IOB1":
        return tag[0] != "B" or before[1] == tag[1]
    if scheme == "IOB2":
        return tag[0] != "I" or _continues(before, tag)
    # An entity that has begun goes on until its end, and nothing else does.
    return _continues(before, tag) or not (before[0] in "BI" or tag[0] in "IE")


def scheme(sentences, schemes=tuple(SCHEMES)):
    """The name of the scheme that sequences of tags follow: the first of `schemes` that no tag breaks.

    In the order of SCHEMES: IOB2 unless an I- begins an entity or a letter is not its own; tags that are all "O" are
    IOB2, S- and O alone are BIOES. Every tag strikes out the schemes that it breaks, and the first that leaves none is
    the one a DataError names.
    """
    left = list(schemes)
    for number, tags in enumerate(sentences):
        before = _OUTSIDE
        for place, tag in enumerate([*tags, "O"]):
            (letter, _), now = split(tag), _meant(tag)
            fitting = [name for name in left if letter in SCHEMES[name] and _follows(name, before, now)]
            if not fitting:
                end = place == len(tags)
                what = f"the end after {tags[-1]!r}" if end else f"{tag!r}{f' after {tags[place - 1]!r}' * (place > 0)}"
                raise DataError(f"sentence {number}, tag {place} (from 0): {what} does not fit {' or '.join(left)}")
            left, before = fitting, now
    return left[0]


def spans(tags):
    """The entities of one sentence as conlleval reads them, whatever the scheme: [(type, start, end)], end exclusive.

    Lenient (Tjong Kim Sang and Buchholz 2000): an I or E that nothing of its type precedes begins an entity, and an
    entity ends where another tag does not go on with it. seqeval reads the same by default, S, which conlleval does not
    know, being an entity of one token.
    """
    found, start, before = [], 0, _OUTSIDE
    for place, tag in enumerate([*tags, "O"]):
        now = _meant(tag)
        if not _continues(before, now):
            if before != _OUTSIDE:
                found.append((before[1], start, place))
            start = place
        before = now
    return found


def strict_spans(tags, scheme):
    """As `spans`, but only entities that begin, and in BIOES end, as `scheme` says; seqeval's mode="strict".

    IOB1 has no broken entities, so it is read as `spans` does.
    """
    letters = [_meant(tag)[0] for tag in tags]
    first, last = {"IOB1": ("BIES", "BIES"), "IOB2": ("B", "BI")}.get(named(scheme), ("BS", "ES"))
    return [span for span in spans(tags) if letters[span[1]] in first and letters[span[2] - 1] in last]


def convert(tags, source, target):
    """The tags of one sentence written in the scheme `target`; DataError where they do not follow `source`."""
    scheme([tags], [named(source)])
    target = named(target)
    written = {meaning: letter for letter, meaning in SCHEMES[target].items()}
    converted, before = ["O"] * len(tags), ("", 0, 0)
    for span in spans(tags):
        kind, start, end = span
        rest = end - start - 1
        if target == "IOB1":
            letters = ("B" if before[0] == kind and before[2] == start else "I") + "I" * rest
        elif target == "IOB2":
            letters = "B" + "I" * rest
        else:
            letters = "B" + "I" * (rest - 1) + "E" if rest else "S"
        converted[start:end] = [written[letter] if kind == "_" else f"{written[letter]}-{kind}" for letter in letters]
        before = span
    return converted
