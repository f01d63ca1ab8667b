"""Ranks that compute more slowly than others are named, by how much, once."""

import json
import statistics
import time

import pytest
from test_train import settings, shared

from hpcllm import slow, train

HOSTS = ["n0", "n0", "n1", "n1"]


class Alone:
    size = 2

    def allgather(self, value):
        return [value, 3.0]


def test_a_rank_is_told_of_when_it_becomes_slow_and_when_it_no_longer_is():
    watch = slow.Watch(None, HOSTS, 1.5)
    assert watch.judge([1.0, 1.1, 1.0, 1.4]) == ([], [])
    assert watch.judge([1.0, 1.0, 2.5, 1.0]) == ([(2, 2.5)], [])
    assert watch.judge([1.0, 1.0, 2.6, 1.0]) == ([], [])
    assert watch.judge([1.0, 1.0, 1.2, 3.0]) == ([(3, 3.0)], [(2, 1.2)])
    assert watch.describe(2, 2.5, 100) == (
        "step 100: rank 2 on n1 computes 2.50 times as long as ranks do, and all wait for it"
    )
    assert "as fast as others again (1.20" in watch.describe(2, 1.2, 150)


def test_times_are_compared_between_ranks_that_do_the_same():
    assert slow.compare([1.0, 2.0], [None] * 2) == [1.0, 2.0]
    assert slow.compare([1.0, 1.0, 4.0, 4.0], [0, 0, 1, 1]) == [1.0] * 4
    assert slow.compare([1.0, 1.0, 1.0, 2.0, 1.0], [0] * 5) == [1.0, 1.0, 1.0, 2.0, 1.0]
    assert slow.compare([0.0, 0.0], [0, 0]) == [0.0, 0.0]


def test_the_median_of_a_window_counts_and_nothing_is_sent_within_it():
    watch = slow.Watch(Alone(), HOSTS[:2], 1.5)
    seconds = [1.0] * 30 + [50.0] * 20  # a pause of the machine is no slow rank
    assert [watch.step(second) for second in seconds[:-1]] == [([], [])] * 49
    assert watch.step(seconds[-1]) == ([(1, 3.0)], [])
    assert watch.step(1.0) == ([], [])
    off = slow.Watch(None, HOSTS, 0)
    assert {str(off.step(1.0)) for _ in range(200)} == {"([], [])"}


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize("times", [2.0, 3.0])
def test_a_rank_that_sleeps_is_named_and_its_ratio_right(world, prepared, tmp_path, monkeypatch, times):
    base, slowed = shared(world, tmp_path), world.size - 1
    monkeypatch.setattr(slow, "_WINDOW", 6)
    run = settings(prepared, base / "run", **{"train.max_steps": 18, "train.global_batch_size": world.size})
    one_step, steps, took = train.one_step, [], 0.4

    def sleeping(placed, *rest):
        steps.append(None)
        # As if the model was larger: each rank computes 0.4 s a step, the slow one more in steps 1 to 12.
        extra = took * (times - 1) if world.rank == slowed and len(steps) <= 12 else 0.0
        time.sleep(took + extra)
        return one_step(placed, *rest)

    monkeypatch.setattr(train, "one_step", sleeping)
    train.train(run, world)
    world.comm.Barrier()
    events = [json.loads(line) for line in (base / "run" / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] in ("slow", "recovered")]
    assert [(event["event"], event["step"], event["rank"], event["host"]) for event in told] == [
        ("slow", 6, slowed, world.host), ("recovered", 18, slowed, world.host),
    ]  # fmt: skip
    # On a machine that has other work a step takes longer than the pauses in it; its own times tell how much.
    first = [json.loads(line) for line in (base / "run" / "metrics.jsonl").read_text().splitlines()][:6]
    slowest, imbalance = (statistics.median(record[name] for record in first) for name in ("compute_s", "imbalance"))
    expected = slowest * (world.size - 1) / (world.size * slowest / imbalance - slowest)
    assert told[0]["ratio"] == pytest.approx(expected, rel=0.25)
    assert told[1]["ratio"] < 1.5
