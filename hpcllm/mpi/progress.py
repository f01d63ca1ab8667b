"""What every rank is doing, written where the other ranks of its host can read it without its help.

A rank that is stopped, dead, or in C code that holds Python's lock cannot answer questions. So each one writes its
communication as it goes into a piece of memory that all ranks of the host have mapped: how many collectives of each
group it has entered and left, and its last 64 operations. The file behind that memory has no name any more once all
have mapped it, so nothing can be left behind. Here are its layout, the writer, and the reader; `watch` decides what
it means. Imports neither torch nor mpi4py.
"""

import contextlib
import itertools
import mmap
import os
import struct
import tempfile
import time
import zlib
from dataclasses import dataclass, field

from . import process

HISTORY = 64
# Operations between two ranks: they have no place in the order of their group's collectives.
BETWEEN_TWO = frozenset({"send", "recv", "wait"})

# A rank's slot, in words of 8 bytes: itself, its groups, its last operations, what these operations are called.
_HEAD, _GROUPS, _GROUP, _OPERATION, _NAMES, _NAME = 16, 128, 16, 8, 256, 16
_RANK, _PID, _BORN, _NAMESPACE, _LEAVING, _BEAT, _KNOWN_GROUPS, _SIGNAL, _ASKED = range(9)
_RING = _HEAD + _GROUPS * _GROUP
_TEXTS = _RING + HISTORY * _OPERATION
_SLOT = _TEXTS + _NAMES * _NAME
# Behind the slots, room for the stacks of each rank, which takes no memory until faulthandler is asked to write them.
_STACKS_BYTES = 2 << 20
_write_operation = struct.Struct("8q").pack_into


@dataclass(frozen=True)
class Operation:
    """One call. sequence: its number among the collectives of its group, from 1; 0 for send, recv and wait.

    what: operation, dtype and shape, in words. peer: world rank of the other side, -1 for any; None of a collective.
    start, end: ns of CLOCK_MONOTONIC, the same clock for all processes of a host; end is 0 while it is under way.
    """

    group: int
    sequence: int
    what: str
    peer: int | None
    start: int
    end: int

    @property
    def name(self):
        return self.what.split(" ")[0]


@dataclass(frozen=True)
class Group:
    """A group as one rank knows it. ranks: world ranks, or None where the list was too long to be written down."""

    name: str
    size: int
    ranks: tuple[int, ...] | None
    entered: int
    left: int


@dataclass
class State:
    """A rank as it was read at `now`. process: "runs", "stopped", "gone" or "unknown"; leaving: it has said goodbye.

    beat: when its watchdog last ran. operations: oldest first. stacks: what faulthandler wrote, "" for nothing.
    """

    rank: int
    host: str
    pid: int
    process: str
    leaving: bool
    beat: int
    now: int
    groups: dict[int, Group] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    stacks: str = ""

    @property
    def open(self):
        return [operation for operation in self.operations if not operation.end]


def spell(ranks):
    """(0, 1, 2, 5) as "0-2,5"."""
    parts = []
    for _, run in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in run]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)


def _unspell(text):
    ranks = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        ranks.extend(range(int(first), int(last or first) + 1))
    return tuple(ranks)


class Place:
    """This rank's place in one group: the number of its last collective, and where that is written.

    log: the `Log` it is in. ranks: world ranks of the group's members. timeout_s: how long its operations may wait.
    """

    def __init__(self, log, row, key, ranks, timeout_s):
        self.log, self.key, self.ranks, self.timeout_s = log, key, ranks, timeout_s
        self.at = _HEAD + row * _GROUP
        self.sequence = 0


