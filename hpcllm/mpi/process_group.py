"""The torch.distributed backend "mpi4py": groups of ranks over MPI communicators, and their names.

A Python subclass of torch's ProcessGroup with one MPI communicator of its own; what it can do is in `collectives`.
"""

import zlib

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_timeout

from . import peers, watch
from .barrier import MonitoredBarrier
from .collectives import Collectives
from .device import GPUS

BACKEND = "mpi4py"


class _State:
    comm = None  # of all ranks


def register(comm):
    """Make `init_process_group("mpi4py")` and `new_group` build groups over sub-communicators of `comm`."""
    _State.comm = comm
    if hasattr(dist.Backend, BACKEND.upper()):
        return

    def create(options, _):
        ranks, comm = list(options.global_ranks_in_group), _State.comm
        if options.group_size != (len(ranks) or comm.size):
            raise ValueError(f"a group of {options.group_size} was asked for in an MPI world of {comm.size}")
        # What torch hands over when nobody has asked for a timeout.
        timeout = None if options.timeout == default_pg_timeout else options.timeout
        if not ranks or ranks == list(range(comm.size)):
            return MpiProcessGroup(comm.Dup(), options.group_id, range(comm.size), timeout)
        return MpiProcessGroup(_part(comm, ranks), options.group_id, ranks, timeout)

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", *GPUS])


def _part(comm, ranks):
    """A communicator of the ranks `ranks` of `comm`, in that order; called by them alone."""
    members = comm.group.Incl(ranks)
    # The tag keeps apart groups that are being made at the same time. Not from the group's name: torch counts, and
    # ranks may count differently.
    sub = comm.Create_group(members, tag=zlib.crc32(str(ranks).encode()) % 32768)
    members.Free()
    return sub


class MpiProcessGroup(Collectives):
    """One group of ranks, with a communicator of its own; its operations are in `collectives`."""

    def __init__(self, comm, name, ranks=None, timeout=None):
        """ranks: world ranks of the members; timeout: timedelta that an operation may wait, None: the setting's."""
        super().__init__(comm)
        self.place = watch.place(name, ranks, timeout) if ranks else None
        self._name, self._description = name, "undefined"
        self._monitored = None

    # ---- names: DeviceMesh and the functional collectives find groups by these

    def getBackendName(self):
        return BACKEND

    def name(self):
        return BACKEND

    def getRank(self):
        return self.comm.rank

    def getSize(self):
        return self.comm.size

    def getGroupName(self):
        return self._name

    def setGroupName(self, name):
        self._name = name

    def getGroupDesc(self):
        return self._description

    def setGroupDesc(self, description):
        self._description = description

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc
    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)

    # torch asks a group for the backend of a device, and that for what it can do.
    supports_coalescing = False
    supports_splitting = True
    options = None

    def _get_backend(self, device=None):
        return self

    def supports_tensor_alloc(self, device):
        return torch.device(device).type == "cpu"

    def allocate_tensor(self, size, *, dtype, device="cpu"):
        """A 1-d tensor of `size` elements, not initialised, that ranks of one host sum without copying it.

        As torch's backends have it; FSDP2 asks for its buffers here for each module on which
        `set_allocate_memory_from_process_group_for_comm(True)` was called.
        """
        try:
            return peers.pool.allocate(size, dtype)
        except (OSError, RuntimeError, AttributeError):  # no such memory, or not so much
            return torch.empty(size, dtype=dtype)

    def settle(self, tensor):
        """Move the memory of `tensor` to where sums of ranks of one host need no copy, if there is such a place.

        For what is reduced again and again (`hooks`), after the group's first collective; see `peers.Pool.adopt`.
        """
        if tensor.device.type == "cpu" and self._shared is not None and self._shared.reached is not None:
            peers.pool.adopt(tensor, self._shared.local_size)

    def get_group_store(self):
        return dist.HashStore()  # of this rank alone, as that of the default group

    def split_group(self, ranks, timeout=None, opts=None, group_name=None, group_desc=None, device_types=None):
        """The ranks of this group that `ranks` numbers, as a group of its own; None on the others, who need not call.

        torch's own method, inherited, would end the process by a segmentation fault.
        """
        if self.comm.rank not in ranks:
            return None
        world_ranks = [self.place.ranks[rank] for rank in ranks] if self.place else None
        part = MpiProcessGroup(_part(self.comm, list(ranks)), group_name, world_ranks, timeout)
        if group_desc is not None:
            part.setGroupDesc(group_desc)
        return part

    def _nothing_to_do(self, *args):
        """What torch tells a backend that splits, or counts its calls, and this one need not know."""

    perform_nocolor_split = eager_connect_single_device = _set_sequence_number_for_group = _nothing_to_do

    def shutdown(self):
        """What torch calls when it destroys the group. Collective over it."""
        self.free()

    def monitored_barrier(self, timeout=None, wait_all_ranks=False):
        """A barrier that raises on every rank after `timeout` (timedelta) and names who has not come (`barrier`)."""
        self._monitored = self._monitored or MonitoredBarrier(self.comm)
        self._monitored.wait((timeout or default_pg_timeout).total_seconds(), wait_all_ranks)
