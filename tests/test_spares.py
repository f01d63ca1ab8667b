"""Spares take the places of ranks that die: the run keeps its size, and its weights are those of a run so continued."""

import json
import subprocess
import time

import pytest
from pydantic import ValidationError
from test_recovery import LARGE, ended_well, events, job  # noqa: F401 (a fixture)

from benchmarks.restart import differing_bytes
from hpcllm import checkpoint, recovery
from hpcllm.config import Resilience

ONE, TWO = {"resilience.spares": 1}, {"resilience.spares": 2}


def same(folder, *runs):
    for name in LARGE:
        where = [folder / run / "checkpoint-12" / name for run in runs]
        assert differing_bytes(*where)[0] == 0, name


def test_the_run_keeps_its_size_and_ends_where_one_that_was_continued_at_the_same_size_does(job, tmp_path):  # noqa: F811
    done = job("dying", 5, ["collective:4:0", "applied:8:2"], **TWO)
    ended_well(done, tmp_path / "dying")
    assert "3 ranks and 2 spares on 1 host" in done.stdout
    assert "rank 0 on" in done.stdout and "died in step 4; rank 3 on" in done.stdout
    assert "comes in, 3 ranks go on (" in done.stdout
    told = [(each["ranks"], each["joined"], each["left"], each["spares"]) for each in events(tmp_path / "dying", "died")]
    assert told == [([0], [3], 3, 1), ([2], [4], 3, 0)]
    for step in (3, 8, 12):
        part = {"train.max_steps": step, "parallel.sharding": "none"}
        assert job("steady", 3, (), "--resume", ft=False, **part).returncode == 0
    same(tmp_path, "dying", "steady")


def test_a_spare_that_dies_waiting_or_coming_in_is_done_without(job, tmp_path):  # noqa: F811
    # The last one dies as it waits; then rank 1, and the spare in its place, which has not taken a step, with it.
    done = job("dying", 5, ["spare:4:0", "clip:7:1", "share:0:3"], **TWO, **{"train.global_batch_size": 24})
    ended_well(done, tmp_path / "dying")
    told = [(each["ranks"], each["joined"], each["left"], each["spares"]) for each in events(tmp_path / "dying", "died")]
    assert told == [([4], [], 3, 1), ([1, 3], [], 2, 0)]


@pytest.mark.parametrize("sharding", ["full", "host"])
def test_where_weights_are_divided_the_spare_reads_the_newest_checkpoint_with_the_others(job, tmp_path, sharding):  # noqa: F811
    how = {"parallel.sharding": sharding, "checkpoint.asynchronous": "false", "checkpoint.every_steps": 4}
    done = job("dying", 3, ["clip:6:0"], **how, **ONE)
    ended_well(done, tmp_path / "dying")
    assert "comes in, 2 ranks go on from step 4 (" in done.stdout
    for step in (4, 12):
        assert job("steady", 2, (), "--resume", ft=False, **how, **{"train.max_steps": step}).returncode == 0
    same(tmp_path, "dying", "steady")


def test_copies_of_what_is_cut_are_saved_by_those_that_have_them_and_read_by_the_spare_too(job, tmp_path):  # noqa: F811
    done = job("dying", 5, ["clip:6:1"], **{"parallel.tensor": 2}, **ONE)
    ended_well(done, tmp_path / "dying")
    assert "comes in, 4 ranks go on (" in done.stdout
    for step in (5, 12):
        part = {"train.max_steps": step, "parallel.tensor": 2}
        assert job("steady", 4, (), "--resume", ft=False, **part).returncode == 0
    same(tmp_path, "dying", "steady")


def test_spares_leave_with_the_others_however_these_end(job, tmp_path):  # noqa: F811
    (tmp_path / "stopped").mkdir()
    began = time.monotonic()
    done = job("stopped", 3, (), **ONE, **{"run.time_limit": "00:00:05"})
    assert done.returncode == 75, done.stdout + done.stderr
    refused = job("refused", 3, (), **ONE, **{"data.validation": str(tmp_path / "nowhere")})
    assert refused.returncode == 66 and refused.stderr.count("hpcllm: error:") == 1, refused.stderr
    assert "have not" not in refused.stderr
    fatal = job("fatal", 3, ["clip:1:1"], **ONE)
    assert fatal.returncode not in (0, 75), fatal.stdout
    assert time.monotonic() - began < 100


def test_spares_are_refused_where_they_could_not_come_in(job, tmp_path):  # noqa: F811
    refused = job("refused", 2, (), ft=False, **ONE)
    assert refused.returncode == 2
    assert "resilience: spares = 1 needs Open MPI 5 and a job that was started with mpirun --with-ft" in refused.stderr
    refused = job("none", 2, (), **TWO)
    assert refused.returncode == 2
    assert "resilience: spares = 2 of 2 ranks leaves none that trains" in refused.stderr
    with pytest.raises(ValidationError, match="shrink = false has a death end the job"):
        Resilience(spares=1, shrink=False)


def test_a_run_grows_where_a_job_on_more_ranks_goes_on(job, tmp_path):  # noqa: F811
    for run, text in (("grown", "3\n"), ("same", "2")):
        (tmp_path / run).mkdir()
        assert job(run, 2, (), ft=False, **{"train.max_steps": 1}).returncode == 0
        (tmp_path / run / "GROW").write_text(text)
    done = job("grown", 2, (), "--resume", ft=False, **{"train.max_steps": 2000})
    assert done.returncode == 75, done.stdout + done.stderr
    assert "(the file GROW: it is to go on with 3 ranks), saved in" in done.stdout
    assert not (tmp_path / "grown" / "GROW").exists()
    step = checkpoint.step_of(checkpoint.find(tmp_path / "grown")[-1])
    done = job("grown", 3, (), "--resume", ft=False, **{"train.max_steps": step + 2})
    assert done.returncode == 0, done.stdout + done.stderr
    done = job("same", 2, (), "--resume", ft=False, **{"train.max_steps": 3})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the file GROW names no number of ranks above the 2 that there are, and is removed" in done.stdout
    assert not (tmp_path / "same" / "GROW").exists()


def test_one_line_tells_who_came_in():
    told = recovery.sentence([2], ["n1"], 57, 4, 0.41, 56, [(4, "n2")])
    assert told == "rank 2 on n1 died in step 57; rank 4 on n2 comes in, 4 ranks go on (0.4 s)"
    told = recovery.sentence([2, 3], ["n1", "n1"], 57, 4, 0.41, 50, [(4, "n2"), (5, "n2")])
    assert told == "ranks 2, 3 on n1 died in step 57; ranks 4, 5 on n2 come in, 4 ranks go on from step 50 (0.4 s)"
