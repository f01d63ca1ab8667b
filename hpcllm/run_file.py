"""Run files as they are on the disk: TOML of bounded size, and `section.key=value` words of a command line.

What the sections and keys mean is `config`'s business. Everything that can be wrong with a file is a UsageError (2) or
MissingInput (66) that names it.
"""

import tomllib
from pathlib import Path

from .errors import MissingInput, UsageError

LIMIT_BYTES = 1 << 20
_LIMIT_DEPTH = 32  # sections within sections: more than any transformers configuration has
_OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"\x89HDF": "HDF5"}


def read(path):
    """The dict that the TOML file at `path` holds. A byte order mark of UTF-8 is no obstacle."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = file.read(LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise MissingInput(f"run file {path} does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"run file {path} is a folder; name the TOML file in it") from None
    except OSError as error:
        raise UsageError(f"run file {path} cannot be read: {error.strerror}") from None
    if len(content) > LIMIT_BYTES:
        raise UsageError(f"run file {path} is larger than {LIMIT_BYTES >> 20} MiB, which no run file is")
    if not content.strip():
        raise UsageError(f"run file {path} is empty")
    for mark, name in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise UsageError(f"run file {path} is {name}, not text in UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = content[: error.start].count(b"\n") + 1
        raise UsageError(f"run file {path} is not UTF-8: byte 0x{content[error.start]:02x} in line {place}") from None
    return parse(text, f"run file {path}")


def parse(text, what):
    """The dict of a TOML text; `what` begins the sentence of a UsageError."""
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"{what} is nested too deeply") from None
    except ValueError as error:  # also a number of more digits than Python turns into one
        raise UsageError(f"{what} is not TOML: {error}") from None
    if _depth(values) > _LIMIT_DEPTH:
        raise UsageError(f"{what} is nested too deeply: more than {_LIMIT_DEPTH} levels")
    return values


def word(text):
    """The value of the right side of `section.key=value`: TOML, or else the words themselves."""
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text  # a bare word is a string: run.output_dir=runs/a
    if list(values) != ["value"] or _depth(values) > _LIMIT_DEPTH:
        return text  # several lines, of which the first alone would count
    return values["value"]


def _depth(values):
    """How many dicts and lists lie in each other; level by level, since a deep one would exhaust the stack."""
    level, depth = [values], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
        depth += 1
    return depth
