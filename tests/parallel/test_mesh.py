"""Which rank does what: arithmetic, without ranks."""

import itertools
from types import SimpleNamespace

import pytest

from hpcllm.errors import UsageError
from hpcllm.parallel import mesh


def parallel(tensor=1, pipeline=1, context=1, sharding="none"):
    return SimpleNamespace(tensor=tensor, pipeline=pipeline, context=context, sharding=sharding)


def hosts(count, each):
    return [f"n{host}" for host in range(count) for _ in range(each)]


def test_tensor_is_the_fastest_axis_and_places_are_a_product():
    made = mesh.layout(parallel(tensor=2, pipeline=3), hosts(3, 4))
    assert (made.data, made.size) == (2, 12)
    places = [made.place(rank) for rank in range(12)]
    assert [place["tensor"] for place in places] == [0, 1] * 6
    assert [place["pipeline"] for place in places] == [0, 0, 1, 1, 2, 2] * 2
    assert [place["data"] for place in places] == [0] * 6 + [1] * 6
    axes = ("data", "pipeline", "tensor")
    assert {tuple(place[axis] for axis in axes) for place in places} == set(
        itertools.product(range(2), range(3), range(2))
    )


@pytest.mark.parametrize(
    ("sharding", "replicate", "shard"),
    [("none", 8, 1), ("optimizer", 1, 8), ("gradients", 1, 8), ("full", 1, 8), ("hybrid", 2, 4)],
)
def test_the_data_axis_is_replicas_of_shards(sharding, replicate, shard):
    made = mesh.layout(parallel(sharding=sharding), hosts(2, 4))
    assert (made.replicate, made.shard) == (replicate, shard)
    made = mesh.layout(parallel(sharding=sharding, tensor=2), hosts(2, 4))
    assert made.data == 4 and made.shard == shard // 2 + (shard == 1)


def test_hybrid_shards_stay_inside_a_host():
    made = mesh.layout(parallel(sharding="hybrid", tensor=2), hosts(3, 4))
    names = hosts(3, 4)
    shards = {}
    for rank in range(12):
        place = made.place(rank)
        shards.setdefault((place["replicate"], place["tensor"]), set()).add(names[rank])
    assert all(len(found) == 1 for found in shards.values())


@pytest.mark.parametrize("names", [["a", "a", "b"], ["a"] * 3 + ["b"] * 3, ["a", "b"] * 2])
def test_hosts_that_cannot_hold_shards_alike_are_refused(names):
    with pytest.raises(UsageError, match='sharding = "hybrid" keeps shards inside a host'):
        mesh.layout(parallel(sharding="hybrid", tensor=2 if len(names) % 2 == 0 else 1), names)


def test_hosts_dealt_out_in_turn_are_refused_and_not_left_unsharded():
    with pytest.raises(UsageError, match='sharding = "hybrid" keeps shards inside a host'):
        mesh.layout(parallel(sharding="hybrid"), ["a", "b", "a", "b"])


def test_the_picture_names_every_rank_and_what_crosses_hosts():
    text = mesh.picture(mesh.layout(parallel(tensor=2, sharding="full"), hosts(2, 2)), hosts(2, 2))
    assert text.splitlines() == [
        "4 ranks = data 2 x tensor 2, model sharded over 2",
        "n0",
        "  rank 0    data 0  tensor 0",
        "  rank 1    data 0  tensor 1",
        "n1",
        "  rank 2    data 1  tensor 0",
        "  rank 3    data 1  tensor 1",
        "between hosts: data",
    ]
    text = mesh.picture(mesh.layout(parallel(tensor=4), hosts(2, 2)), hosts(2, 2))
    assert text.endswith("between hosts: tensor")
    assert mesh.picture(mesh.layout(parallel(), ["n0"]), ["n0"]).startswith("1 ranks = one rank\nn0\n")
