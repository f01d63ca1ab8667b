"""A progress bar where somebody watches, nothing in a batch log. What a log gets instead is the caller's business."""

import os
import sys

from .mpi import launcher, process

# Those that write where the user looks; their daemons do not.
_LAUNCHERS = ("mpirun", "prterun", "orterun", "mpiexec", "mpiexec.hydra", "srun")


def find():
    """The terminal the user watches, opened for writing, or None in a batch job and where output goes to a file.

    Not `isatty` under a launcher: mpirun gives every rank a pseudo-terminal or a pipe, whatever its own output is. What
    counts is where the launcher writes. HPCLLM_PROGRESS=lines|bar decides by hand.
    """
    wish = os.environ.get("HPCLLM_PROGRESS")
    if wish == "lines":
        return None
    if wish != "bar" and not (os.isatty(1) if launcher.find()[0] is None else _launcher_has_terminal()):
        return None
    try:
        return open("/dev/tty", "w", encoding="utf-8")
    except OSError:
        return sys.stderr if wish == "bar" else None


def _launcher_has_terminal():
    """True where the standard output of the launcher above this process is a terminal (root runs on its host)."""
    for above in process.ancestors():
        if above.name in _LAUNCHERS:
            try:
                output = os.readlink(f"/proc/{above.number}/fd/1")
            except OSError:
                return False
            if not output.startswith(("pipe:", "socket:")):
                return output.startswith(("/dev/pts/", "/dev/tty"))
    return False


def bar(what, total, done=0, in_bytes=False):
    """A started rich Progress with one task (id 0) and a field `text`, or None where nobody watches."""
    terminal = find()
    if terminal is None:
        return None
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    words = [TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[text]}")]
    shown = Progress(
        words[0], BarColumn(bar_width=20), count, TimeRemainingColumn(), words[1], console=Console(file=terminal)
    )
    shown.add_task(what, total=total, completed=done, text="")
    shown.start()
    return shown
