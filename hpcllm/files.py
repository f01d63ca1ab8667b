"""Write files so that a crash leaves either the old state or the new one, never half of it."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from . import deadline
from .errors import CannotCreate, IOFailure

# What a file system over a network answers in a moment of trouble; a full disk or a missing folder stays as it is.
_PASSING = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.EREMOTEIO, errno.ECOMM}
PAUSES_S = (0.5, 1.0, 2.0)


def patiently(work, *arguments):
    """`work(*arguments)`, tried again a few times, all of it, where it fails with what may pass. Raises OSError."""
    for pause in PAUSES_S:
        try:
            return work(*arguments)
        except OSError as error:
            if error.errno not in _PASSING:
                raise
        time.sleep(pause)
    return work(*arguments)


def sync_folder(folder):
    """fsync a folder, so that names created or renamed in it survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder):
    """fsync each file of a folder that has no folders."""
    for name in sorted(os.listdir(folder)):
        sync_file(os.path.join(folder, name))


def require_writable(path, name):
    """Raise CannotCreate where a folder cannot be made at `path`, or written to. Makes nothing, not even a trial.

    name: of the setting that says so.
    """
    there = Path(path).absolute()
    while not os.path.lexists(there):
        there = there.parent
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        raise CannotCreate(f"{name}: {path} cannot be written: {os.strerror(code)}")


def write_text(path, text):
    """Replace the file `path` by `text` in one step, durably."""
    path = Path(path)
    with failing_as_io(path):
        patiently(_replace, path, text)


def _replace(path, text):
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8")
        sync_file(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def new_folder(path, replace=False):
    """Fill a hidden folder beside `path` and rename it to `path` when the body ends well, durably.

    Yields the hidden folder; removes it when the body raises. replace: as `reveal`.
    """
    path = Path(path)
    with failing_as_io(path):
        hidden = hidden_folder(path)
        try:
            yield hidden
            reveal(hidden, path, replace)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def leftovers(path):
    """Hidden folders beside `path` that jobs killed in the middle have left (or that one at work has now)."""
    path = Path(path)
    return sorted(
        found
        for found in path.parent.iterdir()
        if found.name.startswith(f".{path.name}.") and found.suffix in (".tmp", ".removed") and found.is_dir()
    )


def job():
    """Whose a folder in the making is, as a part of its name: the batch job's number, or that of this process."""
    return re.sub(r"[^\w-]", "-", deadline.job() or f"pid{os.getpid()}")


def hidden_folder(path):
    """A new hidden folder beside `path`, for `reveal` to rename to it."""
    path = Path(path)
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.{job()}-", suffix=".tmp", dir=path.parent))


def reveal(hidden, path, replace=False):
    """Rename a hidden folder to `path`, durably, its files being as readable as the user's umask says.

    replace: a folder that is there makes room in the last moment, and comes back where the renaming fails.
    """
    mask = umask()  # mkdtemp and safetensors make private files
    hidden.chmod(0o777 & ~mask)
    for file in hidden.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)
            sync_file(file)
    sync_folder(hidden)
    old = path.with_name(f".{path.name}.{os.getpid()}.removed") if replace and path.is_dir() else None
    if old:
        os.rename(path, old)
    try:
        os.rename(hidden, path)
    except BaseException:
        if old:
            os.rename(old, path)
        raise
    sync_folder(path.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(path, first=None):
    """Remove a folder so that no reader finds it half removed: it is hidden first.

    first: name of the file in it that goes before the others, whose being there says that they are.
    """
    path = Path(path)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.removed")
    os.rename(path, hidden)
    if first:
        (hidden / first).unlink(missing_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def failing_as_io(path):
    """An OSError inside becomes an IOFailure (exit 74) that names the file, or `path` where the error does not."""
    try:
        yield
    except OSError as error:
        raise IOFailure(f"{error.filename or path}: {error.strerror or error}") from error


def write_at(descriptor, array, offset):
    """Write contiguous bytes or a contiguous array at byte `offset` of an open file, all of it."""
    left = memoryview(array).cast("B")
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def digest(path):
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def umask():
    """The user's file mode creation mask. Read, since setting it to see it would be seen by other threads."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
