"""No hang: whatever one rank does, the job ends in bounded time, with the right exit code, and the rank is named."""

import datetime
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launching import all_gone

from hpcllm.errors import UsageError
from hpcllm.mpi import check, progress, report, watch

JOB = Path(__file__).with_name("hang_how.py")
LIMIT_S = 30.0  # beyond the timeout, start-up excluded; seconds on a machine that has nothing else to do


@pytest.fixture
def hang(mpirun):
    """hang(how, ...) runs the job on 4 ranks and returns it, its output in `said`, having checked what it left."""

    def run(how, *arguments, timeout_s=3, n=4, **env):
        before = set(os.listdir("/dev/shm"))
        environment = {"HPCLLM_TIMEOUT_S": str(timeout_s), **env}
        result = mpirun(n, [JOB, how, *arguments], timeout=120, env=environment)
        over = time.time()
        all_gone(result, n, within_s=10)
        new = set(os.listdir("/dev/shm")) - before
        assert [name for name in new if name.startswith(("mpich_shm", "hpcllm"))] == []
        failed = re.search(r"failing at ([\d.]+)", result.said)
        if failed:
            assert over - float(failed[1]) < LIMIT_S + timeout_s
        return result

    return run


def blames(result, rank, reason):
    """One report, of all ranks, that says whom everything waits for."""
    assert result.returncode == 124, result.said
    assert len(re.findall(r"^hpcllm: ", result.said, re.MULTILINE)) == 1, result.said
    assert re.search(rf"has not ended in \d.* it waits for rank {rank}: rank {rank} .*{reason}", result.said), (
        result.said
    )
    for other in range(4):
        assert f"operations of rank {other}, newest last:" in result.said
        assert f"stacks of rank {other}:" in result.said


def test_a_stopped_rank_is_named(hang):
    result = hang("stop")
    blames(result, 2, r"is stopped \(SIGSTOP\)")
    assert result.said.count("all_reduce float32 [5, 3] #16 of group 0, took") == 4
    assert len(re.findall(r"all_reduce float32 \[5, 3\] #17 of group 0, not ended", result.said)) == 3
    assert len(re.findall(r'File ".*hang_how.py", line \d+ in <module>', result.said)) == 3  # stacks of the others
    assert "stacks of rank 2: none" in result.said


def test_a_rank_of_another_host_that_holds_pythons_lock_is_named_and_shows_its_stack(hang):
    result = hang("holds_gil", 2, timeout_s=60, INIT_TIMEOUT_S="3")  # two ranks a host
    assert re.search(r"has not ended in 3\.\d s", result.said), result.said
    blames(result, 2, "does not answer")
    assert "rank 2 on host1" in result.said
    assert re.search(r'stacks of rank 2:(\n  .*)*hang_how.py", line \d+ in fails', result.said), result.said


def test_time_outside_of_collectives_does_not_count_and_the_timeout_of_a_group_holds(hang):
    result = hang("late", timeout_s=8)
    assert result.said.count("late, but fine") == 4
    blames(result, 2, "is not in a collective")
    assert "barrier #1 of group 2 has not ended in" in result.said


@pytest.mark.parametrize(("how", "code"), [("exit_7", 7), ("segfault", 139)])
def test_a_rank_that_dies_without_a_word_ends_the_job_and_is_named(hang, how, code):
    result = hang(how)
    hydra = "BAD TERMINATION" in result.said
    assert result.returncode == code or hydra, result.said
    assert result.returncode != 0
    assert "past the fault" not in result.said
    if how == "exit_7":
        assert f"hpcllm: rank 2 of 4 on {os.uname().nodename} leaves by os._exit(7)" in result.said
    elif not hydra:  # MPICH's mpiexec kills the others before they can say anything
        assert re.search(r"hpcllm: rank 2 of 4 .* is gone without a word|process rank 2 with PID", result.said)
    assert "Traceback" not in result.said


def test_mismatched_calls_are_named_with_both_lines_in_checking_mode(hang):
    result = hang("other_call", timeout_s=60, HPCLLM_CHECK="1")
    assert result.returncode == 1
    assert result.said.count("Traceback") == 1
    assert re.search(r"ranks 0, 1, 3: #17 all_reduce \[float32\[5, 3\]\] SUM at .*hang_how.py:\d+", result.said)
    assert re.search(r"rank 2: #17 broadcast \[float32\[5, 3\]\] root 2 at .*hang_how.py:\d+", result.said)


