"""One answer a row, in order, exactly once: the same bytes for any number of ranks and of kills."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import clean_environment, find_mpirun
from small_rows import Model, make_inputs

import hpcllm.mpi
from hpcllm.data import progress
from hpcllm.errors import CannotCreate, DataError, MissingInput, UsageError
from hpcllm.rows import answer_all, spool

SCRIPT = Path(__file__).parent / "small_rows.py"


def run(folder, inputs, answer=None, **options):
    """`answer_all` into `folder`/out.jsonl on all ranks of this process's job."""
    options = {"columns": ["text"], "fingerprint": {"model": "none"}, "unit_bytes": 400, **options}
    return answer_all(
        hpcllm.mpi.join(), inputs=inputs, output=folder / "out.jsonl", answer=answer or Model(), **options
    )


@pytest.fixture
def shared(tmp_path):
    """(folder, inputs), the same on all ranks."""
    world = hpcllm.mpi.join()
    folder = Path(world.comm.bcast(str(tmp_path)))
    return folder, world.comm.bcast(make_inputs(folder) if world.is_root else None)


def answers(folder):
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def visible(folder):
    return sorted(set(os.listdir(folder)) - {"a.jsonl", "b.tsv", "c.csv", "d.txt"})


def finished(folder):
    """Ids of the rows that the spools in the hidden folder hold."""
    ids = []
    for path in sorted((folder / ".out.jsonl.partial").glob("spool-*")):
        with open(path, "rb") as file:
            for unit, record in spool.records(str(path)).items():
                ids += [json.loads(line)["id"] for line in spool.payload(file, unit, record).splitlines()]
    return ids


# --- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_every_row_is_answered_once_in_order(shared):
    folder, inputs = shared
    model = Model()
    summary = run(folder, inputs, model)
    assert [answer["id"] for answer in answers(folder)] == list(range(800))
    assert answers(folder)[0]["é"].startswith("0 é")
    comm = hpcllm.mpi.join().comm
    assert sorted(number for asked in comm.allgather(model.asked) for number in asked) == list(range(800))
    assert comm.allgather(summary) == [summary] * comm.size
    assert summary["rows"] == sum(rank["rows"] for rank in summary["ranks"]) == 800
    assert summary["units"] == sum(rank["units"] for rank in summary["ranks"]) > 40
    assert summary["reused_units"] == 0 and len(summary["ranks"]) == comm.size
    assert visible(folder) == ["out.jsonl"]


def test_the_output_is_the_same_bytes_at_1_2_3_and_4_ranks(mpirun, tmp_path):
    inputs = make_inputs(tmp_path)
    outputs = set()
    for ranks in (1, 2, 3, 4):
        (tmp_path / str(ranks)).mkdir()
        job = mpirun(
            ranks, [SCRIPT, tmp_path / str(ranks), tmp_path / f"log{ranks}", 0, *inputs], check=True, warm=True
        )
        assert len(json.loads(job.stdout)["ranks"]) == ranks
        assert "(100 %), 800 rows, " in job.stderr and f" rows/s on {ranks} rank" in job.stderr
        outputs.add((tmp_path / str(ranks) / "out.jsonl").read_bytes())
    assert len(outputs) == 1


@pytest.mark.mpi(min_size=2)
def test_no_rank_is_done_while_a_unit_waits_for_another(shared):
    """Units slow by a power law: all have begun before the first rank runs out of work; only their ends are uneven."""
    folder, inputs = shared
    comm = hpcllm.mpi.join().comm
    spans, rng = [], random.Random(comm.rank)

    def answer(rows, advance):
        began = time.monotonic()
        for done in range(len(rows)):
            time.sleep(min(0.001 * rng.paretovariate(0.7), 0.1))
            advance(done)
        spans.append((began, time.monotonic()))
        return [{}] * len(rows)

    summary = run(folder, inputs, answer)
    everywhere = comm.allgather(spans)
    assert sum(map(len, everywhere)) == summary["units"]
    first_to_end = min(each[-1][1] for each in everywhere)
    assert max(began for each in everywhere for began, _ in each) < first_to_end + 0.3  # root serves between two rows
    assert all(rank["busy_s"] > 0 and rank["idle_s"] >= 0 for rank in summary["ranks"])


