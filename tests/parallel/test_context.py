"""Parts of sequences on other ranks: the same model in the end, against one process."""

import models
import pytest
from test_layouts import SIZE, check_weights, largest_difference, place, train

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(SIZE % 2 > 0, reason="needs ranks in pairs")]
LAYOUTS = [
    how
    for how in (
        {"context": 2},
        {"context": 4},
        {"context": 2, "tensor": 2},
        {"context": 2, "pipeline": 2},
        {"context": 2, "pipeline": 2, "pipeline_schedule": "zero_bubble"},
        *({"context": 2, "sharding": sharding} for sharding in ("optimizer", "gradients", "full")),
        {"context": 2, "tensor": 2, "sharding": "full"},
        {"context": 2, "pipeline": 2, "sharding": "full"},
    )
    if SIZE % (how["context"] * how.get("tensor", 1) * how.get("pipeline", 1)) == 0
]


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_sequences_that_ranks_share_out_give_the_same(world, family, how):
    expected, weights = models.train_alone(family)
    placed = place(world, models.build(family), **how)
    off = largest_difference(train(placed), expected)
    print(family, how, off)
    assert off < 1e-5
    check_weights(placed, weights)
