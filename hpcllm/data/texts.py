"""What an evaluation needs beside tokens: a line of JSON for each example, in a file beside the shards.

The first document of an example has, as its column "text", how many bytes its line has and their CRC-32; the others
have zeros. So a line is found, and checked, by who needs it, and nobody reads all of them.
"""

import json
import os
import zlib

import numpy as np

from .. import files
from ..errors import DataError
from . import shards


def line(value):
    """(bytes, what the column "text" says of them)."""
    made = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    return made, (len(made), zlib.crc32(made))


class Texts:
    """The lines of a folder of shards, each read when it is needed."""

    def __init__(self, folder, column):
        """column: int64 [documents, 2], "text" of all documents."""
        self._path, self._column = os.path.join(folder, shards.TEXTS), column
        sizes = column[:, 0]
        self._begins = np.cumsum(sizes) - sizes
        self.firsts = np.flatnonzero(sizes)  # of each example its first document
        with files.failing_as_io(self._path):
            self._memory = np.memmap(self._path, np.uint8, "r")

    def of(self, document):
        """The value of the example that a document belongs to. Raises DataError for a damaged line."""
        first = self.firsts[self.firsts.searchsorted(document, "right") - 1]
        size, crc = self._column[first].tolist()
        begin = int(self._begins[first])
        content = self._memory[begin : begin + size].tobytes()
        if zlib.crc32(content) != crc:
            raise DataError(f"data: {self._path} is damaged within {size} bytes at {begin}: they have not their CRC-32")
        return json.loads(content)