@pytest.mark.mpi(min_size=2)
def test_root_hands_out_units_while_it_works_itself(shared):
    """Root's first unit lasts until the others have answered all the rest."""
    folder, inputs = shared
    world = hpcllm.mpi.join()
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    deadline = time.monotonic() + 30

    def answer(rows, advance):
        while world.is_root and len(os.pread(log, 800, 0)) < 800 - len(rows) and time.monotonic() < deadline:
            time.sleep(0.01)
            advance(0)
        os.write(log, b"." * len(rows))
        return [{}] * len(rows)

    summary = run(folder, inputs, answer)
    os.close(log)
    assert summary["ranks"][0]["units"] == 1


@pytest.mark.mpi
def test_answers_that_are_no_json_are_refused_and_half_a_surrogate_is_kept(shared):
    folder, _ = shared
    world = hpcllm.mpi.join()
    if world.is_root:
        (folder / "s.jsonl").write_text('{"text": "x", "id": "\\ud800"}\n{"text": "y"}\n')
    world.comm.Barrier()
    run(folder, [str(folder / "s.jsonl")], lambda rows, advance: [{"id": row.fields.get("id")} for row in rows])
    assert (folder / "out.jsonl").read_text() == '{"id": "\\ud800"}\n{"id": null}\n'
    with pytest.raises(DataError, match=r"s.jsonl line 1: its answer cannot be JSON"):
        run(folder, [str(folder / "s.jsonl")], lambda rows, advance: [{"p": float("nan")}] * len(rows), overwrite=True)


def test_a_log_says_how_many_rows_a_second_and_how_long_it_takes_yet(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "_REPORT_EVERY_S", 0)
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0)
    run(tmp_path, make_inputs(tmp_path), Model(seconds=0.0001))
    told = capfd.readouterr().err
    line = r"^predict: 0.0 of 0.0 MB \((\d+) %\), (\d+) rows, [\d.]+ rows/s on 1 ranks"
    shares, rows = zip(*re.findall(line + ", 0:00:\\d\\d left$", told, re.M), strict=True)
    assert sorted(map(int, rows)) == list(map(int, rows)) and len(set(rows)) > 700
    assert sorted(map(int, shares)) == list(map(int, shares)) and len(set(shares)) > 90
    assert re.findall(line + "$", told, re.M)[-1] == ("100", "800")


# --- what fails --------------------------------------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["refusal", "fault"])
def test_a_failing_answer_ends_all_ranks_alike_and_keeps_what_is_done(shared, kind):
    folder, inputs = shared
    comm = hpcllm.mpi.join().comm
    model = Model(seconds=0.001)

    def answer(rows, advance):
        for row in rows:
            if row.fields["text"].startswith("555 "):
                raise row.refusal("too long") if kind == "refusal" else ZeroDivisionError("by zero")
        return model(rows, advance)

    with pytest.raises(DataError if kind == "refusal" else (ZeroDivisionError, RuntimeError)) as failure:
        run(folder, inputs, answer)
    says = "c.csv line 157: too long" if kind == "refusal" else "by zero"
    assert says in str(failure.value) and (kind == "fault" or failure.value.agreed)
    assert not (folder / "out.jsonl").exists()
    done = set(finished(folder))
    comm.Barrier()
    again = Model()
    summary = run(folder, inputs, again)
    assert 0 < len(done) < 800 and not done & set(again.asked) and summary["reused_units"] > 0
    assert summary["rows"] == 800 and sum(rank["rows"] for rank in summary["ranks"]) == 800 - len(done)
    assert [each["id"] for each in answers(folder)] == list(range(800))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("failing", [0, -1])
