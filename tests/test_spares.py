"""Spares take the places of ranks that die: the run keeps its size, and its weights are those of a run so continued."""

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from test_recovery import LARGE, ended_well, events

from benchmarks.restart import differing_bytes
from hpcllm import checkpoint, optimizer, recovery, stopping
from hpcllm.config import Resilience

ONE, TWO = {"resilience.spares": 1}, {"resilience.spares": 2}


def told(folder):
    keys = ("ranks", "joined", "left", "spares")
    return [tuple(event[key] for key in keys) for event in events(folder, "died")]


def same(folder, *runs):
    for name in LARGE:
        where = [folder / run / "checkpoint-12" / name for run in runs]
        assert differing_bytes(*where)[0] == 0, name


def test_the_run_keeps_its_size_and_ends_where_one_that_was_continued_at_the_same_size_does(dying_job, tmp_path):
    done = dying_job("dying", 5, ["collective:4:0", "applied:8:2"], **TWO)
    ended_well(done, tmp_path / "dying")
    assert "3 ranks and 2 spares on 1 host" in done.stdout
    assert "rank 0 on" in done.stdout and "died in step 4; rank 3 on" in done.stdout
    assert "comes in, 3 ranks go on (" in done.stdout
    assert told(tmp_path / "dying") == [([0], [3], 3, 1), ([2], [4], 3, 0)]
    for step in (3, 8, 12):
        part = {"train.max_steps": step, "parallel.sharding": "none"}
        assert dying_job("steady", 3, (), "--resume", ft=False, **part).returncode == 0
    same(tmp_path, "dying", "steady")


def test_a_spare_that_dies_waiting_or_coming_in_is_done_without(dying_job, tmp_path):
    # The last one dies as it waits; then rank 1, and the spare in its place, which has not taken a step, with it.
    done = dying_job("dying", 5, ["spare:2:0", "clip:8:1", "share:0:3"], **TWO, **{"train.global_batch_size": 24})
    ended_well(done, tmp_path / "dying")
    assert told(tmp_path / "dying") == [([4], [], 3, 1), ([1, 3], [], 2, 0)]


def test_a_spare_that_is_not_needed_yet_outlives_a_second_death_while_the_others_regroup(dying_job, tmp_path):
    done = dying_job("dying", 5, ["clip:6:0", "regroup:6:1"], **TWO)
    ended_well(done, tmp_path / "dying")
    assert told(tmp_path / "dying") == [([0, 1], [3, 4], 3, 0)]


def test_a_spare_that_dies_as_it_reads_what_was_saved_of_cut_weights_is_done_without(dying_job, tmp_path):
    done = dying_job("dying", 6, ["clip:6:1", "fill:0:4"], **{"parallel.tensor": 2}, **TWO)
    ended_well(done, tmp_path / "dying")
    assert told(tmp_path / "dying") == [([1, 4], [5], 4, 0)]


def test_in_a_pipeline_too_a_spare_comes_in(dying_job, tmp_path):
    how = {"parallel.pipeline": 2, "train.micro_batch_size": 2, "checkpoint.asynchronous": "false"}
    done = dying_job("dying", 5, ["clip:6:1"], **how, **{"checkpoint.every_steps": 4}, **ONE)
    ended_well(done, tmp_path / "dying")
    assert "comes in, 4 ranks go on from step 4 (" in done.stdout


@pytest.mark.parametrize("sharding", ["full", "host"])
def test_where_weights_are_divided_the_spare_reads_the_newest_checkpoint_with_the_others(dying_job, tmp_path, sharding):
    how = {"parallel.sharding": sharding, "checkpoint.asynchronous": "false", "checkpoint.every_steps": 4}
    done = dying_job("dying", 3, ["clip:6:0"], **how, **ONE)
    ended_well(done, tmp_path / "dying")
    assert "comes in, 2 ranks go on from step 4 (" in done.stdout
    for step in (4, 12):
        assert dying_job("steady", 2, (), "--resume", ft=False, **how, **{"train.max_steps": step}).returncode == 0
    same(tmp_path, "dying", "steady")


def test_copies_of_what_is_cut_are_saved_by_those_that_have_them_and_read_by_the_spare_too(dying_job, tmp_path):
    done = dying_job("dying", 5, ["clip:6:1"], **{"parallel.tensor": 2}, **ONE)
    ended_well(done, tmp_path / "dying")
    assert "comes in, 4 ranks go on (" in done.stdout
    for step in (5, 12):
        part = {"train.max_steps": step, "parallel.tensor": 2}
        assert dying_job("steady", 4, (), "--resume", ft=False, **part).returncode == 0
    same(tmp_path, "dying", "steady")


