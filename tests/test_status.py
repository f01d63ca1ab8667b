"""What `hpcllm status` tells of a run's folder, without MPI and torch."""

import json
import subprocess
import sys
import time

import pytest
from launching import clean_environment

from hpcllm import records, status
from hpcllm.errors import DataError, MissingInput

STEP = {"learning_rate": 1e-3, "grad_norm": 1.0, "step_s": 2.0, "tokens_per_s": 500.0, "mfu": 0.25}
STEP |= {"memory_bytes": 1 << 30}


def write(folder, steps, events, now):
    """A run that began 1000 s before `now`; its last step was 4 s ago."""
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text('[model]\ntask = "causal_lm"\n')
    start = {"ranks": 4, "hosts": ["n1", "n2"], "job": "17", "max_steps": 1000, "ends": now + 7200.0}
    starts = [{"event": "start", "step": 0, **start, "restart": 0, "time": now - 1000.0}]
    (folder / "events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in starts + events))
    told = [
        {"step": step, "loss": 5.0 - step / 1000, **STEP, "useful_s": 2.0 * step, "restart": 0}
        | {"time": now - 4.0 - 2.0 * (steps - step)}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in told))


def test_a_run_at_work_says_how_long_it_will_take(tmp_path):
    now = time.time()
    saved = {"event": "checkpoint", "step": 400, "path": "run/checkpoint-400", "seconds": 1.5, "restart": 0}
    later = saved | {"step": 440, "path": "run/checkpoint-440", "time": now - 20.0}  # is gone, found to be damaged
    write(tmp_path / "run", 450, [saved | {"time": now - 100.0}, later], now)
    for name in ("checkpoint-90", "checkpoint-400", ".checkpoint-450", "damaged-checkpoint-440"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / ".complete").touch()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 451, "lo')  # is being written
    found = status.status(tmp_path / "run", now)
    assert (found["state"], found["step"], found["starts"], found["job"]) == ("runs", 450, 1, "17")
    assert found["left_s"] == 1100.0 and found["job_left_s"] == pytest.approx(7200.0)
    assert found["goodput"] == pytest.approx(900 / 996) and found["silent_s"] == pytest.approx(4.0)
    assert status.show(found).splitlines()[1:] == [
        "task        causal_lm, job 17, 4 ranks on 2 hosts, start 1",
        "step        450 of 1000 (45%)",
        "loss        4.5500, learning rate 1.000e-03",
        "rate        2.000 s a step, 500 tokens/s, MFU 0.250, 1.0 GiB a rank",
        "goodput     0.904",
        f"checkpoint  step 400, written in 1.5 s: {tmp_path}/run/checkpoint-400",
        "left        18 min to the last step, 2 h 0 min to the end of the job",
    ]
    late = status.status(tmp_path / "run", now + 3600)
    assert late["state"] == "silent" and "left_s" not in late
    assert status.show(late).startswith(f"{tmp_path}/run: no word for 60 min: it was ended, hangs, or evaluates\n")
    # Before its first step a start may take a while, and what another one did counts no more.
    with open(tmp_path / "run" / "events.jsonl", "a") as file:
        again = {"event": "start", "step": 400, "ranks": 2, "hosts": ["n1"], "restart": 1, "time": now + 3600.0}
        file.write('{"event": "chec\n' + json.dumps(again) + "\n")
    begun = status.status(tmp_path / "run", now + 4200)
    assert (begun["state"], begun["step"], begun["starts"]) == ("runs", 400, 2) and "loss" not in begun
    assert status.status(tmp_path / "run", now + 3600 + 1801)["state"] == "silent"


@pytest.mark.parametrize(
    ("event", "state"),
    [
        ({"event": "end"}, "finished"),
        ({"event": "stop", "why": "SIGUSR2"}, "stopped (SIGUSR2)"),
        ({"event": "failed", "why": "no room"}, "failed (no room)"),
    ],
)
def test_a_run_that_has_ended_says_how(tmp_path, event, state):
    now = time.time()
    write(tmp_path / "run", 3, [event | {"step": 3, "restart": 0, "time": now}], now)
    assert status.status(tmp_path / "run", now + 1e6)["state"] == state


def test_folders_that_tell_nothing(tmp_path):
    with pytest.raises(MissingInput, match=r"is no folder of a run: it has no events.jsonl"):
        status.status(tmp_path)
    (tmp_path / "events.jsonl").touch()
    assert status.show(status.status(tmp_path)) == f"{tmp_path}: has not started yet"
    (tmp_path / "events.jsonl").write_text("no record\n")
    with pytest.raises(DataError, match="holds no records"):
        status.status(tmp_path)


def test_an_evaluation_long_ago_and_records_of_older_versions_are_told_of(tmp_path):
    now = time.time()
    write(tmp_path / "run", 2000, [], now)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    told = {"step": 1000, "eval_loss": 3.5, "eval_samples": 10, "restart": 0, "time": now - 2000.0}
    lines.insert(1000, json.dumps(told))
    last = {name: value for name, value in json.loads(lines[-1]).items() if name not in ("mfu", "useful_s")}
    lines[-1] = json.dumps(last | {"loss": None, "tokens_per_s": None})
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = status.status(tmp_path / "run", now)
    assert found["eval"] == {"step": 1000, "eval_loss": 3.5, "eval_samples": 10} and "goodput" not in found
    shown = status.show(found)
    assert "evaluated   step 1000: eval_loss=3.5000" in shown and "loss        not a number, " in shown
    assert "- tokens/s, MFU -, 1.0 GiB a rank" in shown


def test_the_command_needs_neither_mpi_nor_torch_and_reads_no_more_of_a_long_run(tmp_path):
    write(tmp_path / "run", 2000, [], time.time())
    code = (
        "import sys; from hpcllm.__main__ import main; main(sys.argv[1:]); "
        "sys.exit(bool({'torch', 'mpi4py', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "status", str(tmp_path / "run"), "--json"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2000
    assert len(records.tail(tmp_path / "run" / "metrics.jsonl", status._TAIL_BYTES)) < 500


def test_what_has_happened_to_a_run_is_counted(tmp_path):
    now, base = time.time(), {"restart": 0, "time": 0.0}
    names = [
        "died",
        "slow",
        "checkpoint",
        "slow",
        "rollback",
        "corrupted",
        "quarantined",
        "first_step",
        "start",
        "start",
    ]
    events = [{"event": name, "step": 3, "path": "p", "ranks": 4, "hosts": ["n1"], **base} for name in names]
    write(tmp_path / "run", 9, events, now)
    found = status.status(tmp_path / "run", now)
    assert found["happened"] == {"died": 1, "slow": 2, "rollback": 1, "corrupted": 1, "quarantined": 1}
    assert (found["starts"], found["restarts"], found["fruitless_starts"]) == (3, 2, 2)
    shown = status.show(found).splitlines()
    assert "restarts    2, 2 since the newest checkpoint" in shown
    assert "happened    died 1, slow 2, rollback 1, corrupted 1, quarantined 1" in shown