class Memory:
    """The slots of all ranks of one host. Without a file they share (`descriptor` None), this rank has only its own."""

    def __init__(self, descriptor, slots, mine):
        """descriptor: of the common file, or None; slots: ranks on this host; mine: this one's number among them."""
        self.descriptor, self.slots, self.mine = descriptor, slots, mine
        bytes_ = slots * _SLOT * 8
        self._map = mmap.mmap(-1, bytes_) if descriptor is None else mmap.mmap(descriptor, bytes_)
        self.words = memoryview(self._map).cast("q")
        self._stacks_at = -(-bytes_ // mmap.PAGESIZE) * mmap.PAGESIZE

    def reserve(self):
        """Take the memory now (OSError if it is not there): a page that cannot be had later would be a SIGBUS."""
        os.posix_fallocate(self.descriptor, 0, len(self._map))

    @property
    def readable(self):
        return range(self.slots) if self.descriptor is not None else [self.mine]

    def stacks_offset(self, slot):
        return self._stacks_at + slot * _STACKS_BYTES

    def stacks(self, slot):
        if self.descriptor is None:
            return ""
        text, at = b"", self.stacks_offset(slot)
        while len(text) < _STACKS_BYTES and b"\0" not in text:
            text += os.pread(self.descriptor, 1 << 16, at + len(text)) or b"\0"
        return text.split(b"\0")[0].decode(errors="replace")

    def process(self, slot):
        """(pid, its state) of the rank in `slot`."""
        head = self.words[slot * _SLOT : slot * _SLOT + _HEAD]
        if head[_NAMESPACE] != process.namespace() or not head[_PID]:
            return head[_PID], "unknown"
        return head[_PID], process.state(head[_PID], head[_BORN])

    def leaving(self, slot):
        return bool(self.words[slot * _SLOT + _LEAVING])

    def rank(self, slot):
        return self.words[slot * _SLOT + _RANK]

    def signal(self, slot):
        """The signal at which the rank in `slot` writes down its stacks; 0 for none."""
        return self.words[slot * _SLOT + _SIGNAL]

    def asked(self):
        """Lowest rank of another host that has asked this one for its state, or None."""
        return min((a - 1 for a in self.words[_ASKED::_SLOT].tolist() if a), default=None)

    def read(self, slot, host):
        """The `State` of the rank in `slot`, whose process may be writing at this moment."""
        words = self.words[slot * _SLOT : (slot + 1) * _SLOT]
        raw = words.cast("B")

        def text(word, length):
            return bytes(raw[8 * word : 8 * (word + length)]).split(b"\0")

        pid, process = self.process(slot)
        state = State(
            rank=words[_RANK],
            host=host,
            pid=pid,
            process=process,
            leaving=bool(words[_LEAVING]),
            beat=words[_BEAT],
            now=time.monotonic_ns(),
        )
        for row in range(min(words[_KNOWN_GROUPS], _GROUPS)):
            at = _HEAD + row * _GROUP
            key, entered, left, size = words[at : at + 4]
            name, ranks, *_ = [*(part.decode(errors="replace") for part in text(at + 4, _GROUP - 4)), "", ""]
            state.groups[key] = Group(name, size, _unspell(ranks) if ranks else None, entered, left)
        found = []
        for at in range(_RING, _TEXTS, _OPERATION):
            number, key, sequence, name, peer, start, end, _ = words[at : at + _OPERATION]
            if number:
                what = text(_TEXTS + name * _NAME, _NAME)[0].decode(errors="replace")
                peer = None if sequence else peer
                found.append((number, Operation(key, sequence, what, peer, start, end)))
        state.operations = [operation for _, operation in sorted(found, key=lambda pair: pair[0])]
        return state


class Log:
    """Writes this rank's slot. `enter` and `leave` are on the path of every operation: no lock, nothing spelled out."""

    def __init__(self, memory, rank):
        self._memory = memory
        self._words = memory.words[memory.mine * _SLOT : (memory.mine + 1) * _SLOT]
        self._bytes = self._words.cast("B")
        self._count = itertools.count()
        self._groups = itertools.count()
        self._known, self._names, self._made = {}, [], {}
        # Of this process, for its own watchdog: number -> (place, sequence, start in ns, name, peer).
        self.open = {}
        words, pid = self._words, os.getpid()
        words[_RANK], words[_PID], words[_NAMESPACE] = rank, pid, process.namespace()
        words[_BORN] = process.look(pid).born
        _logs.append(self)

    def beat(self):
        self._words[_BEAT] = time.monotonic_ns()

    def leave_job(self):
        self._words[_LEAVING] = 1

    def answers_to(self, signal):
        self._words[_SIGNAL] = signal

    def asked_by(self, rank):
        before = self._words[_ASKED]
        self._words[_ASKED] = min(before, rank + 1) if before else rank + 1

    def place(self, name, ranks, timeout_s):
        """Note a group this rank belongs to; ranks: world ranks of its members. Returns its `Place`."""
        row = min(next(self._groups), _GROUPS - 1)  # beyond those, groups share the last row
        spelled = spell(ranks)
        # The same on all members: those of one list of ranks are made in the same order by all of them. Not from the
        # name: torch counts, and ranks may count differently.
        self._made[ranks] = nth = self._made.get(ranks, 0) + 1
        key = zlib.crc32(f"{nth} {spelled}".encode())
        place = Place(self, row, key, ranks, timeout_s)
        room = 8 * (_GROUP - 4) - 2
        text = name.encode()[:32]
        text += b"\0" + (spelled.encode() if len(spelled) + len(text) < room else b"")
        self._bytes[8 * (place.at + 4) : 8 * (place.at + _GROUP)] = text.ljust(8 * (_GROUP - 4), b"\0")
        self._words[place.at : place.at + 4] = memoryview(struct.pack("4q", key, 0, 0, len(ranks))).cast("q")
        self._words[_KNOWN_GROUPS] = row + 1
        return place

    def enter(self, place, op, arguments, start):
        """Note that an operation of the group at `place` starts; returns what `leave` wants.

        op: its name. arguments: what the group's method was called with, the tensors (in lists or not) first; for
        operations between two ranks the other one's group rank second. start: `time.monotonic_ns()`.
        """
        number = next(self._count)
        tensor, many = arguments[0] if arguments else None, 1
        while type(tensor) in (list, tuple):
            many = len(tensor)
            tensor = tensor[0] if many else None
        dtype = getattr(tensor, "dtype", None)
        key = op if dtype is None else (op, dtype, tensor.shape, many)
        name = self._known.get(key)
        if name is None:
            name = self._name(key)
        sequence, peer = 0, -1
        if op in BETWEEN_TWO:
            if arguments[1] >= 0:
                peer = place.ranks[arguments[1]]
        else:
            place.sequence = sequence = place.sequence + 1
            self._words[place.at + 1] = sequence
        at = _RING + (number % HISTORY) * _OPERATION
        _write_operation(self._bytes, 8 * at, number + 1, place.key, sequence, name, peer, start, 0, 0)
        self.open[number] = (place, sequence, start, name, peer)
        return number

    def leave(self, number, end):
        """Note that the operation `number` has ended at `end`, as `time.monotonic_ns()` counts."""
        place, sequence, *_ = self.open.pop(number)
        at = _RING + (number % HISTORY) * _OPERATION
        if self._words[at] == number + 1:  # not overwritten by 64 newer ones of other threads
            self._words[at + 6] = end
        if sequence:
            self._words[place.at + 2] = sequence

    def operation(self, number):
        """The `Operation` that is under way as `number`, or None if it has ended."""
        if number not in self.open:
            return None
        place, sequence, start, name, peer = self.open[number]
        at = 8 * (_TEXTS + name * _NAME)
        what = bytes(self._bytes[at : at + 8 * _NAME]).split(b"\0")[0].decode(errors="replace")
        return Operation(place.key, sequence, what, None if sequence else peer, start, 0)

    def _name(self, key):
        """Give what an operation is called a place among the texts; where they are full, the oldest goes."""
        if isinstance(key, str):
            text = key
        else:
            op, dtype, shape, many = key
            text = f"{op} {str(dtype).removeprefix('torch.')} {list(shape)}" + (f" x {many}" if many > 1 else "")
        if len(self._names) < _NAMES:
            name = len(self._names)
            self._names.append(key)
        else:
            name = self._known.pop(self._names[0])
            self._names = [*self._names[1:], key]
        at = 8 * (_TEXTS + name * _NAME)
        self._bytes[at : at + 8 * _NAME] = text.encode()[: 8 * _NAME - 1].ljust(8 * _NAME, b"\0")
        self._known[key] = name
        return name


_logs = []


def leave_job():
    """Say that this process ends on purpose, so that nobody takes it for dead."""
    for log in _logs:
        log.leave_job()


def share(local):
    """The `Memory` of this host's ranks; `local`: their communicator. Collective over them.

    The file lies in /dev/shm, or the temporary folder, and is unlinked before this returns.
    """
    name, descriptor = None, None
    if local.rank == 0:
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(prefix="hpcllm-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
            try:
                os.ftruncate(handle, (local.size + 1) * (_SLOT * 8 + _STACKS_BYTES))
                Memory(handle, local.size, 0).reserve()
            except OSError:
                os.unlink(name)
                name = None
            finally:
                os.close(handle)
    name = local.bcast(name)
    if name:
        with contextlib.suppress(OSError):
            descriptor = os.open(name, os.O_RDWR)
    memory = None
    if descriptor is not None:
        with contextlib.suppress(OSError, ValueError):
            memory = Memory(descriptor, local.size, local.rank)
    everybody = all(local.allgather(memory is not None))
    if local.rank == 0 and name:
        os.unlink(name)
    return memory if everybody else Memory(None, local.size, local.rank)
