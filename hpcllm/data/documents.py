"""Labelled data, document by document, from shards as `hpcllm prepare --task` wrote them. Which come together is the
business of `examples`, which trains, and of `rows`, which predicts."""

import bisect
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import files
from . import shards, texts


@dataclass(frozen=True)
class Documents:
    """The documents of a part; an example is one, or several where it was too long for one.

    stream: data.stream.TokenStream.
    """

    stream: Any

    @property
    def meaning(self):
        """What the manifest says of the labels: kind, names, ..."""
        return self.stream.labelled

    def __len__(self):
        return self.stream.document_count

    @functools.cached_property
    def _columns(self):
        return shards.columns_of(self.meaning)

    @functools.cached_property
    def _shards(self):
        """[(first document, first token, what is beside the tokens)] of each shard."""
        found, document, token = [], 0, 0
        for path in self.stream.paths:
            with files.failing_as_io(path):
                beside = files.patiently(shards.map_beside, path, self._columns)
            found.append((document, token, beside))
            offsets = beside["document_offsets"]
            document, token = document + len(offsets) - 1, token + int(offsets[-1])
        return found

    @functools.cached_property
    def begins(self):
        """Where each document begins in the stream, and the end, int64 [len + 1]."""
        parts = [token + np.asarray(beside["document_offsets"][:-1]) for _, token, beside in self._shards]
        return np.concatenate([*parts, [self.stream.token_count]])

    @functools.cached_property
    def borders(self):
        """Numbers of the documents with which examples begin, and of all documents, int64 [examples + 1]."""
        if self.meaning["kind"] == "tags":
            firsts = np.flatnonzero(self.column("continues")[:, 0] == 0)
        else:
            firsts = self.texts.firsts if self.meaning["kind"] == "span" else np.arange(len(self))
        return np.append(firsts, len(self))

    def lengths(self, numbers):
        """Tokens of the documents `numbers` (int64 [n]), int64 [n]."""
        return self.begins[numbers + 1] - self.begins[numbers]

    def column(self, name):
        """What column `name`, of documents, has for all of them: [len, width]."""
        return np.concatenate([beside[name] for *_, beside in self._shards])

    @functools.cached_property
    def texts(self):
        """What the examples were before they were tokens (data.texts.Texts), of kinds of labels that keep it."""
        return texts.Texts(self.stream.folder, self.column("text"))

    def rows(self, numbers):
        """Yield (tokens, {column: its rows}) of each of the documents `numbers`."""
        firsts = [document for document, *_ in self._shards]
        for number in numbers.tolist():
            begin, end = self.begins[number : number + 2].tolist()
            document, token, shard = self._shards[bisect.bisect_right(firsts, number) - 1]
            tokens, row = slice(begin - token, end - token), number - document
            beside = {
                c.name: shard[c.name][tokens, 0] if c.of == "token" else shard[c.name][row] for c in self._columns
            }
            yield self.stream.gather(np.array([begin]), end - begin)[0], beside
