"""The hidden folder in which `prepare` builds: made beside the output, renamed to it at the end, or removed."""

import os
import shutil
import tempfile
from contextlib import contextmanager

from ..errors import CannotCreate, IOFailure
from ..files import sync_folder

COPY_BYTES = 8 << 20


@contextmanager
def disk(path):
    """An error of the file system inside becomes an IOFailure (74) that names the place."""
    try:
        yield
    except OSError as error:
        raise IOFailure(f"{error.filename or path}: {error.strerror or error}") from None


def make(output):
    """Make and return a new folder beside `output`, of this run alone, and its parents where they are missing."""
    parent, label = os.path.split(os.path.abspath(output))
    try:
        os.makedirs(parent, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{label}.partial-", dir=parent)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(folder, 0o777 & ~mask)  # mkdtemp is private; the result follows the user's umask
    except OSError as error:
        raise CannotCreate(f"output: {output} cannot be created in {parent}: {error.strerror}") from None
    return folder


def leftovers(output):
    """Hidden folders beside `output` that runs killed in the middle have left (or a run at work now)."""
    parent, label = os.path.split(os.path.abspath(output))
    prefixes = (f".{label}.partial-", f".{label}.old-")
    names = os.listdir(parent) if os.path.isdir(parent) else []
    return sorted(os.path.join(parent, name) for name in names if name.startswith(prefixes))


def publish(folder, output, overwrite):
    """Give the finished folder its name. What it replaces is moved aside first and deleted last."""
    output = os.path.abspath(output)
    with disk(output):
        sync_folder(folder)
        aside = None
        if os.path.lexists(output):
            if not overwrite:
                raise CannotCreate(f"output: {output} appeared while this job ran; it is left as it is")
            aside = tempfile.mkdtemp(prefix=f".{os.path.basename(output)}.old-", dir=os.path.dirname(output))
            os.rename(output, os.path.join(aside, "old"))
        os.rename(folder, output)
        sync_folder(os.path.dirname(output))
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
