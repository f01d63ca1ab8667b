"""What a spool holds is whole, whatever a kill left of it, and a folder belongs to one run and one plan."""

import os
import subprocess
import sys

import pytest

from hpcllm.errors import CannotCreate
from hpcllm.rows import spool


def write(path, answers):
    written = spool.Spool(path)
    for unit, payload in answers.items():
        written.append(unit, payload.count(b"\n"), payload)
    written.close()
    return written.records


def read(path):
    with open(path, "rb") as file:
        return {unit: spool.payload(file, unit, record) for unit, record in spool.records(path).items()}


ANSWERS = {7: b'{"a": 1}\n{"a": 2}\n', 0: b"", 300_000: b'{"b": "\xc3\xa9"}\n'}


def test_records_come_back(tmp_path):
    assert write(str(tmp_path / "s"), ANSWERS) == spool.records(str(tmp_path / "s"))
    assert read(str(tmp_path / "s")) == ANSWERS
    assert [record.rows for record in spool.records(str(tmp_path / "s")).values()] == [2, 0, 1]


def test_a_record_outlives_its_process_from_the_moment_it_is_appended(tmp_path):
    written = spool.Spool(str(tmp_path / "s"))
    for unit, payload in ANSWERS.items():
        written.append(unit, 1, payload)
        assert list(read(str(tmp_path / "s")))[-1] == unit
    written.close()


def test_a_spool_cut_anywhere_gives_the_records_before_the_cut(tmp_path):
    path = str(tmp_path / "s")
    ends = [record.offset + record.size for record in write(path, ANSWERS).values()]
    for size in range(os.path.getsize(path), -1, -1):
        os.truncate(path, size)
        whole = sum(end <= size for end in ends)
        assert read(path) == dict(list(ANSWERS.items())[:whole])


def test_one_wrong_byte_loses_its_record_and_what_follows_only(tmp_path):
    path = tmp_path / "s"
    ends = [record.offset + record.size for record in write(str(path), ANSWERS).values()]
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        whole = sum(end <= place for end in ends)
        assert read(str(path)) == dict(list(ANSWERS.items())[:whole])
    path.write_bytes(content + bytes(1000))  # what a machine that lost its power may leave
    assert read(str(path)) == ANSWERS


def test_answers_that_changed_since_they_were_found_are_not_passed_on(tmp_path):
    path = str(tmp_path / "s")
    records = write(path, ANSWERS)
    with open(path, "r+b") as file:
        file.seek(records[7].offset + 3)
        file.write(b"?")
        with pytest.raises(OSError, match=r"unit 7 in .* damaged"):
            spool.payload(file, 7, records[7])


# --- the folder --------------------------------------------------------------------------------------------------


@pytest.fixture
def claim(tmp_path):
    """claim(plan, overwrite=False): as a run of its own would."""

    def claim(plan, overwrite=False):
        partial = spool.Partial(tmp_path / "out.jsonl")
        try:
            return partial.claim(plan, overwrite)
        finally:
            partial.release()

    return claim


def test_a_restart_finds_the_spools_of_all_runs_before(claim, tmp_path):
    partial = spool.Partial(tmp_path / "out.jsonl")
    paths = []
    for turn in (1, 2, 3):
        run, spools = claim({"model": "a"})
        assert run == turn and spools == paths
        for rank in (0, 1):
            paths.append(partial.spool(run, rank).path)


def test_another_plan_is_refused_with_what_differs(claim, tmp_path):
    run, _ = claim({"model": "a", "top k": "5"})
    path = spool.Partial(tmp_path / "out.jsonl").spool(run, 0).path
    assert claim({"model": "b", "top k": "5"}) == (1, [])  # nothing was answered yet: nothing to lose
    write(str(tmp_path / ".out.jsonl.partial" / "spool-0001-000001"), ANSWERS)
    with pytest.raises(
        CannotCreate, match=r"another run, which had model b \(now c\), tokens \(none\) \(now 3\); go on"
    ):
        claim({"model": "c", "top k": "5", "tokens": "3"})
    assert claim({"model": "b", "top k": "5"})[0] == 2
    assert claim({"model": "c"}, overwrite=True) == (1, []) and not os.path.exists(path)
    assert claim({"model": "c"}) == (1, [])


HOLD = """
import sys
from hpcllm.rows import spool
partial = spool.Partial(sys.argv[1])
partial.claim({}, False)
print("here", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder_and_a_killed_one_holds_nothing(claim, tmp_path):
    job = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "out.jsonl"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with job:
        assert job.stdout.readline() == "here\n"
        with pytest.raises(CannotCreate, match="another run is at work"):
            claim({}, overwrite=True)
        job.kill()
    assert claim({}) == (1, [])


def test_a_folder_that_is_removed_while_its_lock_is_taken_is_not_used(claim, tmp_path, monkeypatch):
    lockf = spool.fcntl.lockf

    def removed_before(*arguments):
        os.rename(tmp_path / ".out.jsonl.partial", tmp_path / "removed")
        return lockf(*arguments)

    monkeypatch.setattr(spool.fcntl, "lockf", removed_before)
    with pytest.raises(CannotCreate, match="or has just ended"):
        claim({})


def test_a_file_system_without_locks_is_named(claim, monkeypatch, capfd):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(spool.fcntl, "lockf", none)
    assert claim({}) == (1, [])
    assert "cannot be locked (Function not implemented)" in capfd.readouterr().err