def test_a_wrong_timeout_is_refused(monkeypatch):
    monkeypatch.setenv("HPCLLM_TIMEOUT_S", "10min")
    with pytest.raises(UsageError, match="HPCLLM_TIMEOUT_S=10min: seconds are wanted"):
        watch.timeout_s()
    assert watch.timeout_s({}) == 600
    assert watch.timeout_s({"HPCLLM_TIMEOUT_S": "0"}) == 0


# ---- in every rank of mpirun


@pytest.mark.mpi(min_size=2)
def test_checking_mode_raises_the_same_words_on_all_ranks(world):
    group = dist.new_group()
    group.checker = check.Checker(group.comm)
    arguments = ([torch.ones(2 + (world.rank == 1))], dist.AllreduceOptions())
    with pytest.raises(check.MismatchedCalls, match=r"(?s)float32\[2\].*float32\[3\].*test_watch.py:\d+") as raised:
        group.checker.check("all_reduce", arguments)
    assert len(set(world.comm.allgather(str(raised.value)))) == 1
    group.checker.check("all_reduce", ([torch.ones(3)], dist.AllreduceOptions()))  # the next call is compared anew


@pytest.mark.mpi(min_size=2)
def test_monitored_barrier_names_who_has_not_come_and_works_again(world):
    group = dist.new_group()
    group.monitored_barrier(datetime.timedelta(seconds=60))
    last = world.size - 1
    if world.rank == last:
        time.sleep(1.5)
    with pytest.raises(dist.DistBackendError, match=f"rank {last} of the group did not come in 0.5 s"):
        group.monitored_barrier(datetime.timedelta(seconds=0.5))
    world.comm.Barrier()
    group.monitored_barrier(datetime.timedelta(seconds=60), wait_all_ranks=True)


@pytest.mark.mpi(min_size=2)
def test_a_wait_with_a_timeout_raises_and_can_be_repeated(world):
    if world.rank == 0:
        got = torch.zeros(3)
        work = dist.irecv(got, src=1)
        with pytest.raises(dist.DistBackendError, match=r"timed out after 0\.2 s waiting for a receive"):
            work.wait(datetime.timedelta(seconds=0.2))
        world.comm.send(None, dest=1)
        work.wait(datetime.timedelta(seconds=60))
        assert got.tolist() == [5, 5, 5]
    elif world.rank == 1:
        world.comm.recv(source=0)
        dist.send(torch.full((3,), 5.0), dst=0)


@pytest.mark.mpi(min_size=2)
def test_operations_are_noted_with_their_numbers(world):
    group = dist.new_group()
    log = group.place.log
    for _ in range(progress.HISTORY + 3):
        dist.barrier(group=group)
    dist.all_reduce(torch.ones(2, 3, dtype=torch.float64), group=group)
    memory = watch._State.watchdog._memory
    state = next(s for s in (memory.read(slot, "here") for slot in memory.readable) if s.rank == world.rank)
    assert len(state.operations) == progress.HISTORY
    last = state.operations[-1]
    assert (last.what, last.sequence) == ("all_reduce float64 [2, 3]", progress.HISTORY + 4)
    assert 0 < last.start < last.end <= state.now
    assert state.groups[last.group].ranks == tuple(range(world.size))
    assert log.open == {}
    assert state.process == "runs"


# ---- without MPI


def state(rank, entered, *calls, process="runs", beat=0, now=10**10, ranks=(0, 1, 2)):
    """A rank's state in group 7; calls: operations that have not ended, or (sequence, what) of such."""
    operations = [
        call if isinstance(call, progress.Operation) else progress.Operation(7, *call, None, now - 10**9, 0)
        for call in calls
    ]
    groups = {7: progress.Group("0", len(ranks), ranks, entered, entered - len(operations))}
    return progress.State(rank, "node1", 100 + rank, process, False, now - beat, now, groups, operations)


WAITING = (5, "all_reduce float32 [3]")


