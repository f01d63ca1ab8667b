"""Losses that jump: told from those that only vary, and a run that goes back without the samples that led there."""

import json
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from test_train import settings, shared

from hpcllm import checkpoint, files, run_folder, saving, stopping, train
from hpcllm.errors import Diverged, UsageError
from hpcllm.spikes import Spikes

PLAN = SimpleNamespace(max_loss_spike=6.0, max_spike_steps=3, max_nonfinite_steps=3, max_rollbacks=3)
NAN = float("nan")


def fed(losses, plan=PLAN, nonfinite=0, state=None):
    """Spikes that have seen `losses`, from step 1, and what they said to each."""
    spikes = Spikes(plan, state)
    return spikes, [spikes.seen(step, loss, nonfinite) for step, loss in enumerate(losses, 1)]


def falling(count=200):
    """As losses are: they fall and vary."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.05
    return [8.0 - 0.002 * step + float(noise[step]) for step in range(count)]


def test_three_in_a_row_are_a_spike_and_its_first_step_is_told():
    spikes, said = fed([*falling(), 9.0, 9.5, 9.2])
    assert said == [None] * 202 + [201]
    assert spikes.under_way and not fed(falling())[0].under_way
    spikes, said = fed([*falling(), 9.0, 9.5, 4.0, 9.0, 9.5])  # one by one they pass
    assert set(said) == {None}


def test_no_loss_is_a_spike_before_there_are_enough_or_where_they_hardly_differ():
    assert set(fed([*falling(17), *[100.0] * 3])[1]) == {None}
    assert fed([*falling(20), *[100.0] * 10])[1][22] == 21
    assert set(fed([*[5.0] * 50, *[5.02] * 5])[1]) == {None}
    assert fed([*[5.0] * 50, *[5.05] * 5])[1][52] == 51


def test_the_limit_is_so_many_deviations_above_the_median():
    draw = torch.randn(100, generator=torch.Generator().manual_seed(3)).double() * 0.1 + 4
    spikes, _ = fed(draw.tolist())
    assert spikes.limit() == pytest.approx(4 + 6 * 0.1, abs=0.12)


def test_losses_of_a_spike_do_not_become_what_losses_are_compared_with():
    plan = SimpleNamespace(**{**vars(PLAN), "max_spike_steps": 1000})
    spikes, _ = fed([*falling(), *[9.0] * 150], plan)
    assert spikes.limit() == fed(falling())[0].limit()


def test_steps_that_are_no_number_count_as_they_do_without_and_belong_to_a_spike_around_them():
    spikes, _ = fed(falling())
    assert [spikes.seen(201 + n, NAN, 1 + n) for n in range(4)] == [None, None, None, 201]
    spikes, _ = fed([*falling(), 9.0, 9.0])
    assert [spikes.seen(203 + n, NAN, 1 + n) for n in range(4)] == [None, None, None, 201]
    assert spikes.seen(207, 9.0, 0) == 201
    spikes, _ = fed(falling())
    assert spikes.seen(201, NAN, 1) is None and spikes.seen(202, 4.0, 0) is None and not spikes.under_way
    assert set(fed([NAN] * 9, SimpleNamespace(**{**vars(PLAN), "max_loss_spike": 0.0}), 9)[1]) == {None}


def test_what_they_know_goes_through_a_checkpoint():
    losses = [*falling(), 9.0, 9.5]
    spikes, _ = fed(losses)
    again = Spikes(PLAN, json.loads(json.dumps(spikes.state)))
    assert again.state == spikes.state and again.limit() == spikes.limit()
    assert again.seen(203, 9.2, 0) == 201
    known = fed(falling(150))[0].state
    again.went_back(known, 1000, 1500)
    assert again.state == {**known, "rollbacks": 1, "skipped": [[1000, 1500]]}
    assert Spikes(SimpleNamespace(**{**vars(PLAN), "max_loss_spike": 0.0})).state is None


def test_a_run_that_goes_back_has_checkpoints_to_go_back_to(prepared, tmp_path):
    with pytest.raises(UsageError, match=r"train\.max_loss_spike .*checkpoint\.every_steps"):
        settings(prepared, tmp_path, **{"train.max_loss_spike": 5})


# The first runs of 28 steps: warm, then constant, so that losses of 20 steps tell what is usual.
LONG = {"train.max_steps": 28, "train.max_loss_spike": 30, "checkpoint.every_steps": 4, "checkpoint.keep": 3}
LONG |= {"train.learning_rate": 1e-3, "train.lr_scheduler_type": "constant"}
BAD = range(12 * 23, 12 * 26)  # samples of steps 24 to 26


def poison(monkeypatch, world, seen=None, bad=BAD, value=1e3, rank=None):
    """The loss of the samples `bad`, by their place in the order, jumps. seen: list for the positions that came."""
    at, one_step, training_step = {}, train.one_step, train.batches.Source.training_step

    def noted(self, position, *rest):
        made = training_step(self, position, *rest)
        at[id(made)] = position, made
        return made

    def poisoned(placed, adjust, micro_batches, *rest):
        position, _ = at[id(micro_batches)]
        if seen is not None:
            seen.append(position)
        loss_sum, *others = one_step(placed, adjust, micro_batches, *rest)
        jumps = position in bad and rank in (None, world.rank)
        return (loss_sum + value * len(micro_batches) if jumps else loss_sum, *others)

    monkeypatch.setattr(train.batches.Source, "training_step", noted)
    monkeypatch.setattr(train, "one_step", poisoned)


def events(folder, name):
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == name]


def same(base, ours, theirs, step):
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (base / ours / f"checkpoint-{step}" / file).read_bytes() == (
            base / theirs / f"checkpoint-{step}" / file
        ).read_bytes(), file
    states = [checkpoint.read_state(base / name / f"checkpoint-{step}") for name in (ours, theirs)]
    assert states[0]["samples"] == states[1]["samples"] and states[0]["spikes"] == states[1]["spikes"]


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize("sharding", ["auto", "none", "full"])
def test_a_run_goes_back_before_the_spike_and_leaves_out_the_samples(world, prepared, tmp_path, monkeypatch, sharding):
    base, seen = shared(world, tmp_path), []
    run = settings(prepared, base / "run", **LONG, **{"parallel.sharding": sharding})
    with monkeypatch.context() as patch:
        poison(patch, world, seen)
        results = train.train(run, world)
    world.comm.Barrier()
    # Steps 24 to 26 are the spike; the newest checkpoint before is that of step 20, none was made at 24.
    assert seen == [*range(0, 12 * 26, 12), *range(12 * 26, 12 * 34, 12)]
    assert results["step"] == 28 and results["samples"] == 12 * 34
    assert [event["step"] for event in events(base / "run", "checkpoint")] == [4, 8, 12, 16, 20, 20, 24, 28]
    [event] = events(base / "run", "rollback")
    told = {name: event[name] for name in ("step", "to", "first", "left_out", "rollbacks")}
    assert told == {"step": 26, "to": 20, "first": 24, "left_out": [12 * 20, 12 * 26], "rollbacks": 1}
    assert checkpoint.read_state(base / "run" / "checkpoint-28")["spikes"]["skipped"] == [[12 * 20, 12 * 26]]
    # As a run that had been at step 20 and that place in the data from the start, bit by bit.
    first = settings(prepared, base / "plain", **{**LONG, "train.max_steps": 20}, **{"parallel.sharding": sharding})
    train.train(first, world)
    world.comm.Barrier()
    if world.is_root:
        file = base / "plain" / "checkpoint-20" / "trainer_state.json"
        state = json.loads(file.read_text()) | {"samples": 12 * 26}
        file.write_text(json.dumps(state))
        listed = json.loads((file.parent / ".complete").read_text())
        listed["files"][file.name] = {"bytes": file.stat().st_size, "sha256": files.digest(file)}
        (file.parent / ".complete").write_text(json.dumps(listed))
    world.comm.Barrier()
    train.train(settings(prepared, base / "plain", **LONG, **{"parallel.sharding": sharding}), world, resume=True)
    world.comm.Barrier()
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, expected = ((base / name / "checkpoint-28" / file).read_bytes() for name in ("run", "plain"))
        assert ours == expected


@pytest.mark.mpi(max_size=2)
def test_who_goes_back_to_where_an_evaluation_was_owed_makes_it_up(world, prepared, tmp_path, monkeypatch):
    base, seen = shared(world, tmp_path), []
    run = settings(prepared, base / "run", **LONG, **{"train.eval_every_steps": 20})
    poison(monkeypatch, world, seen)
    monkeypatch.setattr(stopping.Requests, "heard", lambda *_: 100 + signal.SIGUSR1 if seen[-1] == 12 * 19 else 0)
    assert train.train(run, world)["stopped"] == "SIGUSR1"
    assert train.train(run, world, resume=True)["step"] == 28
    world.comm.Barrier()
    assert [event["to"] for event in events(base / "run", "rollback")] == [20]
    told = [json.loads(line) for line in (base / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [(record["step"], record["eval_loss"]) for record in told if "eval_loss" in record]
    assert [step for step, _ in told] == [20, 20, 28] and told[0] == told[1]
    states = {step: checkpoint.read_state(base / "run" / f"checkpoint-{step}") for step in (20, 24, 28)}
    assert {step: state["unmeasured"] for step, state in states.items()} == {20: True, 24: False, 28: False}


class Killed(Exception):
    pass


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize("step", [25, 27])
def test_a_run_killed_around_a_spike_goes_the_same_way(world, prepared, tmp_path, monkeypatch, step):
    base, killed = shared(world, tmp_path), settings(prepared, shared(world, tmp_path) / "killed", **LONG)
    with monkeypatch.context() as patch:
        poison(patch, world)
        train.train(settings(prepared, base / "whole", **LONG), world)
    with monkeypatch.context() as patch:
        poison(patch, world)
        one_step, steps = train.one_step, []

        def ended(*arguments):
            steps.append(None)
            if len(steps) == step:
                raise Killed
            return one_step(*arguments)

        patch.setattr(train, "one_step", ended)
        with pytest.raises(Killed):
            train.train(killed, world)
    world.comm.Barrier()
    with monkeypatch.context() as patch:
        poison(patch, world)
        train.train(killed, world, resume=True)
    world.comm.Barrier()
    same(base, "killed", "whole", 28)


@pytest.mark.mpi(max_size=2)
def test_steps_that_are_no_number_have_a_run_go_back_too_and_one_rank_is_enough(world, prepared, tmp_path, monkeypatch):
    base = shared(world, tmp_path)
    how = {**LONG, "train.max_nonfinite_steps": 1, "train.max_steps": 12}
    poison(monkeypatch, world, bad=range(12 * 9, 12 * 11), value=NAN, rank=world.size - 1)
    train.train(settings(prepared, base / "run", **how), world)
    world.comm.Barrier()
    [event] = events(base / "run", "rollback")
    assert [event[name] for name in ("step", "to", "first")] == [11, 8, 10]


@pytest.mark.mpi(max_size=2)
def test_a_run_that_keeps_going_back_has_diverged(world, prepared, tmp_path, monkeypatch):
    base = shared(world, tmp_path)
    how = {**LONG, "train.max_rollbacks": 2, "train.max_spike_steps": 2}
    poison(monkeypatch, world, bad=range(12 * 23, 10**9))
    with pytest.raises(Diverged, match=r"since step 21, and the run has gone back 2 times .*checkpoint-20"):
        train.train(settings(prepared, base / "run", **how), world)
    world.comm.Barrier()
    assert [event["rollbacks"] for event in events(base / "run", "rollback")] == [1, 2]


@pytest.mark.mpi(max_size=2)
def test_without_a_checkpoint_before_the_spike_a_run_has_diverged(world, prepared, tmp_path, monkeypatch):
    how = {**LONG, "checkpoint.every_steps": 100}
    poison(monkeypatch, world)
    with pytest.raises(Diverged, match="no checkpoint of a step before that"):
        train.train(settings(prepared, shared(world, tmp_path) / "run", **how), world)


def test_what_is_gone_back_from_is_deleted_and_what_is_damaged_set_aside(tmp_path, monkeypatch):
    def made(step, best=None):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"step": step, "best": best and {"step": best}}))
        for name in ("config.json", "model.safetensors", "optimizer.safetensors"):
            (folder / name).write_text("{}")
        told = {file.name: {"bytes": file.stat().st_size, "sha256": files.digest(file)} for file in folder.iterdir()}
        (folder / ".complete").write_text(json.dumps({"files": told}))
        return folder

    made(10, best=5), made(20), made(30), made(40)
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text("{")
    assert run_folder.go_back(tmp_path, 10) == (None, None)
    assert len(checkpoint.find(tmp_path)) == 4
    path, state = run_folder.go_back(tmp_path, 30)
    assert path == tmp_path / "checkpoint-10" and state["best"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "damaged-checkpoint-20", "latest"}
    assert (tmp_path / "latest").resolve() == path
    assert run_folder.go_back(tmp_path, 11)[0] == path


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("what", ["weights", "moments"])
def test_what_is_not_finite_on_any_rank_is_not_saved(world, prepared, tmp_path, monkeypatch, asynchronous, what):
    base, one_step, steps = shared(world, tmp_path), train.one_step, []
    run = settings(prepared, base / "run", **{
        "checkpoint.every_steps": 1, "checkpoint.keep": 9, "checkpoint.asynchronous": asynchronous,
        "parallel.sharding": "host" if world.size > 1 else "none", "train.eval_every_steps": 0,
    })  # fmt: skip

    def broken(placed, adjust, *rest):
        found = one_step(placed, adjust, *rest)
        steps.append(None)
        if world.rank == world.size - 1 and len(steps) in (3, 4):
            if len(steps) == 4:
                time.sleep(0.3)  # the copy of step 3 may be under way: no optimizer has stepped, and waited for it
            parameter = next(parameter for parameter in placed.parameters() if parameter.numel())
            tensor = parameter.detach() if what == "weights" else adjust.state[parameter]["exp_avg_sq"]
            kept.append(float(tensor.view(-1)[0])) if len(steps) == 3 else None
            tensor.view(-1)[0] = float("inf") if len(steps) == 3 else kept[0]
        return found

    kept = []
    monkeypatch.setattr(train, "one_step", broken)
    train.train(run, world)
    world.comm.Barrier()
    assert [event["step"] for event in events(base / "run", "unfit")] == [3]
    assert [checkpoint.step_of(path) for path in checkpoint.find(base / "run")] == [1, 2, 4, 5, 6]
    assert not list((base / "run").glob(".*"))
    # A run whose last checkpoint is none says so, instead of ending with an older one as its result.
    steps.clear()
    with pytest.raises(Diverged, match=r"step 3: .* no longer finite.*checkpoint-2"):
        train.train(settings(prepared, base / "short", **{"train.max_steps": 3, "checkpoint.every_steps": 2}), world)


def test_finite_numbers_whose_sum_is_not_are_finite():
    assert saving.finite(torch.full((4,), 3e38)) and saving.finite(torch.zeros(0)) and saving.finite(torch.tensor(3))
    assert not saving.finite(torch.tensor([1.0, NAN])) and not saving.finite(
        torch.tensor([float("inf"), -float("inf")])
    )