def test_spares_leave_with_the_others_however_these_end(dying_job, tmp_path):
    done = dying_job("stopped", 3, (), **ONE, **{"run.time_limit": '"00:00:05"'})
    assert done.returncode == 75, done.stdout + done.stderr
    refused = dying_job("refused", 3, (), **ONE, **{"data.validation": str(tmp_path / "nowhere")})
    assert refused.returncode == 66 and refused.stderr.count("hpcllm: error:") == 1, refused.stderr
    assert "have not" not in refused.stderr
    fatal = dying_job("fatal", 3, ["clip:1:1"], **ONE)
    assert "done" not in fatal.stdout and fatal.returncode == 137, fatal.stdout + fatal.stderr


@pytest.mark.parametrize("spares", [0, 1])
def test_who_dies_in_the_farewell_leaves_nobody_waiting(dying_job, tmp_path, spares):
    done = dying_job("dying", 3 + spares, ["farewell:12:1"], **{"resilience.spares": spares})
    ended_well(done, tmp_path / "dying")


def test_a_spare_that_is_left_over_leaves_with_the_others(dying_job, tmp_path):
    ended_well(dying_job("dying", 5, ["clip:6:1"], **TWO), tmp_path / "dying")


def test_spares_are_refused_where_they_could_not_come_in(dying_job, tmp_path):
    refused = dying_job("refused", 2, (), ft=False, **ONE)
    assert refused.returncode == 2
    assert "resilience: spares = 1 needs Open MPI 5 and a job that was started with mpirun --with-ft" in refused.stderr
    refused = dying_job("none", 2, (), **TWO)
    assert refused.returncode == 2
    assert "resilience: spares = 2 of 2 ranks leaves none that trains" in refused.stderr
    with pytest.raises(ValidationError, match="shrink = false has a death end the job"):
        Resilience(spares=1, shrink=False)


def test_a_run_grows_where_a_job_on_more_ranks_goes_on(dying_job, tmp_path):
    folder = tmp_path / "grown"
    assert dying_job("grown", 2, (), ft=False, **{"train.max_steps": 1}).returncode == 0
    (folder / "GROW").write_text("3\n")
    done = dying_job("grown", 2, (), "--resume", ft=False, **{"train.max_steps": 2000})
    assert done.returncode == 75, done.stdout + done.stderr
    assert "(the file GROW: it is to go on with 3 ranks), saved in" in done.stdout
    assert not (folder / "GROW").exists()
    step = checkpoint.step_of(checkpoint.find(folder)[-1])
    (folder / "GROW").write_text("3")
    done = dying_job("grown", 3, (), "--resume", ft=False, **{"train.max_steps": step + 2})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the file GROW names no number of ranks above the 3 that there are, and is removed" in done.stdout
    assert not (folder / "GROW").exists()


@pytest.mark.parametrize(("text", "ranks"), [("8", 8), (" 12\n", 12), ("", 0), ("-3", 0), ("8 9", 0), ("9" * 50, 0)])
def test_a_file_with_a_number_is_heard_once(tmp_path, text, ranks):
    requests = stopping.Requests(tmp_path, looks=True, ask=lambda known: None)
    (tmp_path / "GROW").write_text(text)
    wish = stopping.wish(requests.heard())
    assert wish.ranks == ranks and wish.ends and wish.code == 75
    assert not (tmp_path / "GROW").exists()
    assert stopping.wish(requests.heard()) is None


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_who_has_no_state_of_the_optimizer_yet_gets_that_of_root_bit_for_bit(world, kind):
    torch.manual_seed(world.rank)
    model = torch.nn.Linear(5, 3)
    plan = SimpleNamespace(optimizer=kind, learning_rate=0.1, weight_decay=0.01, layerwise_lr_decay=1.0)
    plan.sgd_momentum, plan.adam_beta1, plan.adam_beta2, plan.adam_epsilon = 0.9, 0.9, 0.99, 1e-8
    adjust = optimizer.build(model, plan)
    for _ in range(0 if world.rank == 1 else 2 + world.rank):
        model(torch.rand(2, 5)).sum().backward()
        adjust.step()
    optimizer.share(adjust, world.comm, world.group)
    held = [{key: value.tolist() for key, value in adjust.state[p].items()} for p in model.parameters()]
    assert held == world.comm.bcast(held) and all(held)


@pytest.mark.mpi(min_size=2)
def test_the_last_ranks_are_spares(world):
    from hpcllm.mpi import survive

    job = survive.known(world.comm.Dup())
    assert survive.first(job, world.size) is job and survive.whole(job)
    comm = survive.first(job, world.size - 1)
    assert comm is None if world.rank == world.size - 1 else (comm.rank, comm.size) == (world.rank, world.size - 1)
    survive._known.clear()


def test_one_line_tells_who_came_in():
    told = recovery.sentence([2], ["n1"], 57, 4, 0.41, 56, [(4, "n2")])
    assert told == "rank 2 on n1 died in step 57; rank 4 on n2 comes in, 4 ranks go on (0.4 s)"
    told = recovery.sentence([2, 3], ["n1", "n1"], 57, 4, 0.41, 50, [(4, "n2"), (5, "n2")])
    assert told == "ranks 2, 3 on n1 died in step 57; ranks 4, 5 on n2 come in, 4 ranks go on from step 50 (0.4 s)"