def test_a_failure_reaches_a_rank_in_the_middle_of_a_long_unit(shared, failing):
    """The long unit, of 60 seconds, ends by its own `advance`, though its caller catches what it can."""
    folder, inputs = shared
    comm = hpcllm.mpi.join().comm

    def answer(rows, advance):
        if comm.rank == failing % comm.size:
            time.sleep(0.7)
            raise rows[0].refusal("no")
        for _ in range(3000):
            time.sleep(0.02)
            with contextlib.suppress(Exception):
                advance(0)
        finished.append(rows)
        return [{}] * len(rows)

    finished = []
    with pytest.raises(DataError, match=r"line \d+: no"):
        run(folder, inputs, answer)
    assert not finished


@pytest.mark.mpi
def test_a_bad_row_ends_all_ranks_with_its_sentence(shared):
    folder, inputs = shared
    world = hpcllm.mpi.join()
    if world.is_root:
        with open(inputs[0], "a") as file:
            file.write("{no json\n")
    world.comm.Barrier()
    with pytest.raises(DataError, match=r"a.jsonl line 201: not JSON") as refusal:
        run(folder, inputs)
    assert refusal.value.agreed


@pytest.mark.mpi
def test_what_cannot_be_is_refused_before_anything_is_written(shared):
    folder, inputs = shared
    world = hpcllm.mpi.join()
    if world.is_root:
        (folder / "empty.txt").touch()
        (folder / "head.csv").write_text("text\n")
    world.comm.Barrier()
    with pytest.raises(MissingInput):
        run(folder, [str(folder / "nowhere")])
    for name in ("empty.txt", "head.csv"):
        with pytest.raises(DataError, match="there is no row in it"):
            run(folder, [str(folder / name)])
    with pytest.raises(UsageError, match="there is no 'other' in it"):
        run(folder, inputs, columns=["other"])
    with pytest.raises(DataError, match=r"c.csv has no column 'other' in its header"):
        run(folder, inputs[2:3], columns=["other"])
    assert visible(folder) == ["empty.txt", "head.csv"]
    with pytest.raises(CannotCreate, match="would replace the input"):
        answer_all(
            world, inputs=inputs, output=inputs[0], answer=Model(), fingerprint={}, columns=["text"], overwrite=True
        )
    with pytest.raises(CannotCreate, match="not a file that can be overwritten"):
        answer_all(world, inputs=inputs, output=folder, answer=Model(), fingerprint={}, overwrite=True)


@pytest.mark.mpi
def test_an_output_is_replaced_only_when_asked_and_only_at_the_end(shared):
    folder, inputs = shared
    world = hpcllm.mpi.join()
    if world.is_root:
        (folder / "out.jsonl").write_text("old\n")
    world.comm.Barrier()
    with pytest.raises(CannotCreate, match=r"out.jsonl exists; give another name or --overwrite"):
        run(folder, inputs)

    def answer(rows, advance):
        assert (folder / "out.jsonl").read_text() == "old\n"
        return [{"id": 1}] * len(rows)

    run(folder, inputs, answer, overwrite=True)
    assert len(answers(folder)) == 800 and visible(folder) == ["out.jsonl"]


@pytest.mark.mpi
def test_another_model_or_input_does_not_go_on_with_these_answers(shared):
    folder, inputs = shared
    world = hpcllm.mpi.join()

    def failing(rows, advance):
        if rows[0].fields["text"].startswith("0 "):
            time.sleep(0.3)
            raise rows[0].refusal("stop")
        return Model()(rows, advance)

    for _ in range(2):  # at one rank the first unit is the first to be done
        with pytest.raises(DataError):
            run(folder, inputs[::-1], failing)
    world.comm.Barrier()
    with pytest.raises(CannotCreate, match=r"another run, which had model none \(now x\); go on"):
        run(folder, inputs[::-1], fingerprint={"model": "x"})
    if world.is_root:
        os.utime(inputs[1], (1, 1))
    world.comm.Barrier()
    with pytest.raises(CannotCreate, match=r"had input 3 .*b.tsv: tsv, \d+ bytes of .* \(now .*1970-01-01 00:00:01"):
        run(folder, inputs[::-1])
    model = Model()
    assert run(folder, inputs, model, fingerprint={"model": "x"}, overwrite=True)["reused_units"] == 0
    assert [each["id"] for each in answers(folder)] == list(range(800))


