"""The links between processes, measured with raw MPI messages: latency, bandwidth, and how far apart clocks are.

For `hpcllm doctor` and other looks at a machine; training does not use it. Import it after `world.join`.
"""

import array
import math
import time

from mpi4py import MPI

LATENCY_TRIPS = 30
BANDWIDTH_TRIPS = 4
BANDWIDTH_BYTES = 4 << 20
CLOCK_TRIPS = 10
# No further round of pairs is begun after this long. Every process is in every round, so all of them are measured at
# any number of hosts, if not all pairs: 1,000 hosts at 10 GB/s get about as many rounds as there are, at 1 GB/s 300.
BUDGET_S = 8.0


def thread_level():
    """What MPI grants to the threads of this process: "single", "funneled", "serialized" or "multiple"."""
    names = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized"}
    return names.get(MPI.Query_thread(), "multiple")


def one_per_host(world):
    """A communicator of the ranks with local rank 0, in rank order; None in the other ranks. Collective over world."""
    comm = world.comm.Split(0 if world.local_rank == 0 else MPI.UNDEFINED, world.rank)
    return None if comm == MPI.COMM_NULL else comm


def rounds(size):
    """A round-robin tournament of `size` players: rounds of disjoint pairs (a, b), a < b; each pair meets once.

    The circle method: one player sits still and the others move on by one chair a round.
    """
    players = [*range(size), *[None] * (size % 2)]
    half = len(players) // 2
    for _ in range(len(players) - 1):
        facing = zip(players[:half], reversed(players[half:]), strict=True)
        yield [tuple(sorted(pair)) for pair in facing if None not in pair]
        players.insert(1, players.pop())


def measure(comm, budget_s=BUDGET_S):
    """Latency and bandwidth of the pairs of ranks of `comm`, many at a time but no rank in two. Collective.

    Returns on rank 0 a list of {"a", "b" (ranks), "latency_s" (one way), "bandwidth_bytes_per_s"}, else None. Pairs
    whose round would have begun after `budget_s` are missing. The best of several trips counts: what is asked is the
    link, not who else was busy.
    """
    small, large = bytearray(1), bytearray(BANDWIDTH_BYTES)
    mine, start = [], time.monotonic()
    for pairs in rounds(comm.size):
        if not comm.bcast(time.monotonic() - start < budget_s):
            break
        pair = next((pair for pair in pairs if comm.rank in pair), None)
        if pair is None:
            continue
        other = pair[0] + pair[1] - comm.rank
        for buffer in (small, large):  # connects, and waits for a rank that is still in its last round
            _best_trip(comm, other, buffer, 1)
        latency_s = _best_trip(comm, other, small, LATENCY_TRIPS)
        bandwidth = BANDWIDTH_BYTES / _best_trip(comm, other, large, BANDWIDTH_TRIPS)
        if comm.rank == pair[0]:
            mine.append({"a": pair[0], "b": pair[1], "latency_s": latency_s, "bandwidth_bytes_per_s": bandwidth})
    found = comm.gather(mine)
    return None if found is None else [link for links in found for link in links]


def _best_trip(comm, other, buffer, trips):
    """Seconds one way of the fastest of `trips` round trips of `buffer` between this rank and `other`."""
    best = math.inf
    message = [buffer, MPI.BYTE]
    for _ in range(trips):
        start = time.perf_counter()
        if comm.rank < other:
            comm.Send(message, other)
            comm.Recv(message, other)
        else:
            comm.Recv(message, other)
            comm.Send(message, other)
        best = min(best, time.perf_counter() - start)
    return best / 2


def clock_offsets(comm, clock=time.time):
    """How many seconds the clock of each rank of `comm` is ahead of rank 0's. Collective; one rank after the other.

    Returns on rank 0 a list of (offset_s, error_s), else None: of several questions "what time is it?" the one that
    was answered soonest, whose error is at most half of the time that the answer took (Cristian, Distributed
    Computing 3, 1989).
    """
    answer = array.array("d", [0.0])
    found = [(0.0, 0.0)]
    for other in range(1, comm.size) if comm.rank == 0 else ():
        trips = []
        for _ in range(CLOCK_TRIPS):
            asked = clock()
            comm.Send([answer, MPI.DOUBLE], other)
            comm.Recv([answer, MPI.DOUBLE], other)
            told = clock()
            trips.append(((told - asked) / 2, answer[0] - (asked + told) / 2))
        error_s, offset_s = min(trips)
        found.append((offset_s, error_s))
    for _ in range(CLOCK_TRIPS if comm.rank > 0 else 0):
        comm.Recv([answer, MPI.DOUBLE], 0)
        answer[0] = clock()
        comm.Send([answer, MPI.DOUBLE], 0)
    return found if comm.rank == 0 else None
