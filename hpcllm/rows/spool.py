"""Answers on disk before the output is whole: the folder `.NAME.partial` beside it, which outlives a killed run.

Each rank of each run appends what it has answered to a spool file of its own, a record a unit: a header of 24 bytes
(CRC-32 of all that follows, unit, rows, length of the payload), then the answers as JSON lines. A kill leaves at most
one torn record, the last of a spool; it and what may follow are passed over. A spool is never written to again.
`plan.json` says what is being answered, so that a restart goes on with that and nothing else.
"""

import fcntl
import glob
import json
import os
import shutil
import struct
import sys
import time
import zlib
from typing import NamedTuple

from ..errors import CannotCreate
from ..files import failing_as_io, sync_folder, write_json

_HEADER = struct.Struct("<IIQQ")
_SYNC_EVERY_S = 5.0


class Record(NamedTuple):
    """Where the answers to a unit lie."""

    path: str
    offset: int
    size: int
    rows: int
    crc: int  # CRC-32 of the header's rest and the payload


class Spool:
    """A spool file being written: whole records reach the kernel at once, and the disk every few seconds."""

    def __init__(self, path):
        self.path = path
        self.records = {}  # unit -> Record
        with failing_as_io(path):
            self._file = open(path, "xb")  # noqa: SIM115 (closed by `close`)
        self._synced = time.monotonic()

    def append(self, unit, rows, payload):
        rest = _HEADER.pack(0, unit, rows, len(payload))[4:]
        crc = zlib.crc32(payload, zlib.crc32(rest))
        with failing_as_io(self.path):
            self._file.writelines((crc.to_bytes(4, "little"), rest, payload))
            self._file.flush()
            self.records[unit] = Record(self.path, self._file.tell() - len(payload), len(payload), rows, crc)
            if time.monotonic() - self._synced > _SYNC_EVERY_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def close(self):
        with failing_as_io(self.path):
            os.fsync(self._file.fileno())
            self._file.close()


def records(path):
    """{unit: Record} of the whole records of a spool, up to the first one that is not."""
    found = {}
    with failing_as_io(path), open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            crc, unit, rows, size = _HEADER.unpack(header)
            offset = file.tell()
            if size > end - offset or zlib.crc32(file.read(size), zlib.crc32(header[4:])) != crc:
                break
            found[unit] = Record(path, offset, size, rows, crc)
    return found


def payload(file, unit, record):
    """The answers (bytes) of `record` from its open spool. Raises OSError where they have changed on the disk."""
    file.seek(record.offset - _HEADER.size + 4)
    content = file.read(_HEADER.size - 4 + record.size)
    if zlib.crc32(content) != record.crc:
        raise OSError(f"the answers to unit {unit} in {record.path} are damaged")
    return content[_HEADER.size - 4 :]


class Partial:
    """The hidden folder of an output. All methods but `spool` are root's.

    Two runs must not share it: root holds a lock on a file in it, which the kernel, or the file server, gives back when
    root's process ends however it ends. Where the file system has no locks a sentence in the log says so. Two runs
    would then do the work twice, and no harm: each writes files of its own, which it checks when it reads them.
    """

    def __init__(self, output):
        self.output = os.path.abspath(output)
        parent, name = os.path.split(self.output)
        self.folder = os.path.join(parent, f".{name}.partial")
        self._lock = None

    def claim(self, plan, overwrite):
        """Make or take over the folder; returns (number of this run in it, the spools of runs before).

        plan: flat dict of strings. A folder with answers to another plan is refused, with overwrite it is emptied.
        """
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise CannotCreate(f"output: {self.folder} cannot be created: {error.strerror}") from None
        with failing_as_io(self.folder):
            self._take_lock()
            spools = sorted(glob.glob(os.path.join(glob.escape(self.folder), "spool-*")))
            if differing := _differences(self._plan(), plan):
                if any(os.path.getsize(path) for path in spools) and not overwrite:
                    raise CannotCreate(
                        f"output: {self.folder} holds answers of another run, which had {differing}; "
                        f"go on with that one, give another output, delete the folder or --overwrite"
                    )
                for path in spools:
                    os.unlink(path)
                spools = []
                write_json(os.path.join(self.folder, "plan.json"), plan)
            runs = [int(os.path.basename(path).split("-")[1]) for path in spools]
            return max(runs, default=0) + 1, spools

    def spool(self, run, rank):
        return Spool(os.path.join(self.folder, f"spool-{run:04d}-{rank:06d}"))

    def publish(self, path, overwrite):
        """Give the finished file `path` in this folder the output's name, durably, and remove the folder."""
        if os.path.lexists(self.output) and not overwrite:
            raise CannotCreate(f"output: {self.output} appeared while this job ran; it is left as it is")
        aside = f"{self.folder}.{os.getpid()}.removed"
        with failing_as_io(self.output):
            os.rename(path, self.output)
            sync_folder(os.path.dirname(self.output))
            os.rename(self.folder, aside)  # nobody takes it over any more; NFS does not remove the file of a held lock
        self.release()
        shutil.rmtree(aside, ignore_errors=True)

    def release(self):
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self):
        busy = f"output: another run is at work on {self.output}, or has just ended; one at a time"
        path = os.path.join(self.folder, "lock")
        self._lock = open(path, "ab")  # noqa: SIM115 (closed by `release`)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise CannotCreate(busy) from None
        except OSError as error:
            print(f"output: {self.folder} cannot be locked ({error.strerror}); start no second run", file=sys.stderr)
        # The run before may have removed the folder between our opening and our locking.
        if not (os.path.exists(path) and os.path.samefile(self._lock.fileno(), path)):
            raise CannotCreate(busy)

    def _plan(self):
        try:
            with open(os.path.join(self.folder, "plan.json"), encoding="utf-8") as file:
                return json.load(file)
        except (FileNotFoundError, ValueError):
            return {}


def _differences(then, now):
    """In words, what two plans differ in; empty where they are the same."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    words = [f"{name} {then.get(name, '(none)')} (now {now.get(name, 'none')})" for name in names[:3]]
    return ", ".join(words) + (f" and {len(names) - 3} more differences" if len(names) > 3 else "")
