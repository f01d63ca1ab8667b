"""The folder of a run belongs to one job at a time, and what is damaged in it stands aside."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from hpcllm import checkpoint, run_folder
from hpcllm.errors import CannotCreate, DataError

HOLDS = """
import sys, time
from hpcllm import run_folder
run_folder.lock(sys.argv[1])
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder(tmp_path):
    """holder(seconds): another process that has the run in tmp_path for so long."""
    begun = []

    def hold(seconds):
        other = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path, str(seconds)], stdout=subprocess.PIPE)
        begun.append(other)
        assert other.stdout.readline() == b"locked\n"
        return other

    yield hold
    for other in begun:
        other.kill()
        other.communicate()
    run_folder.unlock()


@pytest.fixture
def resumed(tmp_path):
    """What `find_start` is told of a run in tmp_path."""
    (tmp_path / "events.jsonl").touch()
    sections = {"run": SimpleNamespace(output_dir=str(tmp_path), max_fruitless_starts=0)}
    return SimpleNamespace(**sections, train=SimpleNamespace(max_steps=3))


def test_a_second_job_is_refused_and_changes_nothing(tmp_path, holder, resumed, monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE_S", 0.5)
    other = holder(600)
    (tmp_path / ".checkpoint-2.4711-x.tmp").mkdir()  # which the other one is writing
    for how in ((True, False), (False, True)):
        with pytest.raises(CannotCreate, match=r"another job trains in .*; one at a time") as caught:
            run_folder.find_start(resumed, *how)
        assert caught.value.code == 73
    with pytest.raises(CannotCreate, match=rf"process {other.pid} on .* since 20.*delete {tmp_path}/lock"):  # a new run
        run_folder.open_output(resumed, resume=False, overwrite=False)
    assert (tmp_path / ".checkpoint-2.4711-x.tmp").is_dir()
    other.kill()
    assert run_folder.find_start(resumed, True, False)[0] is None


def test_a_job_that_has_just_ended_is_waited_for_and_a_run_that_is_left_is_free(tmp_path, holder, resumed, capsys):
    holder(1.0)
    run_folder.find_start(resumed, True, False)
    assert f"{tmp_path}: waits for another job that trains in it, or has just ended" in capsys.readouterr().out
    run_folder.lock(tmp_path)  # ours already
    run_folder.unlock()
    holder(600)


@pytest.mark.parametrize(
    ("now", "over"),
    [
        ({"HPCLLM_LAUNCH": "2"}, True),
        ({"SLURM_RESTART_COUNT": "1"}, True),
        ({"HPCLLM_LAUNCH": "1"}, False),  # two starts of one job at once
        ({"HPCLLM_LAUNCH": "0"}, False),
        ({"SLURM_JOB_ID": "471", "HPCLLM_LAUNCH": "2"}, False),
    ],
)
def test_what_an_earlier_start_of_the_same_job_has_left_locked_is_taken(
    tmp_path, holder, resumed, monkeypatch, capsys, now, over
):
    """Some file servers keep the locks of a node that has died."""
    monkeypatch.setattr(run_folder, "_PATIENCE_S", 0.5)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("HPCLLM_LAUNCH", "1")
    holder(600)
    before = (tmp_path / "lock").read_text()
    assert before.startswith("job 4711, start 0.1, on ")
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    if over:
        run_folder.find_start(resumed, True, False)
        assert "is over, and has left its lock behind" in capsys.readouterr().out
        assert (tmp_path / "lock").read_text() != before
    else:
        with pytest.raises(CannotCreate, match=r"\(job 4711, start 0.1, on "):
            run_folder.find_start(resumed, True, False)
        assert (tmp_path / "lock").read_text() == before


def test_a_lock_whose_file_somebody_has_removed_is_none(tmp_path, monkeypatch):
    lockf, path, removed = run_folder.fcntl.lockf, tmp_path / "lock", []

    def late(*arguments):
        if not removed:
            path.unlink()
            removed.append(path)
        return lockf(*arguments)

    monkeypatch.setattr(run_folder.fcntl, "lockf", late)
    run_folder.lock(tmp_path, 5)
    assert path.read_text().startswith("process ")
    run_folder.unlock()


def test_a_folder_with_nothing_but_a_lock_is_free(tmp_path, resumed):
    (tmp_path / "events.jsonl").unlink()
    (tmp_path / "lock").touch()  # of a start that was killed before it wrote anything
    assert run_folder.find_start(resumed, True, False)[0] is None


def test_a_file_system_without_locks_is_told_of(tmp_path, resumed, capsys, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "lockf", none)
    run_folder.find_start(resumed, True, False)
    assert "cannot be locked (Function not implemented): start no second job" in capsys.readouterr().out


def test_the_newest_good_checkpoint_stands_and_damaged_ones_aside(tmp_path, monkeypatch):
    assert run_folder.newest_good(tmp_path) is None
    bad = {"checkpoint-8", "checkpoint-12"}

    def verify(path):
        if path.name in bad:
            raise DataError(f"{path}: spoilt")

    monkeypatch.setattr(checkpoint, "verify", verify)
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoint.COMPLETE).touch()
    assert run_folder.newest_good(tmp_path) == tmp_path / "checkpoint-4"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-4", "damaged-checkpoint-8", "damaged-checkpoint-12", "latest"}
    assert (tmp_path / "latest").resolve().name == "checkpoint-4"
    bad.add("checkpoint-4")
    with pytest.raises(DataError, match="there is no older one"):
        run_folder.newest_good(tmp_path)
