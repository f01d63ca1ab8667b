"""The manifest of a folder of shards: what `hpcllm prepare` wrote there, and whether it says so itself.

`shards` has the format. A manifest is believed when its digest fits and everything in it is of the kind that a reader
counts on; one that was made to deceive is refused like one that was cut.
"""

import hashlib
import json
import os
from dataclasses import dataclass

import numpy as np

from ..errors import DataError, MissingInput
from ..files import sync_folder

FORMAT = "hpcllm tokens"
VERSION = 1
MANIFEST = "manifest.json"
TEXTS = "texts.jsonl"
_LIMIT_BYTES = 1 << 28  # of a million shards
_OF_SHARD = ("size_bytes", "token_count", "document_count", "highest_id", "tokens_offset", "tokens_bytes")
_OF_SHARD += ("crc32_without_tokens",)
_OF_FOLDER = ("vocab_size", "separator_id", "highest_id", "token_count", "document_count")


@dataclass(frozen=True)
class Column:
    """`width` numbers of type `dtype` (as numpy spells it), `of` each "document" or each "token"."""

    name: str
    of: str
    dtype: str
    width: int = 1

    @property
    def label(self):
        return f"columns/{self.name}"

    @property
    def row_bytes(self):
        return np.dtype(self.dtype).itemsize * self.width

    def shape(self, token_count, document_count):
        return (document_count if self.of == "document" else token_count), self.width


def columns_of(labelled):
    """The columns that a manifest's "labelled" speaks of: a list of Column; None has none."""
    return [Column(**column) for column in labelled["columns"]] if labelled else []


