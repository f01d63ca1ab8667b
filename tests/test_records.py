"""events.jsonl and metrics.jsonl are read in one way, whatever a kill or a bad disk has left of them."""

import json
import os
import time

import pytest

from hpcllm import card, heartbeat, monitor, records, status


def event(name, **more):
    return json.dumps({"event": name, **more, "restart": 0, "time": 5.0}).encode()


# Cut, not text, zeros of a file system that lost its journal, other JSON, an event that nobody here has written.
BAD = [
    b'{"event": "checkpoint", "step": 9, "seco',
    b'{"event": "start", "note": "\xff\xfe"}',
    b"\xff\x00\x80",
    bytes(300),
    b"[1, 2]",
    b"7",
    b'{"event": "start"}',
    b"",
    b'{"step": 3}',
]


def test_events_are_found_by_name_and_what_is_none_is_left_out(tmp_path):
    good = [event("start", step=0), event("checkpoint", step=5, seconds=2.0), event("slow", host="n\u00e9")]
    good += [event("checkpoint", step=10, seconds=1.0), event("slow"), event("start", step=10)]
    lines = [line for number, line in enumerate(good) for line in (*BAD[number : number + 2], line)] + BAD[7:]
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" + event("end"))  # the last line is being written
    events = records.Events(path)
    assert [each["event"] for each in events] == ["start", "checkpoint", "slow", "checkpoint", "slow", "start"]
    assert events.first("start")["step"] == 0 and events.last("start")["step"] == 10
    assert events.last()["event"] == "start" and events.last("end") is None is events.first("end")
    assert [each["step"] for each in events.named("checkpoint")] == [5, 10]
    assert events.counts()["slow"] == 2 and next(iter(events.counts())) == "start"
    assert (events.count_since("slow", "checkpoint"), events.count_since("slow", "end")) == (1, 2)
    # Spelt otherwise, as another program may.
    path.write_bytes(b'{"time":1.0, "restart":0, "event":"start"}\n')
    assert records.Events(path).counts() == {"start": 1} and records.Events(tmp_path / "none").last() is None


def test_a_tail_begins_with_a_whole_line_wherever_it_is_cut(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 8)]
    path.write_text("".join(f"{line}\n" for line in lines) + '{"step": 8, "lo')
    whole, begins = path.stat().st_size, [sum(len(line) + 1 for line in lines[:number]) for number in range(7)]
    for size in range(whole + 2):
        expected = [step for step, begin in enumerate(begins, 1) if begin >= whole - size]
        assert [record["step"] for record in records.tail(path, size)] == expected
    assert records.tail(path, whole, "step", "eval_loss") == [] == records.tail(path, whole, holding=b"eval")


def test_all_readers_survive_bad_lines_and_agree(tmp_path):
    begin = {"ranks": 4, "hosts": ["n1", "n2"], "max_steps": 20, "ends": None, "job": None}
    good = [event("start", step=0, **begin), event("checkpoint", step=10, path="checkpoint-10", seconds=2.0)]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join([*BAD, good[0], *BAD, good[1], *BAD]) + b"\n")
    # What is no whole event may count as a start, which none of them reads.
    assert monitor.history(tmp_path)[2] == 2.0
    assert card.node_hours(tmp_path / "events.jsonl", 10) == 0.0
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / ".complete").touch()
    found = status.status(tmp_path, 6.0)
    assert (found["checkpoint"]["step"], found["step"], found["state"]) == (10, 0, "runs")
    assert found["checkpoint"]["seconds"] == 2.0


def test_a_step_is_told_in_the_heartbeat_at_most_once_a_second_and_ends_at_once(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    journal, path = monitor.Journal(tmp_path, 0, True), tmp_path / "heartbeat"

    def line():
        (only,) = path.read_text().splitlines()
        assert len(path.read_bytes()) == 120
        return only[20:].rstrip()

    journal.event("start", step=0, max_steps=5000)
    assert line() == "step 0 of 5000: has started"
    for step in range(1, 31):
        now[0] += 0.4
        journal.metrics({"step": step, "loss": 2.0 + step / 100, "step_s": 0.4})
        # Of each 0.4 s the third is the first a second after the last one that was told.
        assert line().startswith(f"step {step - step % 3} of 5000")
    assert line() == "step 30 of 5000, loss 2.3000, 0.400 s a step, 33 min left"
    journal.metrics({"step": 30, "eval_loss": 2.0})
    journal.event("checkpoint", step=30)
    now[0] += 5
    journal.metrics({"step": 31, "loss": float("nan"), "step_s": 0.4})
    assert line() == "step 31 of 5000, loss nan, 0.400 s a step, 33 min left"
    journal.event("stop", step=31, why="SIGUSR2")
    assert line() == "step 31 of 5000: stopped (SIGUSR2)"
    journal.event("end", step=31)
    assert line() == "step 31 of 5000: the run is over"
    monitor.Journal(tmp_path / "none", 0, False).metrics({"step": 1, "loss": 1.0})
    assert not (tmp_path / "none").exists()


def test_a_heartbeat_that_cannot_be_written_is_no_reason_to_end(tmp_path):
    os.mkdir(tmp_path / "heartbeat")
    heartbeat.Heartbeat(tmp_path).step({"step": 1, "loss": 1.0})


@pytest.mark.parametrize(
    ("seconds", "words"), [(12, "12 s"), (300, "5 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h"), (-3, "0 s")]
)
def test_durations_in_words(seconds, words):
    assert heartbeat.in_words(seconds) == words
