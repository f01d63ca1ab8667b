"""Small inputs for the tests of the data path: made-up text, and folders of shards made without a tokenizer."""

import os
import random

import numpy as np

from hpcllm.data import shards
from hpcllm.files import write_at

HASH = "0123456789abcdef" * 4


def write_shards(folder, parts, vocab_size=1000):
    """Make a finished folder of shards; parts: per shard, a list of documents, each a list of ids."""
    folder.mkdir()
    facts = {"vocab_size": vocab_size, "separator_id": 3, "tokenizer_hash": HASH}
    dtype, entries = shards.token_dtype(vocab_size), []
    for index, documents in enumerate(parts):
        path = os.fspath(folder / shards.name(index))
        tokens = np.concatenate([np.asarray(document) for document in documents]).astype(dtype)
        borders = np.cumsum([0, *map(len, documents)]).astype(np.int64)
        places = shards.create(path, token_count=len(tokens), document_count=len(documents), **facts)
        with open(path, "r+b") as file:
            write_at(file.fileno(), tokens, places["tokens"])
            write_at(file.fileno(), borders, places["document_offsets"])
        blocks = -(-tokens.nbytes // shards.BLOCK_BYTES)
        entries.append(shards.finish(path, *shards.scan(path, places["tokens"], dtype, len(tokens), 0, blocks)))
    shards.write_manifest(os.fspath(folder), entries, **facts)
    return folder


def rewrite_manifest(folder, **changes):
    """Make the manifest fit the files as they are now, but for `changes` of the first shard's entry."""
    path = folder / shards.MANIFEST
    manifest = shards.read_manifest(os.fspath(folder))
    entries = [shards.entry(os.fspath(folder / shard["name"])) for shard in manifest["shards"]]
    entries[0].update(changes)
    path.unlink()
    keys = ("vocab_size", "separator_id", "tokenizer_hash")
    shards.write_manifest(os.fspath(folder), entries, **{key: manifest[key] for key in keys})


TEXT = "the of rank shard token world every file reads writes maps a block in order Ωmega naïve été 東京 and"
WORDS = TEXT.split()


def lines(count, seed):
    """`count` lines of made-up text, some of them blank, all others different."""
    rng = random.Random(seed)
    out = []
    for index in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.randrange(0, 60))]
        out.append(" ".join([f"{index}:", *words]) if index % 17 else "")
    return out
