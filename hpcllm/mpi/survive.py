"""Ranks die, the others go on: the calls of ULFM (User-Level Failure Mitigation), of Open MPI 5 with mpirun --with-ft.

A rank that dies makes some of the others' calls raise, not all, and some of these calls raise later than others or
seem to have succeeded. So nothing that came out of a collective is kept before all ranks have agreed that they are
there (`commit`). A rank whose call has raised revokes every communicator of hpcllm, which wakes those that wait in
another one; then all meet in one smaller communicator (`shrink`), on which `world.regroup` builds everything anew.

Who is dead is what Open MPI says; a rank that hangs is not dead before mpirun is told to look (mpi_ft_detector).
"""

import contextlib
import functools
import time
import weakref

from mpi4py import MPI

from . import abort, alarm, launcher

# Communicators that a death has to wake the ranks in.
_known = weakref.WeakValueDictionary()
# Ranks that are still making a communicator when others hear of a death get so long to end that.
_MADE_S = 0.2
# An error, which may be the first sign of a death, waits so long for Open MPI to name the dead.
_NAMED_S = 1.0
# Where all have gone, what they have said about it before gets so long to arrive.
_TOLD_S = 1.0
_DEATHS = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)


class PeersDied(RuntimeError):
    """Ranks of this job are gone. agreed: all that are left have been told so by one call of `commit`."""

    def __init__(self, agreed):
        super().__init__("ranks of this job have died")
        self.agreed = agreed


class Comm(MPI.Intracomm):
    """A communicator that is known here, and so are those that are made of it.

    Nobody may revoke a communicator that others are still making: Open MPI's processes would end by a segmentation
    fault. So all ranks of a new one meet before it is used. settled: they have met.
    """

    settled = False

    def Dup(self, info=MPI.INFO_NULL):
        return _known_to_all(super().Dup(info))

    def Split(self, color=0, key=0):
        return _known_to_all(super().Split(color, key))

    def Split_type(self, split_type, key=0, info=MPI.INFO_NULL):
        return _known_to_all(super().Split_type(split_type, key, info))

    def Create_group(self, group, tag=0):
        return _known_to_all(super().Create_group(group, tag))

    def allreduce(self, sendobj, op=MPI.SUM):
        """Of objects. mpi4py's own goes through a communicator that it keeps to itself, where a death wakes nobody."""
        return functools.reduce(op, self.allgather(sendobj))


def _known_to_all(comm):
    if comm == MPI.COMM_NULL:
        return comm
    comm = Comm(comm)
    _known[id(comm)] = comm
    comm.Barrier()
    comm.settled = True
    return comm


def known(comm):
    """`comm`, just made by all its ranks, as one whose ranks a death wakes. Collective."""
    return _known_to_all(comm)


def refusal(world):
    """Why ranks of `world` cannot survive the death of others, None where they can. Collective."""
    if not launcher.fault_tolerant():
        why = "needs Open MPI 5 and a job that was started with mpirun --with-ft ulfm"
    else:
        why = alarm.refusal(world.library)
    if why is None and len(world.hosts) > 1 and not launcher.without_han():
        why = (
            f"needs mpirun --mca coll ^han on {len(world.hosts)} hosts: with coll/han, Open MPI hands out sums that "
            "are not finished when a rank dies"
        )
    return next((told for told in world.comm.allgather(why) if told), None)


def arm():
    """From now on a rank that dies does not end the job: whoever calls this calls `shrink` when one has died."""
    abort.survive_deaths()


def commit(comm, well=True):
    """Agree that every rank of `comm` is here and all it has called before has succeeded; raises PeersDied on all.

    Each rank calls this equally often, or `shrink` in its place. well: False, on any rank, for a reason not to go on.
    """
    try:
        if comm.Agree(int(well)) & 1:
            return
    except MPI.Exception:
        pass
    raise PeersDied(agreed=True)


def died(comm, error):
    """The PeersDied that the exception `error` means, None where it means something else. comm: of all ranks."""
    if isinstance(error, PeersDied):
        return error
    chain = error
    while chain is not None:
        if isinstance(chain, MPI.Exception) and chain.Get_error_class() in _DEATHS:
            return PeersDied(agreed=False)
        chain = chain.__cause__ or chain.__context__
    # torch tells of some errors in words of its own; sums that a death has spoilt, and broken connections, may come
    # to light before the death itself.
    deadline = time.monotonic() + _NAMED_S
    while not (gone := comm.Is_revoked() or comm.Get_failed().Get_size() > 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    return PeersDied(agreed=False) if gone else None


def shrink(comm, agreed, job=None):
    """A communicator of the ranks of `comm` that are left, in their order. Collective over these.

    agreed: `commit` has raised on this rank; else it is told here that this rank's calls have not succeeded. Every
    communicator but the new one is revoked. job: communicator of these ranks and the spares, where there are any, who
    are in the new one too and wake up.
    """
    _revoke()
    if not agreed and comm is not None:  # a spare is not in it
        with contextlib.suppress(MPI.Exception):
            comm.Agree(0)
    abort.outlived()
    smaller, met = job or comm, False
    while not met:
        smaller = Comm(smaller.Shrink())
        with contextlib.suppress(PeersDied):  # one more meanwhile, as all are told
            commit(smaller)
            met = True
    _known.clear()
    _known[id(smaller)] = smaller
    smaller.settled = True
    return smaller


def _revoke():
    """Wake the ranks in every communicator of hpcllm."""
    if not all(one.settled for one in list(_known.values())):
        time.sleep(_MADE_S)
    for one in list(_known.values()):
        with contextlib.suppress(MPI.Exception):
            if one != MPI.COMM_NULL and not one.Is_revoked():
                one.Revoke()


def first(job, size):
    """A communicator of the first `size` ranks of `job` for these, None for the others, who are spares.

    `job` itself where it has no more. Raises PeersDied on all ranks where one has died. Collective over `job`.
    """
    if job.size <= size:
        return job
    try:
        comm = job.Split(0 if job.rank < size else MPI.UNDEFINED, job.rank)
    except MPI.Exception as error:
        _revoke()
        with contextlib.suppress(MPI.Exception):
            job.Agree(0)
        raise PeersDied(agreed=True) from error
    commit(job)
    return None if comm == MPI.COMM_NULL else comm


def whole(job):
    """Whether all ranks of `job`, spares among them, live, as far as is known here. Not collective."""
    return not job.Is_revoked() and job.Get_failed().Get_size() == 0


def wait(job, size):
    """What a spare does: sleep until ranks of `job` have died and the others call `shrink`, as this one is to do then.

    size: so many ranks of `job`, the first ones, are no spares. Leaves with the others where these end.
    """

    alone_since = None

    def woken():
        nonlocal alone_since
        MPI.COMM_SELF.Iprobe()  # who calls nothing hears of nothing
        if job.Is_revoked():
            return True
        gone = job.Get_failed()
        if gone.Get_size() >= size:
            places = MPI.Group.Translate_ranks(job.group, list(range(size)), gone)
            if MPI.UNDEFINED not in places:
                alone_since = alone_since or time.monotonic()
                if time.monotonic() - alone_since > _TOLD_S:
                    abort.end_all(abort.KILLED_CODE)  # and nobody is left whose place could be taken
        return False

    abort.leave_with_others(woken)


def missing(before, after):
    """Ranks of the communicator `before` that are not in `after`."""
    places = MPI.Group.Translate_ranks(before.group, list(range(before.group.size)), after.group)
    return [rank for rank, place in enumerate(places) if place == MPI.UNDEFINED]
