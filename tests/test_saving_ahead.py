"""Checkpoints that are written while training goes on: the same bytes, of the moment they were asked for."""

import contextlib
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from mpi4py import MPI
from test_stopping import records
from test_train import settings, shared

from hpcllm import blocks, checkpoint, saving, train
from hpcllm.errors import DataError, IOFailure
from tests.faults.rows import flip

FILES = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture
def slow_disk(monkeypatch):
    """A function: from then on nothing is written before what it returns, an event, is set."""

    def begin():
        goes, write = threading.Event(), blocks.write

        def waiting(*arguments):
            assert goes.wait(30)
            return write(*arguments)

        monkeypatch.setattr(blocks, "write", waiting)
        return goes

    return begin


@pytest.mark.mpi()
@pytest.mark.parametrize("sharding", ["auto", "none", "full"])
def test_they_are_the_bytes_of_those_that_training_waits_for(world, prepared, tmp_path, sharding):
    base = shared(world, tmp_path)
    how = {"checkpoint.every_steps": 1, "checkpoint.keep": 9, "parallel.sharding": sharding}
    for name, ahead in (("ahead", "true"), ("waited", "false")):
        train.train(settings(prepared, base / name, **how, **{"checkpoint.asynchronous": ahead}), world)
    if world.is_root:
        for step in range(1, 7):
            checkpoint.verify(base / "ahead" / f"checkpoint-{step}")
            for file in FILES:
                ours, theirs = (base / name / f"checkpoint-{step}" / file for name in ("ahead", "waited"))
                assert ours.read_bytes() == theirs.read_bytes(), (step, file)


