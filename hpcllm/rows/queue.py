"""Units of work for whoever is free: root hands out their numbers one by one, and works itself.

Point to point, two small messages a unit; no thread, no one-sided communication. Root answers when it calls `serve`,
between its own batches, so a rank asks for its next unit when it begins one and seldom waits for it. Only the last
units are not given ahead: they would lie with a rank that is busy while others have none. The first unit of each rank
is known without asking.
"""

import time
from collections import deque

_ASK, _GIVE = 7003, 7004
_LATER, _NO_MORE = -1, -2
_POLL_S = 0.001


class Queue:
    """order: list of unit numbers, the same on every rank, the first to hand out first. Only `finish` is collective.

    Every question is answered exactly once, so no message is left behind, however a run ends.
    """

    def __init__(self, comm, order):
        self._comm = comm
        self._dealt = order[comm.rank : comm.rank + 1]
        self._left = deque(order[comm.size :] if comm.rank == 0 else ())
        self._asked = None  # the request of the question that is not answered yet
        self._answers = []

    def next(self):
        """Number of this rank's next unit, None when there is no more. Waits until root has time to say."""
        if self._comm.rank == 0:
            self.serve()
            return self._dealt.pop() if self._dealt else self._left.popleft() if self._left else None
        if self._dealt:
            unit = self._dealt.pop()
        elif self._asked is None:
            return None
        else:
            while (unit := self._hear()) == _LATER:
                self._ask(idle=True)
            if unit == _NO_MORE:
                return None
        self._ask(idle=False)
        return unit

    def serve(self):
        """On root, answer those who have asked; elsewhere nothing."""
        if self._comm.rank > 0:
            return
        while self._comm.size > 1 and self._comm.iprobe(tag=_ASK):
            rank, idle = self._comm.recv(tag=_ASK)
            if not self._left:
                unit = _NO_MORE
            elif idle or len(self._left) > self._comm.size:
                unit = self._left.popleft()
            else:
                unit = _LATER
            self._answers = [answer for answer in self._answers if not answer.test()[0]]
            self._answers.append(self._comm.isend(unit, rank, _GIVE))

    def finish(self, progress, failed=False):
        """This rank works no more: `progress.finish`, in which root goes on to serve.

        Where root stops early, failing or because another rank failed, nobody is given any more.
        """
        self._left.clear()
        if self._asked is not None:
            self._hear()
        progress.finish(failed, meanwhile=self.serve)
        for answer in self._answers:
            answer.wait()

    def _ask(self, idle):
        self._asked = self._comm.isend((self._comm.rank, idle), 0, _ASK)

    def _hear(self):
        while not self._comm.iprobe(0, _GIVE):
            time.sleep(_POLL_S)
        self._asked.wait()
        self._asked = None
        return self._comm.recv(source=0, tag=_GIVE)
