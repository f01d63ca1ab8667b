"""Every operation of torch.distributed, with every dtype, sync and async, is right or refused by name."""

import collections

import coverage
import pytest
import torch
from operations import Operation

pytestmark = [
    pytest.mark.mpi(min_size=2, max_size=3),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_every_operation_and_dtype_is_right_or_refused_by_design(world):
    outcomes, complaints = coverage.measure(world)
    assert not complaints
    counts = collections.Counter(outcomes.values())
    assert counts[coverage.WRONG] == counts[coverage.FAILED] == 0
    assert counts[coverage.RIGHT] > 1600


def test_a_wrong_answer_and_an_unexpected_error_are_counted_as_such(world):
    last = world.size - 1

    def off_by_one(attempt):
        return [(torch.tensor([1 if attempt.rank == last else 0]), torch.tensor([0]))]

    def fails(attempt):
        if attempt.rank == last:
            raise ZeroDivisionError("by zero")
        return []

    operations = [
        Operation("wrong", off_by_one, dtypes=(None,), modes=(False,)),
        Operation("fails", fails, dtypes=(None,), modes=(False,)),
    ]
    outcomes, complaints = coverage.measure(world, operations)
    assert list(outcomes.values()) == [coverage.WRONG, coverage.FAILED]
    assert complaints == [
        f"wrong, None, sync: wrong instead of right (rank {last}: tensor([1]) instead of tensor([0]))",
        f"fails, None, sync: failed instead of right (rank {last}: ZeroDivisionError: by zero)",
    ]
    assert "**WRONG**" in "\n".join(coverage.table(outcomes))
