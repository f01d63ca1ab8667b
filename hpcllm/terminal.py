"""A progress bar where somebody watches, nothing in a batch log. What a log gets instead is the caller's business."""

import os
import sys


def find():
    """The terminal the user watches, opened for writing, or None in a batch job.

    Not `isatty`: mpirun gives every rank a pseudo-terminal or a pipe, whatever its own output is. A process with a
    controlling terminal can open /dev/tty; one under a batch system cannot. HPCLLM_PROGRESS=lines|bar decides by hand.
    """
    if os.environ.get("HPCLLM_PROGRESS") == "lines":
        return None
    try:
        return open("/dev/tty", "w", encoding="utf-8")
    except OSError:
        return sys.stderr if os.environ.get("HPCLLM_PROGRESS") == "bar" else None


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
