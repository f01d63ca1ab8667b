"""Every row of the table of bad inputs holds."""

import pytest

from tests.faults import bad_input
from tests.faults.rows import ROWS, Place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("good"))


def test_the_table_is_complete():
    assert sorted(ROWS.keys() | bad_input.NOT_HERE.keys()) == list(range(1, bad_input.COUNT + 1))


@pytest.mark.parametrize("number", sorted(ROWS))
def test_row(place, number):
    what, holds, says = bad_input.told(place, number)
    assert holds, f"{what}: {says}"
