"""Fixtures of the tests of the data path."""

import gzip

import numpy as np
import pytest
from small_inputs import lines, write_shards


@pytest.fixture
def three_shards(tmp_path):
    """Shards of 700000, 5 and 1500 tokens, ids counting upwards below 1000; the first has two blocks."""
    rng = np.random.default_rng(0)
    parts = []
    for count in (700_000, 5, 1500):
        ids = rng.integers(0, 1000, count)
        parts.append([ids[: count // 2], ids[count // 2 :]])
    return write_shards(tmp_path / "data", parts)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of two plain files and a .gz (about 400 kB, several units of work) and what they hold, in order."""
    folder = tmp_path_factory.mktemp("texts")
    held = [lines(900, 1), lines(700, 2), lines(500, 3)]
    (folder / "a.txt").write_text("\n".join(held[0]) + "\n")
    (folder / "b.txt").write_text("\r\n".join(held[1]))  # no newline at the end
    with gzip.open(folder / "c.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(held[2]) + "\n")
    return folder, [line for each in held for line in each if line]