def judge(*states, beat=5.0):
    read = {s.rank: s for s in states}
    return report.judge(read, 0, read[0].open[0], 3, beat)


@pytest.mark.parametrize(
    ("third", "named", "reason"),
    [
        (state(2, 4), (2,), "is not in a collective"),
        (state(2, 0, process="gone"), (2,), "is gone"),
        (state(2, 5, WAITING, process="stopped"), (2,), "is stopped"),
        (state(2, 4, beat=6 * 10**9), (2,), "does not answer"),
        (state(2, 5, (5, "broadcast float32 [3]")), (2,), "not the same call on all ranks: .* on rank 2"),
        (state(2, 5, WAITING), (), "entered by all its ranks"),
    ],
)
def test_the_late_rank_is_judged_by_what_it_does(third, named, reason):
    verdict = judge(state(0, 5, WAITING), state(1, 5, WAITING), third)
    assert verdict.named == named
    assert re.search(reason, verdict.sentence)


def test_a_rank_that_could_not_be_read_is_named():
    verdict = judge(state(0, 5, WAITING), state(1, 5, WAITING))
    assert verdict.named == (2,)
    assert "could not be read" in verdict.sentence


def test_the_blame_is_handed_on_to_the_rank_that_waits_for_nobody():
    receiving = progress.Operation(7, 0, "wait float32 [3]", 2, 1, 0)
    verdict = judge(state(0, 5, WAITING), state(1, 4, receiving), state(2, 4))
    assert verdict.named == (2,)


def test_ranks_that_wait_for_each_other_in_a_circle_are_named_and_those_that_wait_for_them_are_not():
    for_1, for_2 = (progress.Operation(7, 0, "wait float32 [3]", peer, 1, 0) for peer in (1, 2))
    verdict = judge(state(0, 4, for_1), state(1, 4, for_2), state(2, 4, for_1))
    assert verdict.named == (1, 2)
    assert "a circle" in verdict.sentence


@pytest.mark.parametrize("ranks", [(0,), (0, 1, 2, 5), (0, 2, 4), (3, 4, 9)])
def test_ranks_are_spelled_so_that_they_can_be_read_back(ranks):
    assert progress._unspell(progress.spell(ranks)) == ranks


def test_calls_that_may_differ_do_not_and_calls_that_may_not_do():
    options = dist.ReduceScatterOptions()

    def differ(op, one, other):
        return check.compare([check.fingerprint(op, 1, arguments, "a.py:1") for arguments in (one, other)]) is not None

    a, b = torch.ones(2), torch.ones(3)
    assert not differ("all_gather", ([[a, b]], [a]), ([[a, b]], [b]))  # uneven
    assert differ("all_gather", ([[a, b]], [a]), ([[a, a]], [a]))
    assert not differ("all_to_all_single", (a, b, [], []), (b, a, [], []))
    assert differ("all_to_all_single", (a, b, [], []), (a, b.double(), [], []))
    assert differ("reduce_scatter_tensor", (a, b, options), (b, b, options))
    root = dist.BroadcastOptions()
    root.rootRank = 1
    assert differ("broadcast", ([a], dist.BroadcastOptions()), ([a], root))
    assert len(check.fingerprint("all_gather", 1, ([[a] * 500], [a]), "x" * 900)) == 512


def test_time_in_which_the_process_was_suspended_does_not_count():
    world = SimpleNamespace(rank=0, size=2, host="here")
    watchdog = watch.Watchdog(world, progress.Memory(None, 1, 0), [], None)
    place = watchdog.place("0", (0, 1), 10.0)
    number = watchdog.log.enter(place, "barrier", (), time.monotonic_ns())
    place, sequence, start, name, peer = watchdog.log.open[number]
    watchdog.log.open[number] = (place, sequence, start - 100 * 10**9, name, peer)  # as a clock shows it that went on
    assert watchdog._late(2.0) is None
    assert [watchdog._late(2.0) for _ in range(5)] == [None, None, None, None, number]
    watchdog.log.leave(number, time.monotonic_ns())
    assert watchdog._late(2.0) is None


def test_help_needs_neither_torch_nor_mpi_for_the_watchdog():
    code = "import sys, hpcllm.mpi; sys.exit('torch' in sys.modules or 'mpi4py.MPI' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
