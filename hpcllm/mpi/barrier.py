"""monitored_barrier: a barrier that names the ranks that have not come, and raises instead of waiting for them.

As torch's Gloo backend has it. torch.distributed.monitored_barrier itself refuses every backend that is not called
"gloo"; call `group.monitored_barrier(...)`.
"""

import time

import numpy as np
import torch.distributed as dist
from mpi4py import MPI

from .progress import spell

# An answer: number of the barrier, how many ranks are missing, and the first of them.
_TOLD = 62


def _tag(comm):
    """The last tag there is, which nobody uses by accident."""
    return comm.Get_attr(MPI.TAG_UB)


class MonitoredBarrier:
    """The barriers of one group. Rank 0 collects the others and tells all of them who has not come."""

    def __init__(self, comm):
        self._comm, self._number, self._sent = comm, 0, []

    def wait(self, timeout_s, wait_all_ranks):
        """Return when all ranks have called this; raise on every rank after `timeout_s`, naming the missing ones.

        wait_all_ranks: name all ranks that have not come, and not only the first. Raises DistBackendError.
        """
        self._number += 1
        self._sent = [sent for sent in self._sent if not sent[0].Test()]
        deadline = time.monotonic() + timeout_s
        told = self._collect(deadline) if self._comm.rank == 0 else self._report(deadline)
        if told is None:
            raise dist.DistBackendError(
                f"monitored_barrier: rank 0 of the group did not answer rank {self._comm.rank} in {timeout_s:g} s"
            )
        count = int(told[1])
        if count:
            missing = told[2 : 2 + min(count, _TOLD)].tolist()
            named = spell(missing) + (f" and {count - _TOLD} more" if count > _TOLD else "")
            whom = f"ranks {named}" if wait_all_ranks and count > 1 else f"rank {missing[0]}"
            raise dist.DistBackendError(f"monitored_barrier: {whom} of the group did not come in {timeout_s:g} s")

    def _send(self, content, rank):
        # Small enough to leave at once; the buffer is kept until it has.
        self._sent.append((self._comm.Isend(content, dest=rank, tag=_tag(self._comm)), content))

    def _receive(self, buffer, source, deadline):
        """A message of this barrier from `source`; False at the deadline. Those of earlier barriers are dropped."""
        status, pause = MPI.Status(), 1e-5
        while True:
            if self._comm.Iprobe(source, _tag(self._comm), status):
                self._comm.Recv(buffer, source=status.Get_source(), tag=_tag(self._comm))
                if buffer[0] == self._number:
                    return status.Get_source()
            elif time.monotonic() > deadline:
                return None
            else:
                time.sleep(pause)
                pause = min(2 * pause, 1e-3)

    def _collect(self, deadline):
        missing, buffer = set(range(1, self._comm.size)), np.zeros(1, dtype=np.int64)
        while missing:
            source = self._receive(buffer, MPI.ANY_SOURCE, deadline)
            if source is None:
                break
            missing.discard(source)
        first = sorted(missing)[:_TOLD]
        told = np.array([self._number, len(missing), *first] + [0] * (_TOLD - len(first)), dtype=np.int64)
        for rank in range(1, self._comm.size):
            self._send(told, rank)
        return told

    def _report(self, deadline):
        self._send(np.array([self._number], dtype=np.int64), 0)
        told = np.zeros(2 + _TOLD, dtype=np.int64)
        # Rank 0 may have come later, and waits as long as this one from then on; its own timeout is its answer.
        return told if self._receive(told, 0, deadline + 1.0) is not None else None
