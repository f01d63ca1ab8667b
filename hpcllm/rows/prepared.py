"""Examples as rows: a folder of shards, as `hpcllm prepare --task` wrote it. Every rank maps them; nothing is encoded.

What is computed of an example, and what can be told again of it, says who asks.
"""

import itertools
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from ..mpi import together
from . import read

_TOKEN_BYTES = 4  # of text that a token is, about


class Unit(NamedTuple):
    """The examples [first, end), of about `size` bytes of text."""

    first: int
    end: int
    size: int


@dataclass(frozen=True, slots=True)
class Example:
    """fields: as of read.Row; documents: what is computed; offset: number of the example in `folder`, from 0."""

    fields: dict
    documents: list
    folder: str
    offset: int

    def refusal(self, why):
        """A DataError (exit 65) to raise for this example."""
        return DataError(f"input: {self.folder} example {self.offset + 1}: {why}")


class Prepared:
    """An input of `answer_all`, and its reader."""

    def __init__(self, documents, example):
        """documents: data.documents.Documents, opened on every rank; example: as of questions.question.Question."""
        self._documents, self._example, self._stream = documents, example, documents.stream

    def plan(self):
        """([(path, format)], bytes of a unit, what of the input decides the answers: {name: str}). Root only."""
        folder, digest = self._stream.folder, self._stream.digest
        if not len(self._documents):
            raise DataError(f"input: there is no example in {folder}")
        said = {"input 1": f"{os.path.abspath(folder)}: shards of digest {digest}"}
        size = read.unit_size(self._stream.token_count * _TOKEN_BYTES)
        return [(path, "shards") for path in self._stream.paths], size, said

    def require_same(self):
        """Shards tell by themselves."""

    def cut(self, comm, files, step):
        """The units, in order, on every rank: each the examples that begin in `step` bytes, none without any."""
        with together(comm):  # here each rank opens all shards
            places = self._documents.begins[self._documents.borders] * _TOKEN_BYTES
        firsts = np.flatnonzero(np.diff(places[:-1] // step, prepend=-1))
        ends = np.append(firsts[1:], len(places) - 1)
        sizes = places[ends] - places[firsts]
        return [Unit(*one) for one in zip(firsts.tolist(), ends.tolist(), sizes.tolist(), strict=True)]

    def reader(self):
        return self

    def rows(self, unit):
        """The Examples of a unit. Raises DataError (65) for damaged shards."""
        borders, found = self._documents.borders[unit.first : unit.end + 1].tolist(), []
        for number, (begin, end) in enumerate(itertools.pairwise(borders), unit.first):
            documents = list(self._documents.rows(np.arange(begin, end)))
            told = self._example(documents, begin, self._documents)
            found.append(Example(*told, self._stream.folder, number))
        return found

    def close(self):
        """Nothing stays open."""