@pytest.mark.mpi
def test_an_output_that_appears_meanwhile_is_left_as_it_is(shared):
    folder, inputs = shared

    def answer(rows, advance):
        (folder / "out.jsonl").touch()
        return [{"id": 1}] * len(rows)

    with pytest.raises(CannotCreate, match=r"out.jsonl appeared while this job ran"):
        run(folder, inputs, answer)
    assert visible(folder) == [".out.jsonl.partial", "out.jsonl"] and not (folder / "out.jsonl").read_bytes()


# --- kills -------------------------------------------------------------------------------------------------------


def kill_at(ranks, folder, log, inputs, rows):
    """Start the job and kill all its ranks by SIGKILL once they have begun `rows` rows."""
    command = [*find_mpirun(), "-np", str(ranks), sys.executable, SCRIPT, folder, log, "0.002", *inputs]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    job = subprocess.Popen(list(map(str, command)), env=clean_environment(), **quiet)
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < rows:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    processes = [int(path.suffix[1:]) for path in log.parent.glob(f"{log.name}.*")]
    assert len(processes) == ranks
    for process in processes:
        os.kill(process, signal.SIGKILL)
    job.wait(30)
    return [int(line) for line in log.read_text().split()]


def test_killed_three_times_it_ends_with_the_same_bytes_and_repeats_nothing(mpirun, tmp_path):
    inputs = make_inputs(tmp_path)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    mpirun(2, [SCRIPT, tmp_path / "whole", tmp_path / "log", 0, *inputs], check=True)
    rng, done = random.Random(), []
    for turn, ranks in enumerate((2, 3, 1)):
        began = kill_at(ranks, tmp_path / "killed", tmp_path / f"log{turn}", inputs, rng.randint(60, 200))
        assert not set(began) & set(done)
        done = finished(tmp_path / "killed")
        assert len(set(done)) == len(done) < 800
        assert visible(tmp_path / "killed") == [".out.jsonl.partial"]
    assert len(list((tmp_path / "killed" / ".out.jsonl.partial").glob("spool-*"))) == 2 + 3 + 1
    job = mpirun(2, [SCRIPT, tmp_path / "killed", tmp_path / "log3", 0, *inputs], check=True)
    began = [int(line) for line in (tmp_path / "log3").read_text().split()]
    assert sorted(began + done) == list(range(800)) and len(done) > 100
    assert json.loads(job.stdout)["reused_units"] > 0
    assert (tmp_path / "killed" / "out.jsonl").read_bytes() == (tmp_path / "whole" / "out.jsonl").read_bytes()
    assert visible(tmp_path / "killed") == ["out.jsonl"]


@pytest.mark.mpi
def test_killed_while_it_writes_the_output_it_only_writes_again(shared, monkeypatch):
    folder, inputs = shared
    with monkeypatch.context() as patch:

        def stop(*_):
            raise CannotCreate("killed here")

        patch.setattr(spool.Partial, "publish", stop)
        with pytest.raises(CannotCreate, match="killed here"):
            run(folder, inputs)
    assert not (folder / "out.jsonl").exists()
    world = hpcllm.mpi.join()
    if world.is_root:  # two runs at once, where a file system has no locks, leave units twice
        spools = folder / ".out.jsonl.partial"
        shutil.copy(spools / "spool-0001-000000", spools / "spool-0002-000000")
        shutil.copy(spools / "spool-0001-000000", spools / "spool-0002-000001")
    world.comm.Barrier()
    model = Model()
    summary = run(folder, inputs, model)
    assert not model.asked and summary["reused_units"] == summary["units"] and summary["rows"] == 800
    assert [each["id"] for each in answers(folder)] == list(range(800))
    assert visible(folder) == ["out.jsonl"]
