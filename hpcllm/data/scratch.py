"""The hidden folder in which `prepare` builds: made beside the output, renamed to it at the end, or removed."""

import os
import shutil
import tempfile

from ..errors import CannotCreate
from ..files import failing_as_io, job, sync_folder, umask

COPY_BYTES = 8 << 20


def make(output):
    """Make and return a new folder beside `output`, of this run alone, and its parents where they are missing."""
    parent, label = os.path.split(os.path.abspath(output))
    try:
        os.makedirs(parent, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{label}.partial-{job()}-", dir=parent)
    except OSError as error:
        raise CannotCreate(f"output: {output} cannot be created in {parent}: {error.strerror}") from None
    return folder


def leftovers(output):
    """Hidden folders beside `output` that runs killed in the middle have left (or a run at work now)."""
    parent, label = os.path.split(os.path.abspath(output))
    prefixes = (f".{label}.partial-", f".{label}.old-")
    names = os.listdir(parent) if os.path.isdir(parent) else []
    return sorted(os.path.join(parent, name) for name in names if name.startswith(prefixes))


def publish(folder, output, overwrite, check):
    """Give the finished folder its name. What it replaces is moved aside first and deleted last.

    check: called where there is something to replace, which may have come meanwhile; raises where it is to stay.
    """
    output = os.path.abspath(output)
    with failing_as_io(output):
        os.chmod(folder, 0o777 & ~umask())  # mkdtemp is private; the result follows the user's umask
        sync_folder(folder)
        aside = None
        if os.path.lexists(output):
            if not overwrite:
                raise CannotCreate(f"output: {output} appeared while this job ran; it is left as it is")
            check()
            aside = tempfile.mkdtemp(prefix=f".{os.path.basename(output)}.old-", dir=os.path.dirname(output))
            os.rename(output, os.path.join(aside, "old"))
        try:
            os.rename(folder, output)
        except BaseException:
            if aside is not None:
                os.rename(os.path.join(aside, "old"), output)
                os.rmdir(aside)
            raise
        sync_folder(os.path.dirname(output))
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
