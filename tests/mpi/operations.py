"""Every operation of torch.distributed, performed once and beside it what one process says the answer is. Not a test.

`coverage` tries each with every dtype, sync and async. An operation is a function of an `Attempt` that calls
torch.distributed and returns pairs (what it gave, what it should have given). The inputs are small whole numbers that
every rank can compute for every rank (`rank_tensors`), so the answers are exact. Here are the operations that move
tensors; those that add up are in `operations_that_sum`, those without a dtype in `operations_on_groups`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rank_tensors import DTYPES, finish, numbers

EVERY_DTYPE = (*DTYPES, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
FLOAT8 = tuple(dtype for dtype in EVERY_DTYPE if "float8" in str(dtype))


@dataclass(frozen=True)
class Attempt:
    """One call of one operation on this rank: with which dtype (None where there is none), sync or async."""

    world: object
    dtype: torch.dtype | None
    asynchronous: bool

    rank = property(lambda self: self.world.rank)
    size = property(lambda self: self.world.size)
    ranks = property(lambda self: range(self.world.size))
    right = property(lambda self: (self.rank + 1) % self.size)
    left = property(lambda self: (self.rank - 1) % self.size)

    def of(self, rank, *shape, salt=0):
        """The numbers of `rank`."""
        return numbers(rank, shape, self.dtype, salt)

    def blank(self, *shape):
        return torch.zeros(shape).to(self.dtype)

    def done(self, work):
        """Wait for what the call returned: a Work, or the Future of the coalesced ones; None if it was a sync call."""
        if isinstance(work, torch.futures.Future):
            assert self.asynchronous
            work.wait()
        else:
            finish(work, self.asynchronous)


@dataclass(frozen=True)
class Operation:
    """name: row of the table. attempt: see above. dtypes: those to try. modes: of async_op.

    answer: what is expected for a dtype: "right", "refused" (by hpcllm, with TypeError or ValueError) or "torch" (torch
    refuses before it asks the backend).
    """

    name: str
    attempt: Callable
    dtypes: tuple = EVERY_DTYPE
    modes: tuple = (False, True)
    answer: Callable = lambda dtype: "right"


# ---- what moves


def broadcast(t):
    tensor = t.of(t.rank, 2, 3)
    t.done(dist.broadcast(tensor, t.size - 1, async_op=t.asynchronous))
    return [(tensor, t.of(t.size - 1, 2, 3))]


def all_gather(t):
    outputs = [t.blank(2, 3) for _ in t.ranks]
    t.done(dist.all_gather(outputs, t.of(t.rank, 2, 3), async_op=t.asynchronous))
    return [(output, t.of(rank, 2, 3)) for rank, output in zip(t.ranks, outputs, strict=True)]


def all_gather_uneven(t):
    outputs = [t.blank(2 * rank, 3) for rank in t.ranks]
    t.done(dist.all_gather(outputs, t.of(t.rank, 2 * t.rank, 3), async_op=t.asynchronous))
    return [(output, t.of(rank, 2 * rank, 3)) for rank, output in zip(t.ranks, outputs, strict=True)]


def all_gather_into_tensor(t):
    output = t.blank(2 * t.size, 3)
    t.done(dist.all_gather_into_tensor(output, t.of(t.rank, 2, 3), async_op=t.asynchronous))
    return [(output, torch.cat([t.of(rank, 2, 3) for rank in t.ranks]))]


def all_gather_coalesced(t):
    outputs = [[t.blank(3), t.blank(2, 2)] for _ in t.ranks]
    t.done(dist.all_gather_coalesced(outputs, [t.of(t.rank, 3), t.of(t.rank, 2, 2)], async_op=t.asynchronous))
    pairs = zip(t.ranks, outputs, strict=True)
    return [pair for rank, (a, b) in pairs for pair in ((a, t.of(rank, 3)), (b, t.of(rank, 2, 2)))]


def gather(t):
    outputs = [t.blank(2, 3) for _ in t.ranks] if t.rank == t.size - 1 else None
    t.done(dist.gather(t.of(t.rank, 2, 3), outputs, dst=t.size - 1, async_op=t.asynchronous))
    return [(output, t.of(rank, 2, 3)) for rank, output in enumerate(outputs or [])]


def scatter(t):
    output = t.blank(2, 3)
    parts = [t.of(rank, 2, 3) for rank in t.ranks] if t.rank == t.size - 1 else None
    t.done(dist.scatter(output, parts, src=t.size - 1, async_op=t.asynchronous))
    return [(output, t.of(t.rank, 2, 3))]


def all_to_all(t):
    outputs = [t.blank(rank + t.rank, 3) for rank in t.ranks]
    inputs = [t.of(t.rank, rank + t.rank, 3, salt=rank) for rank in t.ranks]
    t.done(dist.all_to_all(outputs, inputs, async_op=t.asynchronous))
    return [(output, t.of(rank, rank + t.rank, 3, salt=t.rank)) for rank, output in enumerate(outputs)]


def all_to_all_single(t):
    output = t.blank(2 * t.size, 3)
    t.done(dist.all_to_all_single(output, t.of(t.rank, 2 * t.size, 3), async_op=t.asynchronous))
    return [(output, torch.cat([t.of(rank, 2 * t.size, 3)[2 * t.rank : 2 * t.rank + 2] for rank in t.ranks]))]


def all_to_all_single_splits(t):
    sent, received = ([rank + 2 * t.rank for rank in t.ranks], [2 * rank + t.rank for rank in t.ranks])
    output = t.blank(sum(received), 3)
    mine = torch.cat([t.of(t.rank, rows, 3, salt=rank) for rank, rows in enumerate(sent)])
    t.done(dist.all_to_all_single(output, mine, received, sent, async_op=t.asynchronous))
    return [(output, torch.cat([t.of(rank, rows, 3, salt=t.rank) for rank, rows in enumerate(received)]))]


# ---- point to point: send and recv are the sync calls, isend and irecv the async ones


def _ring(t, source, tag=0):
    """Every rank sends to its right neighbour and receives from `source`, None for any."""
    received = t.blank(2, 3)
    if t.asynchronous:
        for work in (dist.isend(t.of(t.rank, 2, 3), t.right, tag=tag), dist.irecv(received, source, tag=tag)):
            t.done(work)
    elif t.rank == 0:  # somebody has to begin
        dist.send(t.of(t.rank, 2, 3), t.right, tag=tag)
        assert dist.recv(received, source, tag=tag) == t.left
    else:
        assert dist.recv(received, source, tag=tag) == t.left
        dist.send(t.of(t.rank, 2, 3), t.right, tag=tag)
    return [(received, t.of(t.left, 2, 3))]


def send_recv(t):
    return _ring(t, t.left)


def send_recv_any_source(t):
    return _ring(t, None)


def send_recv_tags(t):
    received = {tag: t.blank(4) for tag in (1, 2, 3)}
    sends = [dist.isend(t.of(t.rank, 4, salt=tag), t.right, tag=tag) for tag in (1, 2, 3)]
    for tag in (3, 1, 2):
        if t.asynchronous:
            t.done(dist.irecv(received[tag], t.left, tag=tag))
        else:
            dist.recv(received[tag], t.left, tag=tag)
    for work in sends:
        work.wait()
    return [(tensor, t.of(t.left, 4, salt=tag)) for tag, tensor in received.items()]


def batch_isend_irecv(t):
    received = [t.blank(2, 3) for _ in range(2)]
    batch = [
        dist.P2POp(dist.isend, t.of(t.rank, 2, 3), t.right),
        dist.P2POp(dist.irecv, received[0], t.left),
        dist.P2POp(dist.isend, t.of(t.rank, 2, 3, salt=1), t.left, tag=1),
        dist.P2POp(dist.irecv, received[1], t.right, tag=1),
    ]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    return [(received[0], t.of(t.left, 2, 3)), (received[1], t.of(t.right, 2, 3, salt=1))]


OPERATIONS_THAT_MOVE = [
    Operation("broadcast", broadcast),
    Operation("all_gather", all_gather),
    Operation("all_gather (uneven)", all_gather_uneven),
    Operation("all_gather_into_tensor", all_gather_into_tensor),
    Operation("all_gather_coalesced", all_gather_coalesced),
    Operation("gather", gather),
    Operation("scatter", scatter),
    Operation("all_to_all (uneven)", all_to_all),
    Operation("all_to_all_single", all_to_all_single),
    Operation("all_to_all_single (splits)", all_to_all_single_splits),
    Operation("send and recv, isend and irecv", send_recv),
    Operation("the same from any source", send_recv_any_source),
    Operation("the same with tags", send_recv_tags),
    Operation("batch_isend_irecv", batch_isend_irecv, modes=(True,)),
]
