"""A run that is asked to end early: all ranks at the same step, saved, and afterwards as if nobody had asked."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import clean_environment, find_mpirun
from test_train import losses, settings, shared, weights

from hpcllm import checkpoint, deadline, evaluate, stopping, train
from hpcllm.errors import DataError, Fruitless, IOFailure, UsageError


@pytest.fixture(autouse=True)
def _nothing_heard():
    stopping._heard.clear()
    yield
    stopping._heard.clear()


@pytest.fixture
def asks_at(monkeypatch, world):
    """A function: from then on rank `rank` hears `number` after `count` steps of a run."""

    def ask(number, rank, count):
        one_step, steps = train.one_step, []

        def counting(*arguments):
            steps.append(None)
            if len(steps) == count and world.rank == rank:
                stopping._heard.add(number)
            return one_step(*arguments)

        monkeypatch.setattr(train, "one_step", counting)

    return ask


@pytest.fixture
def asks_in_evaluation(monkeypatch, world):
    """A function: from then on the last rank hears `number`, or does `number()`, in the `count`th evaluation."""

    def ask(number, count):
        of_task, evaluations = evaluate.of_task, []

        def counting(*arguments, score=False):
            evaluations.extend([None] * score)
            if score and len(evaluations) == count and world.rank == world.size - 1:
                number() if callable(number) else stopping._heard.add(number)
            return of_task(*arguments, score=score)

        monkeypatch.setattr(evaluate, "of_task", counting)
        monkeypatch.setattr(stopping, "_LOOK_EVERY_S", 0.0)
        return evaluations

    return ask


def records(world, folder, event):
    world.comm.Barrier()  # root has written them
    lines = (Path(folder) / "events.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


@pytest.mark.mpi()
@pytest.mark.parametrize("every", [0, 2])
def test_a_signal_that_one_rank_hears_stops_all_and_the_run_goes_on_bit_for_bit(
    world, prepared, tmp_path, asks_at, monkeypatch, every
):
    base = shared(world, tmp_path)
    changes = {"train.eval_every_steps": every}
    reference = settings(prepared, base / "whole", **changes)
    expected = train.train(reference, world)
    run = settings(prepared, base / "stopped", **changes)
    asks_at(signal.SIGUSR2, world.size - 1, 4)
    results = train.train(run, world)
    assert (results["step"], results["stopped"], results["exit_code"]) == (4, "SIGUSR2", 75)
    assert [(record["step"], record["why"]) for record in records(world, base / "stopped", "stop")] == [(4, "SIGUSR2")]
    monkeypatch.undo()
    stopping._heard.clear()
    finished = train.train(run, world, resume=True)
    assert finished == {**expected, "checkpoint": finished["checkpoint"]}
    ours, theirs = weights(run.run.output_dir, 6), weights(reference.run.output_dir, 6)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    # Evaluations that there was no time for have been made up for; none came twice.
    for key in ("loss", "eval_loss"):
        assert losses(base / "stopped", key) == losses(base / "whole", key), key


@pytest.mark.mpi()
@pytest.mark.parametrize("step", [4, 6])
def test_an_evaluation_is_broken_off_for_a_signal_and_made_up_for(world, prepared, tmp_path, asks_in_evaluation, step):
    base = shared(world, tmp_path)
    changes = {"train.eval_every_steps": 2, "checkpoint.every_steps": 2}
    reference = settings(prepared, base / "whole", **changes)
    expected = train.train(reference, world)
    run = settings(prepared, base / "stopped", **changes)
    asks_in_evaluation(signal.SIGTERM, step // 2)
    for once_more in (False, True):  # that evaluation is the first thing the next start does
        results = train.train(run, world, resume=once_more)
        assert (results["step"], results["stopped"], results["exit_code"]) == (step, "SIGTERM", 75)
        assert [record["step"] for record in records(world, base / "stopped", "checkpoint")][-1] == step
        assert losses(base / "stopped", "eval_loss") == losses(base / "whole", "eval_loss")[: step // 2 - 1]
    assert len(records(world, base / "stopped", "checkpoint")) == step // 2  # the second start had nothing to save
    stopping._heard.clear()
    finished = train.train(run, world, resume=True)
    of_another_folder = {"checkpoint": finished["checkpoint"]}
    assert finished == {**expected, **of_another_folder}
    ours, theirs = weights(run.run.output_dir, 6), weights(reference.run.output_dir, 6)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for key in ("loss", "eval_loss"):
        assert losses(base / "stopped", key) == losses(base / "whole", key), key


@pytest.mark.mpi()
def test_a_signal_after_the_last_checkpoint_leaves_the_evaluation_to_the_next_start(
    world, prepared, tmp_path, asks_in_evaluation, monkeypatch
):
    base = shared(world, tmp_path)
    run = settings(prepared, base / "run")
    expected = train.train(run, world)
    world.comm.Barrier()
    if world.is_root:
        (base / "run" / "results.json").unlink()
    world.comm.Barrier()
    evaluations = asks_in_evaluation(signal.SIGUSR1, 1)
    results = train.train(run, world, resume=True)
    assert (results["step"], results["stopped"], results["exit_code"]) == (6, "SIGUSR1", 75)
    assert len(evaluations) == 1 and [record["step"] for record in records(world, base / "run", "checkpoint")] == [6]
    monkeypatch.undo()
    stopping._heard.clear()
    assert train.train(run, world, resume=True) == expected


@pytest.mark.mpi()
def test_a_file_save_waits_for_an_evaluation_that_is_under_way(world, prepared, tmp_path, asks_in_evaluation):
    base = shared(world, tmp_path)
    run = settings(prepared, base / "run", **{"checkpoint.keep": 9, "train.eval_every_steps": 4})
    asks_in_evaluation((base / "run" / stopping.SAVE).touch, 1)
    assert "stopped" not in train.train(run, world)
    assert [record["step"] for record in records(world, base / "run", "checkpoint")] == [5, 6]
    assert len(losses(base / "run", "eval_loss")) == 2


def test_ranks_hear_twice_a_second_between_parts_of_any_length(monkeypatch):
    now, heard, acts = [0.0], [], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    ear = stopping.Ear(lambda: heard.append(now[0]) or 0, lambda number, part_s: (number, 1.25 * part_s), acts.append)
    for part_s, parts in ((3.0, 4), (0.01, 400), (1e-9, 1000)):
        for _ in range(parts):
            now[0] += part_s
            ear()
    assert heard[:4] == [3.0, 6.0, 9.0, 12.0]  # where a part is long, after each
    gaps = [late - early for early, late in itertools.pairwise(heard) if 13.0 < early < 15.0]
    assert all(0.35 < gap <= 0.5 for gap in gaps) and len(gaps) >= 4
    assert len(heard) < 30 and not acts
    stopping.Ear(lambda: 115, lambda number, part_s: (max(number, 110.0), part_s), acts.append)()
    assert acts == [stopping.Wish("SIGTERM")]


@pytest.mark.mpi()
def test_the_file_save_has_a_checkpoint_written_and_the_run_goes_on(world, prepared, tmp_path, monkeypatch):
    base = shared(world, tmp_path)
    run = settings(prepared, base / "run", **{"checkpoint.keep": 9})
    monkeypatch.setattr(stopping, "_LOOK_EVERY_S", 0.0)
    one_step, steps = train.one_step, []

    def touching(*arguments):
        steps.append(None)
        if len(steps) == 3 and world.is_root:
            (base / "run" / stopping.SAVE).touch()
        return one_step(*arguments)

    monkeypatch.setattr(train, "one_step", touching)
    results = train.train(run, world)
    assert results["step"] == 6 and "stopped" not in results
    assert [record["step"] for record in records(world, base / "run", "checkpoint")] == [3, 6]
    assert not (base / "run" / stopping.SAVE).exists()


@pytest.mark.mpi()
def test_who_is_asked_to_end_leaves_it_to_the_next_start_to_read_the_checkpoint_back_and_delete_older_ones(
    world, prepared, tmp_path, asks_at, monkeypatch
):
    base = shared(world, tmp_path)
    run = settings(prepared, base / "run", **{"checkpoint.every_steps": 10, "train.max_steps": 30})
    asks_at(signal.SIGUSR2, world.size - 1, 25)
    assert train.train(run, world)["step"] == 25
    stopping._heard.clear()
    one_step, names = train.one_step, []

    def looking(*arguments):
        names.append({path.name for path in (base / "run").glob("checkpoint-*")})
        return one_step(*arguments)

    world.comm.Barrier()
    assert {path.name for path in (base / "run").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (10, 20, 25)}
    monkeypatch.setattr(train, "one_step", looking)
    assert train.train(run, world, resume=True)["step"] == 30
    assert names[0] == {"checkpoint-20", "checkpoint-25"}


@pytest.mark.mpi()
def test_the_file_stop_ends_a_run_and_keeps_it_from_starting(world, prepared, tmp_path, monkeypatch):
    base = shared(world, tmp_path)
    run = settings(prepared, base / "run")
    monkeypatch.setattr(stopping, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(stopping, "stop_file", lambda folder: "it")
    results = train.train(run, world)
    assert (results["step"], results["stopped"], results["exit_code"]) == (1, "the file STOP", 0)
    world.comm.Barrier()  # root has written the last one
    before = (base / "run" / "events.jsonl").read_text()
    assert train.train(run, world, resume=True) == {"stopped": "the file STOP"}
    assert (base / "run" / "events.jsonl").read_text() == before
    monkeypatch.undo()
    assert train.train(run, world, resume=True)["step"] == 6


@pytest.mark.mpi()
def test_a_run_that_has_no_time_for_another_step_is_saved_before(world, prepared, tmp_path):
    base = shared(world, tmp_path)
    run = settings(prepared, base / "run", **{"run.time_limit": "00:01"})  # has passed before the first step
    results = train.train(run, world)
    assert (results["step"], results["stopped"], results["exit_code"]) == (1, "the time limit", 75)
    assert settings(prepared, base / "run", **{"run.time_limit": "00:11:30"}).run.time_limit == "00:11:30"
    with pytest.raises(UsageError, match=r'run.time_limit: "soon" is no time such as 12:00:00'):
        settings(prepared, base / "run", **{"run.time_limit": "soon"})


@pytest.mark.mpi()
def test_a_run_that_gets_nowhere_is_not_started_for_ever(world, prepared, tmp_path, monkeypatch):
    base = shared(world, tmp_path)
    run = settings(prepared, base / "run", **{"run.max_fruitless_starts": 3})

    def failing(*_):
        raise RuntimeError("provoked")

    with monkeypatch.context() as patch:
        patch.setattr(train, "one_step", failing)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="provoked"):
                train.train(run, world, resume=True)
    with pytest.raises(Fruitless, match=r"3 times in a row without a new checkpoint.*max_fruitless_starts=4") as told:
        train.train(run, world, resume=True)
    assert told.value.code == 93
    more = settings(prepared, base / "run", **{"run.max_fruitless_starts": 4})
    assert train.train(more, world, resume=True)["step"] == 6
    assert len(records(world, base / "run", "start")) == 4


def test_a_limit_that_is_moved_to_before_is_noticed_long_before(tmp_path, monkeypatch):
    now, ends = [1000.0], [90_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    requests = stopping.Requests(tmp_path, True, ask=lambda known: ends[0] or known)
    ends[0], now[0] = 8000.0, now[0] + 601
    assert stopping.wish(requests.heard()) is None and requests.end == 8000.0


def test_more_time_is_noticed_before_a_run_ends_for_want_of_it(tmp_path, monkeypatch):
    now, ends = [1000.0], [1100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    requests = stopping.Requests(tmp_path, True, ask=lambda known: ends[0] or known)
    requests.took("step", 10.0)
    requests.took("save", 20.0)
    requests.took("evaluation", 100.0)
    assert requests.lead_s() == 1.5 * 30 + 10 and requests.lead_s(evaluates=True) == 1.5 * 130 + 10
    assert requests.lead_s(saves=2) == 1.5 * 50 + 10
    assert stopping.wish(requests.heard()) is None
    assert stopping.wish(requests.heard(evaluates=True)).why == "the time limit"
    ends[0] = 2000.0
    assert stopping.wish(requests.heard(evaluates=True)).why == "the time limit"  # asked a moment ago
    now[0] += 61
    assert stopping.wish(requests.heard(evaluates=True)) is None and requests.end == 2000.0
    now[0], ends[0] = 1960.0, None  # the controller is too busy to answer
    assert stopping.wish(requests.heard()) == stopping.Wish("the time limit", True, 75) and requests.end == 2000.0
    assert stopping.Requests(tmp_path, True, save_s=7.0, ask=lambda known: None).lead_s() == 1.5 * 7 + 10
    assert stopping.wish(stopping.Requests(tmp_path, False, ask=lambda known: 0.0).heard()) is None  # root's business


def test_an_evaluation_leaves_time_for_what_comes_after_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    requests = stopping.Requests(tmp_path, True, ask=lambda known: 1020.0)
    requests.took("step", 60.0)
    requests.took("save", 20.0)
    assert stopping.wish(requests.heard_meanwhile(saves=0, steps=0)) is None  # all is saved
    assert stopping.wish(requests.heard_meanwhile(saves=1, steps=0)).why == "the time limit"
    assert stopping.wish(requests.heard_meanwhile(saves=0, steps=1)).why == "the time limit"
    (tmp_path / stopping.SAVE).touch()
    assert requests.heard_meanwhile(saves=0, steps=0) == stopping._NOTHING and (tmp_path / stopping.SAVE).exists()
    (tmp_path / stopping.STOP).touch()
    assert stopping.wish(requests.heard_meanwhile(saves=0, steps=0)).code == 0


def program(folder, name, text):
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_the_end_of_a_job_is_what_its_batch_system_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    program(tmp_path, "squeue", '[ "$3$5" = 17%e ] && [ "$SLURM_TIME_FORMAT" = standard ] && echo 2026-11-26T15:00:00')
    program(
        tmp_path, "qstat", "printf '    Resource_List.walltime = 01:30:00\\n    stime = Thu Nov 26 14:00:00 2026\\n'"
    )

    def end(environment, known=None):
        return deadline.end_of_job(known, environment)

    at = 1795705200.0  # 2026-11-26 15:00
    assert end({"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": "5"}) == at
    assert end({"SLURM_JOB_ID": "18", "SLURM_JOB_END_TIME": "5"}) == 5.0
    assert end({"SLURM_JOB_ID": "18"}) is None
    assert end({"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": "5"}, 7.0) == at
    assert end({"SLURM_JOB_ID": "18", "SLURM_JOB_END_TIME": "5"}, 7.0) == 7.0  # to which it was moved
    assert end({"PBS_JOBID": "3.server"}) == at + 1800
    array = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "4"}
    assert deadline.job(array) == "17_4" and end(array) is None  # its own limit, not that of all
    assert end({"PBS_JOBID": "3.server", "HPCLLM_END_TIME": "7"}) == 7.0
    assert end({}) is None
    program(tmp_path, "squeue", "echo 2026-11-26T15:00:00; echo N/A; echo 2026-11-26T14:59:59")
    assert end({"SLURM_JOB_ID": "17"}) == at - 1  # of a heterogeneous job
    program(tmp_path, "squeue", "echo N/A")
    program(tmp_path, "qstat", "echo unknown job; exit 153")
    assert end({"SLURM_JOB_ID": "17"}) is None and end({"PBS_JOBID": "3"}) is None
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:30", 30), ("90:00", 5400), ("12:00:00", 43200), ("1-12:00:00", 129600)]
)
def test_durations_are_written_as_batch_systems_do(text, seconds):
    assert deadline.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "12", "1:2:3:4", "-1:00", "1 day"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="is no time such as"):
        deadline.seconds(text)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_mpirun_ends_the_job_with_75_and_the_same_command_goes_on(prepared, tmp_path, number):
    path = tmp_path / "run.toml"
    run = settings(prepared, tmp_path / "run", **{"train.max_steps": 100_000, "train.log_every_steps": 1})
    path.write_text(run.toml())
    command = [*find_mpirun(), "-np", "2", sys.executable, "-m", "hpcllm", "train", str(path), "--resume"]
    with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True) as job:
        for line in job.stdout:
            if line.startswith("step 5/"):
                job.send_signal(number)
                break
        rest = job.stdout.read()
    told = next(line for line in rest.splitlines() if line.startswith("stopped after step "))
    step = int(told.split()[3])
    assert job.returncode == 75 and step >= 5 and f"({number.name}), saved in" in told
    assert (tmp_path / "run" / f"checkpoint-{step}" / ".complete").is_file()
    done = subprocess.run(
        [*command, f"train.max_steps={step + 1}"], env=clean_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and f"continuing from step {step}" in done.stdout, done.stdout + done.stderr


@pytest.mark.mpi()
def test_a_damaged_checkpoint_is_passed_over_and_kept_under_another_name(world, prepared, tmp_path):
    base = shared(world, tmp_path)
    run = settings(prepared, base / "run", **{"checkpoint.every_steps": 2, "checkpoint.keep": 3})
    train.train(run, world)
    theirs = {name: tensor.clone() for name, tensor in weights(base / "run", 6).items()}  # not what is in the file
    files = [base / "run" / f"checkpoint-{step}" / "optimizer.safetensors" for step in (4, 6)]
    world.comm.Barrier()
    if world.is_root:
        for file in files:
            content = bytearray(file.read_bytes())
            content[-5] ^= 4
            file.write_bytes(content)
    world.comm.Barrier()
    train.train(run, world, resume=True)
    ours = weights(base / "run", 6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [len(record["paths"]) for record in records(world, base / "run", "damaged")] == [2]
    left = {"damaged-checkpoint-4", "damaged-checkpoint-6", "checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert {path.name for path in (base / "run").iterdir() if path.is_dir()} == left | {"latest"}
    world.comm.Barrier()
    if world.is_root:
        for step in (2, 4, 6):
            (base / "run" / f"checkpoint-{step}" / "model.safetensors").unlink()
    world.comm.Barrier()
    with pytest.raises(DataError, match=r"model.safetensors is missing, and there is no older one"):
        train.train(run, world, resume=True)


@pytest.mark.mpi()
def test_a_run_is_refused_where_a_checkpoint_would_find_no_room(world, prepared, tmp_path, monkeypatch):
    run, require_room = settings(prepared, shared(world, tmp_path) / "run"), checkpoint.require_room

    def limited(*arguments):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # as a quota
        try:
            require_room(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "require_room", limited)
        with pytest.raises(IOFailure, match=r"has no room for a checkpoint of 0\.000\d+ GB: File too large"):
            train.train(run, world)
    results = train.train(run, world, overwrite=True)
    sizes = [
        (Path(results["checkpoint"]) / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors")
    ]
    assert results["step"] == 6 and sum(sizes) > 100_000


@pytest.mark.parametrize("name", [stopping.SAVE, stopping.GROW])
def test_a_file_that_cannot_be_removed_is_not_heard_and_ends_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr(stopping, "_LOOK_EVERY_S", 0.0)
    requests = stopping.Requests(tmp_path, True, ask=lambda known: None)
    (tmp_path / name).mkdir()
    assert requests.heard() == stopping._NOTHING
    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("4")
    assert requests.heard() != stopping._NOTHING and not (tmp_path / name).exists()
