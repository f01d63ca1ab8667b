"""Which of several ways to the same bytes is quickest here: found out by the first calls of each size, and kept.

What is quick depends on the host's memory and caches, the ranks on it, the network and the MPI library, so no constant
is right everywhere. The first calls of an operation with a size of a class (a power of two) take its ways in turn and
are timed; the ranks then agree on the way whose slowest rank was quickest. Nothing is sent that was not asked for, so
starting costs nothing. All ways of a call give the same bytes: results do not depend on what was chosen.
"""

import logging
import time

# Calls that each way gets. The quickest counts: in the others a rank may have waited for one that computed.
TRIALS = 5
# What has been the way so far stays it unless another takes at most so much of its time.
BETTER = 0.95

_log = logging.getLogger("hpcllm.mpi")
_made = []


def made():
    """What has been chosen in this process so far: dicts of operation, bytes_up_to, way, and seconds by way."""
    return list(_made)


class Choices:
    """The choices of one group. All methods are collective over `comm`, the group's communicator."""

    def __init__(self, comm):
        self._comm = comm
        self._chosen, self._tried = {}, {}

    def take(self, operation, size_bytes, ways, *arguments):
        """Call one of `ways` (name: function) with `arguments`; the first is the one to take without evidence."""
        key = operation, size_bytes.bit_length()
        chosen = self._chosen.get(key)
        if chosen is not None:
            return ways[chosen](*arguments)
        tried = self._tried.setdefault(key, {name: [] for name in ways})
        name = min(tried, key=lambda name: len(tried[name]))
        began = time.perf_counter()
        result = ways[name](*arguments)
        tried[name].append(time.perf_counter() - began)
        if all(len(times) == TRIALS for times in tried.values()):
            self._decide(key, self._tried.pop(key))
        return result

    def _decide(self, key, tried):
        quickest = self._comm.allgather([min(times) for times in tried.values()])
        seconds = {name: max(of_ranks) for name, of_ranks in zip(tried, zip(*quickest, strict=True), strict=True)}
        first, best = next(iter(seconds)), min(seconds, key=seconds.get)
        self._chosen[key] = best if seconds[best] <= BETTER * seconds[first] else first
        operation, bits = key
        choice = {"operation": operation, "bytes_up_to": (1 << bits) - 1, "way": self._chosen[key], "seconds": seconds}
        _made.append(choice)
        if self._comm.rank == 0:
            _log.info("chosen: %s", choice)