def token_dtype(vocab_size):
    """The smallest of uint16 and uint32 that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def as_json(value):
    return json.dumps(value, sort_keys=True)


def digest(manifest):
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(as_json(content).encode()).hexdigest()


def totals(entries):
    """What a manifest says of all its shards together."""
    return {
        "highest_id": max(shard["highest_id"] for shard in entries),
        "token_count": sum(shard["token_count"] for shard in entries),
        "document_count": sum(shard["document_count"] for shard in entries),
    }


def write_manifest(folder, entries, *, vocab_size, separator_id, tokenizer_hash, labelled=None):
    """Write `folder`/manifest.json, atomically and last of all; returns what it holds. `entries` in shard order."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": token_dtype(vocab_size).name,
        "vocab_size": vocab_size,
        "separator_id": separator_id,
        "tokenizer_hash": tokenizer_hash,
        **totals(entries),
        "shards": entries,
    }
    if labelled is not None:
        manifest["labelled"] = labelled
    manifest["digest"] = digest(manifest)
    path = os.path.join(folder, MANIFEST)
    with open(path + ".partial", "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".partial", path)
    sync_folder(folder)
    return manifest


def read_manifest(folder):
    """The manifest of `folder`, checked. Raises MissingInput (66) or DataError (65)."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.isdir(folder):
        raise MissingInput(f"data: there is no folder {folder}")
    if not os.path.isfile(path):
        raise MissingInput(
            f"data: {folder} has no {MANIFEST}, so `hpcllm prepare` did not finish it or did not write it"
        )
    manifest = _parsed(path)
    names = [shard["name"] for shard in manifest["shards"]]
    missing = [label for label in names if not os.path.isfile(os.path.join(folder, label))]
    if missing:
        listed = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise MissingInput(f"data: {len(missing)} of the {len(names)} shards of {folder} are missing: {listed}")
    _check_texts(os.path.join(folder, TEXTS), manifest.get("labelled"))
    if manifest["highest_id"] >= manifest["vocab_size"]:
        raise DataError(
            f"data: {folder} holds the id {manifest['highest_id']}, its vocabulary has {manifest['vocab_size']} entries"
        )
    return manifest


def without(manifest, names):
    """The manifest of the same folder without some of its shards: of another digest, since it is other data."""
    entries = [shard for shard in manifest["shards"] if shard["name"] not in names]
    reduced = {**manifest, **totals(entries), "shards": entries}
    return {**reduced, "digest": digest(reduced)}


def _parsed(path):
    """The manifest in the file `path`, of our format, with the digest of its content and values of the right kind."""
    try:
        with open(path, "rb") as file:
            content = file.read(_LIMIT_BYTES + 1)
        if len(content) > _LIMIT_BYTES:
            raise DataError(f"data: {path} is larger than {_LIMIT_BYTES >> 20} MiB, which no manifest is")
        manifest = json.loads(content.decode("utf-8"))
        version = (manifest["format"], manifest["version"])
        if version != (FORMAT, VERSION):
            raise DataError(
                f"data: {path} is {version[0]!r} version {version[1]}, this program reads {FORMAT!r} {VERSION}"
            )
        if manifest["digest"] != digest(manifest):
            raise DataError(f"data: {path} was changed after it was written (its digest does not fit its content)")
        odd = _odd(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"data: {path} is not a manifest of shards ({type(error).__name__}: {error})") from None
    if odd:
        raise DataError(f"data: {path} is not a manifest of shards ({odd})")
    return manifest


def _odd(manifest):
    """What no manifest of ours would say, in words; None where there is nothing. KeyError for what is missing."""
    for key in _OF_FOLDER:
        if not _counts(manifest[key]):
            return f"{key} is {manifest[key]!r}"
    if not 1 <= manifest["vocab_size"] <= 1 << 32 or manifest["separator_id"] >= manifest["vocab_size"]:
        return f"separator_id {manifest['separator_id']} of a vocabulary of {manifest['vocab_size']}"
    dtype = token_dtype(manifest["vocab_size"])
    if manifest["dtype"] != dtype.name or not isinstance(manifest["tokenizer_hash"], str):
        return f"dtype {manifest['dtype']!r}, tokenizer_hash {manifest['tokenizer_hash']!r}"
    entries, names = manifest["shards"], set()
    if not isinstance(entries, list) or not entries:
        return "there are no shards"
    for entry in entries:
        name = entry["name"]
        if not isinstance(name, str) or name in names or os.path.basename(name) != name or name in ("", ".", ".."):
            return f"a shard is called {name!r}"
        names.add(name)
        for key in _OF_SHARD:
            if not _counts(entry[key]):
                return f"{key} of {name} is {entry[key]!r}"
        if not entry["token_count"]:
            return f"{name} has no tokens"
        if entry["tokens_offset"] + entry["tokens_bytes"] > entry["size_bytes"]:
            return f"the tokens of {name} reach beyond its {entry['size_bytes']} bytes"
        if not isinstance(entry["sha256"], str):
            return f"sha256 of {name} is {entry['sha256']!r}"
    for key, value in totals(entries).items():
        if manifest[key] != value:
            return f"{key} is {manifest[key]}, of its shards {value}"
    return _odd_columns(manifest["labelled"]) if "labelled" in manifest else None


def _odd_columns(labelled):
    for column in columns_of(labelled):
        if not isinstance(column.name, str) or not column.name or "/" in column.name:
            return f"a column is called {column.name!r}"
        if column.of not in ("document", "token") or np.dtype(column.dtype).kind not in "iuf":
            return f"column {column.name} has {column.dtype!r} of each {column.of!r}"
        if not _counts(column.width) or not column.width:
            return f"column {column.name} has a width of {column.width!r}"
    return None


def _counts(value):
    """True for a whole number from 0 on that 63 bits hold."""
    return type(value) is int and 0 <= value < 1 << 63


def _check_texts(path, labelled):
    size = (labelled or {}).get("text_bytes")
    if size is None:
        return
    if not os.path.isfile(path):
        raise MissingInput(f"data: there is no {path}, which evaluations need")
    if os.path.getsize(path) != size:
        raise DataError(f"data: {path} has {os.path.getsize(path)} bytes, the manifest says {size}")