@pytest.mark.mpi()
def test_training_goes_on_while_the_disk_is_slow_and_waits_where_the_next_is_due(
    world, prepared, tmp_path, slow_disk, monkeypatch
):
    base, seen = shared(world, tmp_path), []
    run = settings(prepared, base / "run", **{"checkpoint.every_steps": 3, "train.max_steps": 8})
    goes, one_step = slow_disk(), train.one_step

    def counting(*arguments):
        seen.append(len(list((base / "run").glob("checkpoint-*"))))
        if len(seen) == 6:
            goes.set()
        return one_step(*arguments)

    monkeypatch.setattr(train, "one_step", counting)
    train.train(run, world)
    assert seen[:6] == [0] * 6  # that of step 3 has not come before
    world.comm.Barrier()
    assert {path.name for path in (base / "run").glob("*checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}


@pytest.mark.mpi()
def test_the_optimizer_waits_for_the_copy(world, prepared, tmp_path, monkeypatch):
    base = shared(world, tmp_path)
    how = {"checkpoint.every_steps": 2, "train.max_steps": 4, "checkpoint.keep": 9}
    train.train(settings(prepared, base / "quick", **how), world)
    stretches = checkpoint.stretches

    def slowly(*arguments):
        threading.Event().wait(0.5)
        yield from stretches(*arguments)

    monkeypatch.setattr(checkpoint, "stretches", slowly)
    train.train(settings(prepared, base / "slow", **how), world)
    for file in FILES:
        ours, theirs = (base / name / "checkpoint-2" / file for name in ("slow", "quick"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.mpi()
def test_what_one_rank_cannot_write_all_ranks_hear_of_at_the_edge_of_a_step(world, prepared, tmp_path, monkeypatch):
    base, write = shared(world, tmp_path), blocks.write
    run = settings(prepared, base / "run", **{"checkpoint.every_steps": 2, "train.max_steps": 100})
    tried = []

    def failing(*arguments):
        tried.append(None)
        if len(tried) > 2 and world.rank == world.size - 1:  # the second checkpoint; each has two files
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(blocks, "write", failing)
    with pytest.raises(IOFailure, match="checkpoint-4: No space left on device"):
        train.train(run, world)
    world.comm.Barrier()
    assert {path.name for path in (base / "run").glob("*checkpoint-*")} == {"checkpoint-2"}


@pytest.mark.mpi()
@pytest.mark.parametrize("when", ["unread", "finish"])
@pytest.mark.parametrize("what", ["", "optimizer.safetensors"])
def test_what_vanishes_while_it_is_written_is_no_checkpoint(world, prepared, tmp_path, monkeypatch, when, what):
    base, then = shared(world, tmp_path), getattr(checkpoint, when)
    run = settings(prepared, base / "run", **{"checkpoint.every_steps": 2, "train.max_steps": 100})

    def vanishing(hidden, *arguments):
        if world.is_root and hidden.name.startswith(".checkpoint-4"):
            shutil.rmtree(hidden) if not what else (hidden / what).unlink()
        return then(hidden, *arguments)

    monkeypatch.setattr(checkpoint, when, vanishing)
    with pytest.raises(IOFailure, match=r"checkpoint-4.*: No such file or directory"):
        train.train(run, world)
    world.comm.Barrier()
    assert {path.name for path in (base / "run").glob("*checkpoint-*")} == {"checkpoint-2"}


@pytest.mark.mpi()
def test_a_run_that_diverges_leaves_the_checkpoint_that_was_under_way(
    world, prepared, tmp_path, slow_disk, monkeypatch
):
    base, one_step, steps = shared(world, tmp_path), train.one_step, []
    run = settings(prepared, base / "run", **{"checkpoint.every_steps": 2, "train.max_nonfinite_steps": 0})
    goes = slow_disk()

    def diverging(*arguments):
        steps.append(None)
        if len(steps) == 3:
            goes.set()
            return float("nan"), *one_step(*arguments)[1:]
        return one_step(*arguments)

    monkeypatch.setattr(train, "one_step", diverging)
    with pytest.raises(train.Diverged, match=r"newest checkpoint: .*checkpoint-2"):
        train.train(run, world)
    world.comm.Barrier()
    assert (base / "run" / "checkpoint-2" / ".complete").is_file()


@pytest.fixture
def spoiling(monkeypatch):
    """A function: from then on what is called is spoilt on its way to the disk, after its digests were taken."""

    finish = checkpoint.finish

    def begin(*names):
        def spoilt(hidden, path, *arguments):
            finish(hidden, path, *arguments)
            if path.name in names:
                weights = path / "model.safetensors"
                flip(weights, weights.stat().st_size - 2, 16)

        monkeypatch.setattr(checkpoint, "finish", spoilt)

    return begin


@pytest.mark.mpi()
@pytest.mark.parametrize("ahead", ["true", "false"])
def test_older_ones_stay_while_the_newest_does_not_read_as_it_was_written(world, prepared, tmp_path, spoiling, ahead):
    base = shared(world, tmp_path)
    how = {"checkpoint.every_steps": 10, "train.max_steps": 50, "checkpoint.asynchronous": ahead}
    spoiling("checkpoint-30")
    train.train(settings(prepared, base / "run", **how), world)
    world.comm.Barrier()
    names = {path.name for path in (base / "run").glob("*checkpoint-*")}
    assert names == {"checkpoint-40", "checkpoint-50", "damaged-checkpoint-30"}
    (told,) = records(world, base / "run", "doubted")
    assert told["step"] == 30 and told["path"] == str(base / "run" / "checkpoint-30") and "SHA-256" in told["why"]


@pytest.mark.mpi()
@pytest.mark.parametrize("error", [DataError, IOFailure])
def test_what_one_rank_reads_otherwise_than_root_is_told_and_no_more(world, prepared, tmp_path, monkeypatch, error):
    base, verify = shared(world, tmp_path), checkpoint.verify

    def otherwise(path, share=None):
        if share and world.rank == world.size - 1 and path.name in ("checkpoint-30", "checkpoint-50"):
            raise error("seen by one rank")
        return verify(path, share)

    monkeypatch.setattr(checkpoint, "verify", otherwise)
    how = {"checkpoint.every_steps": 10, "train.max_steps": 50}
    assert train.train(settings(prepared, base / "run", **how), world)["step"] == 50
    told = records(world, base / "run", "doubted")
    assert [(one["step"], one["why"]) for one in told] == [(30, "seen by one rank"), (50, "seen by one rank")]
    assert {path.name for path in (base / "run").glob("*checkpoint-*")} == {"checkpoint-40", "checkpoint-50"}


@pytest.mark.mpi()
def test_a_run_whose_last_checkpoint_is_not_what_was_written_is_not_over(world, prepared, tmp_path, spoiling):
    base = shared(world, tmp_path)
    how = {"checkpoint.every_steps": 2, "train.max_steps": 6}
    spoiling("checkpoint-6")
    with pytest.raises(IOFailure, match=r"does not read as it was written.*newest checkpoint: .*checkpoint-4$"):
        train.train(settings(prepared, base / "run", **how), world)
    world.comm.Barrier()
    assert {path.name for path in (base / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    spoiling()
    assert train.train(settings(prepared, base / "run", **how), world, resume=True)["step"] == 6
    world.comm.Barrier()
    assert (base / "run" / "latest").resolve().name == "checkpoint-6"


def test_a_best_checkpoint_that_is_not_what_was_written_is_the_best_no_more(tmp_path):
    for step, known in ((10, 10), (20, 10), (30, 30)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / checkpoint.COMPLETE).touch()
        (folder / checkpoint.STATE).write_text(json.dumps({"step": step, "best": {"step": known}}))
    newest, whole = checkpoint.doubt(tmp_path / "checkpoint-30")
    assert newest == tmp_path / "checkpoint-20" and not whole and (tmp_path / "damaged-checkpoint-30").is_dir()
    told = []
    run = SimpleNamespace(
        state={"best": {"step": 30}},
        config=SimpleNamespace(run=SimpleNamespace(output_dir=tmp_path)),
        world=SimpleNamespace(comm=MPI.COMM_SELF),
        progress=SimpleNamespace(say=told.append),
        saver=SimpleNamespace(newest=newest),
        journal=SimpleNamespace(event=lambda name, **details: told.append((name, details["step"]))),
    )
    train.Run.doubted(run, DataError("its contents are not what was written"), tmp_path / "checkpoint-30")
    assert run.state["best"] == run.best == {"step": 10} and told[1] == ("doubted", 30)
    run.state["best"] = {"step": 40}  # about to be saved
    train.Run.doubted(run, DataError("its contents are not what was written"), tmp_path / "checkpoint-30")
    assert run.state["best"] == {"step": 40}


def test_what_root_reads_as_it_was_written_keeps_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    (folder / checkpoint.COMPLETE).touch()
    monkeypatch.setattr(checkpoint, "verify", lambda path: None)
    assert checkpoint.doubt(folder) == (folder, True)

    def unread(path):
        raise IOFailure("Input/output error")

    monkeypatch.setattr(checkpoint, "verify", unread)
    assert checkpoint.doubt(folder) == (folder, False)


@pytest.mark.mpi()
def test_each_byte_is_read_back_by_one_rank(world, prepared, tmp_path, monkeypatch):
    base, digests, read = shared(world, tmp_path), blocks.digests, []

    def noting(path, numbers=None, block_bytes=None, keep=True):
        numbers = numbers if numbers is None else list(numbers)
        if not keep:
            read.extend((path.parent.name, path.name, number) for number in numbers)
        return digests(path, numbers, block_bytes, keep)

    monkeypatch.setattr(blocks, "digests", noting)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 14)
    train.train(settings(prepared, base / "run", **{"checkpoint.every_steps": 2, "train.max_steps": 4}), world)
    everybody = [block for each in world.comm.allgather(read) for block in each]
    count = {file: blocks.count((base / "run" / "checkpoint-4" / file).stat().st_size) for file in FILES}
    assert min(count.values()) >= 3
    wanted = [("checkpoint-2", file, number) for file in FILES for number in range(count[file])]
    wanted += [("checkpoint-4", *block) for _, *block in wanted]
    assert sorted(everybody) == sorted(wanted)
    assert world.size == 1 or len(read) < len(everybody)


@pytest.mark.mpi()
def test_ranks_stay_together_where_root_alone_fails_to_tell_of_a_checkpoint(world, prepared, tmp_path, monkeypatch):
    base, left = shared(world, tmp_path), []

    def full(*_):
        if world.is_root:
            raise IOFailure("no room")

    def steps(run, _=None):
        run.saver._completed = full
        run.saver.begin(1, run.kept())
        with contextlib.suppress(IOFailure):
            run.saver.finish()
        left.append(run.saver.under_way)
        assert run.saver.settle()  # collective: reads it back
        left.append(run.saver.under_way)
        return {}

    monkeypatch.setattr(train.Run, "steps", steps)
    train.train(settings(prepared, base / "run"), world)
    assert left == [True, False]
    checkpoint.verify(base / "run" / "checkpoint-1")


def test_a_saver_that_has_nothing_to_do_does_nothing(tmp_path):
    saver = saving.Saver(MPI.COMM_SELF, None, None, tmp_path, tmp_path, 2, newest=Path("before"))
    saver.hold()
    saver.advance(saver.report())
    saver.finish()
    assert saver.newest == Path("before")


def a_run(**more):
    """As much of a train.Run as is asked for below."""
    stream = SimpleNamespace(stream=SimpleNamespace(digest="0"))
    known = {"config": SimpleNamespace(model_dump=lambda **_: {}), "sources": SimpleNamespace(training=stream)}
    return SimpleNamespace(**known, spikes=SimpleNamespace(state=None), **more)


def test_evaluations_that_come_before_it_is_written_are_not_in_a_checkpoint():
    state = {"samples": 3, "useful_s": 0.0, "nonfinite": 0, "best": {"step": 1, "evaluations": 0}}
    kept = train.Run.kept(a_run(state=state, world=SimpleNamespace(size=1)))
    state["best"]["evaluations"] += 1
    assert kept["best"] == {"step": 1, "evaluations": 0}


def test_root_cannot_fail_before_what_is_collective_after_a_checkpoint():
    done = []

    def full(*_, **__):
        done.append("journal")
        raise IOFailure("no room")

    run = a_run(
        requests=SimpleNamespace(took=lambda *_: None),
        journal=SimpleNamespace(event=full),
        interval=SimpleNamespace(auto=True),
        world=SimpleNamespace(is_root=False, comm=SimpleNamespace(allgather=lambda told: done.append("allgather"))),
    )
    with pytest.raises(IOFailure):
        train.Run.saved(run, 1, "path", 2.0, 1.0)
    assert done == ["allgather", "journal"]
