"""Examples in shards belong to one unit each, wherever it begins, and come with all of their documents."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from hpcllm.errors import DataError
from hpcllm.rows import Prepared


class Documents:
    """Stands for data.documents.Documents: document `number` is the one token `number`, as often as it is long."""

    def __init__(self, lengths):
        """lengths: of the documents of each example."""
        every = [length for documents in lengths for length in documents]
        self.begins = np.cumsum([0, *every])
        self.borders = np.cumsum([0, *map(len, lengths)])
        how = {"folder": "some/folder", "digest": "d1", "paths": ["some/folder/a.h5"], "token_count": sum(every)}
        self.stream = SimpleNamespace(**how)

    def __len__(self):
        return len(self.begins) - 1

    def rows(self, numbers):
        for number in numbers.tolist():
            yield [number] * int(self.begins[number + 1] - self.begins[number]), {}


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=30), st.integers(1, 400))
def test_every_example_is_in_one_unit_with_all_its_documents(lengths, step):
    documents = Documents(lengths)
    source = Prepared(documents, lambda found, first, _: ({"first": first}, [ids for ids, _ in found]))
    units = source.cut(MPI.COMM_SELF, None, step)
    assert sum(unit.size for unit in units) == 4 * documents.stream.token_count and all(unit.size for unit in units)
    assert all(unit.size < step + 4 * sum(lengths[unit.end - 1]) for unit in units)
    rows = [row for unit in units for row in source.reader().rows(unit)]
    assert [row.offset for row in rows] == list(range(len(lengths)))
    assert [row.fields["first"] for row in rows] == documents.borders[:-1].tolist()
    assert [[len(ids) for ids in row.documents] for row in rows] == lengths
    assert [ids[0] for row in rows for ids in row.documents] == list(range(len(documents)))


def test_an_example_is_named_where_it_is_refused_and_none_is_an_error():
    source = Prepared(Documents([[3], [2, 2]]), lambda found, first, _: ({}, found))
    files, step, said = source.plan()
    assert files == [("some/folder/a.h5", "shards")] and step == 16 << 10
    assert said["input 1"].endswith("some/folder: shards of digest d1")
    [unit] = source.cut(MPI.COMM_SELF, None, step)
    assert str(source.rows(unit)[1].refusal("too long")) == "input: some/folder example 2: too long"
    with pytest.raises(DataError, match="there is no example in some/folder"):
        Prepared(Documents([]), None).plan()
