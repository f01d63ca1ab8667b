"""What a run tells: bars only where somebody watches, records that add up."""

import io
import json
import os
import subprocess
import sys

import pytest

from hpcllm import monitor, terminal


def test_a_log_gets_lines_and_other_ranks_say_nothing(monkeypatch, capsys):
    monkeypatch.setenv("HPCLLM_PROGRESS", "lines")
    for quiet in (False, True):
        progress = monitor.Progress("train", 3, quiet=quiet)
        progress.update(1, "step 1/3 loss=2.0", "loss 2.0")
        progress.update(2, None, "loss 1.5")
        progress.say("saved")
        progress.close()
    assert capsys.readouterr().out == "step 1/3 loss=2.0\nsaved\n"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "find", lambda: shown)
    progress = monitor.Progress("train", 3)
    progress.update(2, "step 2/3 loss=2.0 and much more", "loss 2.0")
    progress.say("[saved]")
    progress.close()
    assert "2/3" in shown.getvalue() and "loss 2.0" in shown.getvalue() and "[saved]" in shown.getvalue()
    assert capsys.readouterr().out == ""


def test_without_a_controlling_terminal_nobody_watches():
    def found(how, **env):
        code = f"import sys; from hpcllm import terminal; print({how})"
        env = {**os.environ, "HPCLLM_PROGRESS": "", **env}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, start_new_session=True, capture_output=True, text=True, env=env, check=True
        ).stdout

    assert found("terminal.find()") == "None\n"
    assert found("terminal.find() is sys.stderr", HPCLLM_PROGRESS="bar") == "True\n"


@pytest.mark.mpi()
def test_a_step_costs_what_its_slowest_rank_takes(world):
    clock = monitor.Clock(world.group, world.group)
    with clock.waiting_for_data():
        pass
    clock.data_s = 0.25 * (world.rank + 1)
    clock._began -= 100.0 * (world.rank + 1)  # has computed for so long
    loss, times, heard = clock.collect(world.rank + 1.0, 3 * world.rank)
    assert loss == sum(range(1, world.size + 1)) and heard == 3 * (world.size - 1)
    assert times["data_s"] == 0.25 * world.size
    assert times["memory_bytes"] > 1 << 26
    assert times["imbalance"] == pytest.approx(2 * world.size / (world.size + 1), rel=0.01)
    assert set(times) == {"step_s", "data_s", "compute_s", "communication_s", "memory_bytes", "imbalance"}


def test_records_are_appended_by_root_alone(tmp_path):
    for is_root in (False, True):
        journal = monitor.Journal(tmp_path, 1, is_root)
        journal.metrics({"step": 1, "loss": 2.0})
        journal.event("end", step=1)
    (record,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert record["step"] == 1 and record["loss"] == 2.0 and record["restart"] == 1 and record["time"] > 1.7e9
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event["event"] == "end"


def test_the_history_of_a_run_is_read_from_its_events(tmp_path):
    assert monitor.history(tmp_path) == (0, 0, 0.0)
    events = [{"event": "start"}, {"event": "checkpoint", "seconds": 2.5}, {"event": "start"}, {"event": "start"}]
    events = [*events[:1], {"event": "checkpoint", "seconds": 7.0}, *events]
    lines = [json.dumps({**event, "restart": 0, "time": 1.0, "step": 1, "path": "p"}) for event in events]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines, '{"event": "end", "st']))
    assert monitor.history(tmp_path) == (4, 2, 7.0)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write("\n" + "".join(f"{line}\n" for line in lines[3:4] * 5))
    assert monitor.history(tmp_path) == (4, 0, 2.5)  # what was slow once is so no more


def test_a_history_is_read_past_bytes_that_are_no_text_and_lines_that_are_cut(tmp_path):
    saved = b'{"event": "checkpoint", "step": 1, "path": "p", "restart": 0, "time": 1.0, "seconds": %s}'
    lines = [b'{"event": "start", "step": 0}', saved % b"2.5", b"\xff\xfe\x85 garbled"]
    lines += [saved % b'"soon"', saved % b"1e99"]
    lines += [
        b'{"event": "checkpoint", "x": ' + b"[" * 100_000,
        b'{"event": "start", "step": 0}',
        b'{"event": "start", "st',
    ]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(lines))
    assert monitor.history(tmp_path) == (2, 1, 2.5)
