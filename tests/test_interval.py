"""The interval of checkpoints: what Daly gives, from what is measured, and bounded."""

import json
import math
from itertools import pairwise

import pytest
from test_config import load
from test_train import settings, shared

from hpcllm import checkpoint, interval, train
from hpcllm.errors import UsageError
from hpcllm.interval import Interval, optimum_s

DAY = 86400.0


def lost(interval_s, cost_s, mtbf_s):
    """Seconds that a second of training takes, of Daly's model (2006, equation 20, without restarts)."""
    return mtbf_s * (math.exp((interval_s + cost_s) / mtbf_s) - 1) / interval_s


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(0.1, DAY), (10, DAY), (300, DAY), (60, 3600), (600, 3600)])
def test_no_other_interval_loses_less(cost_s, mtbf_s):
    best = optimum_s(cost_s, mtbf_s)
    exact = min((best * 1.002**n for n in range(-700, 700)), key=lambda t: lost(t, cost_s, mtbf_s))
    assert best == pytest.approx(exact, rel=0.01)
    assert best == pytest.approx(math.sqrt(2 * cost_s * mtbf_s) - cost_s, rel=0.15)  # Young's, and Daly's lower order
    assert optimum_s(3 * mtbf_s, mtbf_s) == mtbf_s


def stepped(every, count, seconds=1.0, saving=False):
    """The steps, of so many, after which one was due; nothing is saved."""
    found = []
    for step in range(1, count + 1):
        every.stepped(seconds, saving)
        found += [step] if every.due(step) else []
    return found


def test_a_number_is_that_number():
    assert stepped(Interval(7, DAY), 30) == [7, 14, 21, 28]
    assert stepped(Interval(0, DAY), 30) == []


def test_the_first_one_comes_after_two_minutes_and_twenty_steps():
    assert stepped(Interval("auto", DAY), 200)[0] == 120
    assert stepped(Interval("auto", DAY), 200, seconds=30.0)[0] == 20
    assert stepped(Interval("auto", DAY), 2000, seconds=0.125)[0] == 960


def test_it_comes_sooner_where_the_job_may_have_failed_by_then():
    assert stepped(Interval("auto", 600.0), 2000, seconds=0.125)[0] == 240  # 30 s, a twentieth
    assert stepped(Interval("auto", 60.0), 2000, seconds=0.125)[0] == 24
    assert stepped(Interval("auto", 60.0), 200, seconds=1.0)[0] == 20


def test_then_its_cost_counts_whatever_its_steps_have_been():
    auto = Interval("auto", DAY)
    stepped(auto, 120, 2.0)
    auto.began()
    stepped(auto, 3, 3.0, saving=True)  # a second slower each, which is more than what training waited
    told = auto.saved(0.5, 4.0)
    expected = round(optimum_s(3.0, DAY) / 2.0)
    assert auto.every_steps == expected and f"every {expected} steps" in told and "costs 3 s" in told and "24 h" in told
    auto.began()
    assert stepped(auto, expected + 1, 2.0)[0] == expected
    # It is not told again where it hardly changes.
    auto.began()
    assert auto.saved(3.1, 4.0) is None
    for _ in range(3):
        told = auto.saved(30.0, 4.0)
    assert "costs 30 s" in told  # of the newest five the median


def test_checkpoints_cost_a_twentieth_at_most_and_are_not_due_before_they_are_written():
    auto = Interval("auto", 600.0)
    stepped(auto, 120)
    auto.saved(200.0, 200.0)
    assert optimum_s(200.0, 600.0) < 500 and auto.every_steps == 4000
    slow = Interval("auto", 600.0)
    stepped(slow, 120)
    slow.saved(0.001, 300.0)  # in the background
    assert slow.every_steps == 300


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("checkpoint.every_steps=often", ["checkpoint.every_steps", "auto"]),
        ("checkpoint.every_steps=-1", ["checkpoint.every_steps", "0 or more"]),
        ("checkpoint.mtbf=often", ["checkpoint.mtbf", "12:00:00"]),
        ("checkpoint.mtbf=00:00", ["checkpoint.mtbf"]),
    ],
)
def test_what_is_no_interval_is_refused(override, words):
    with pytest.raises(UsageError) as refused:
        load(override)
    assert all(word in str(refused.value) for word in words)
    assert load("checkpoint.mtbf=12:00:00").checkpoint.mtbf == "12:00:00"  # a time of day, to TOML
    assert load("checkpoint.every_steps=auto").checkpoint.every_steps == "auto"
    assert load("checkpoint.every_steps=10").checkpoint.every_steps == 10


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_chooses_for_itself_alike_on_all_ranks(world, prepared, tmp_path, monkeypatch, asynchronous):
    base, seen = shared(world, tmp_path), []
    monkeypatch.setattr(interval, "_FIRST_S", 0.0)
    monkeypatch.setattr(interval, "_FIRST_STEPS", 3)
    monkeypatch.setattr(interval, "_LEAST", 5.0)
    due = Interval.due

    def noted(self, step):
        seen.append((step, due(self, step), self.every_steps))
        return seen[-1][1]

    monkeypatch.setattr(Interval, "due", noted)
    how = {"checkpoint.every_steps": "auto", "checkpoint.mtbf": "00:01", "checkpoint.keep": 99, "train.max_steps": 40}
    run = settings(prepared, base / "run", **how, **{"checkpoint.asynchronous": asynchronous})
    train.train(run, world)
    assert len(set(world.comm.allgather(tuple(seen)))) == 1
    world.comm.Barrier()
    saved = [checkpoint.step_of(path) for path in checkpoint.find(base / "run")]
    assert saved[0] == 3 and saved[-1] == 40
    events = [json.loads(line) for line in (base / "run" / "events.jsonl").read_text().splitlines()]
    chosen = [event["every_steps"] for event in events if event["event"] == "interval"]
    assert chosen and all(every >= 1 for every in chosen)
    assert all(
        later - earlier >= min(every for _, _, every in seen if every) for earlier, later in pairwise(saved[1:-1])
    )
