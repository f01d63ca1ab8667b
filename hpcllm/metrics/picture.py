"""A picture of a confusion matrix. matplotlib, an extra, is imported only where something is drawn or checked."""

import os
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..files import failing_as_io, sync_file
from .classes import divide

_WRITTEN_OUT = 20  # up to so many classes the counts stand in the cells
_LONGEST_NAME = 24  # longer names are cut


def check(path):
    """UsageError where `path` could not be drawn: no matplotlib, or an ending it does not know. Returns the ending."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("a confusion picture needs matplotlib: pip install 'hpcllm[plots]'") from None
    kind = Path(path).suffix.removeprefix(".").lower()
    kinds = Figure().canvas.get_supported_filetypes()
    if kind not in kinds:
        raise UsageError(f"{path}: the name must end in one of .{', .'.join(sorted(kinds))}")
    return kind


def confusion_picture(matrix, names, path):
    """Draw a confusion matrix, int [C, C], rows gold, columns found, of classes called `names`, into the file `path`.

    A cell's colour is its share of its row, so that rare classes are seen as well as frequent ones; its number is the
    count, while there is room. The file appears complete or not at all. UsageError as `check`, IOFailure.
    """
    kind = check(path)
    # Figure alone, without pyplot, chooses the file's own renderer and never asks for a display.
    from matplotlib.figure import Figure

    shares = divide(matrix, matrix.sum(axis=1, keepdims=True))
    shown = [name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in names]
    side = min(max(4.0, 1.5 + 0.55 * len(names)), 16.0)
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, label="share of the gold class", shrink=0.8)
    size = min(10.0, max(5.0, 20 * side / len(names)))  # points, of which a row has up to 72 * side / C
    long = max(map(len, shown)) > 3
    style = {"fontsize": size, "parse_math": False}  # a name may have dollars
    axes.set_xticks(range(len(names)), shown, rotation=90 if long else 0, **style)
    axes.set_yticks(range(len(names)), shown, **style)
    axes.set(xlabel="found", ylabel="gold", title=f"{matrix.sum()} examples, {np.trace(matrix)} right")
    if len(names) <= _WRITTEN_OUT:
        for (row, column), share in np.ndenumerate(shares):
            count, colour = f"{matrix[row, column]}", "white" if share > 0.5 else "black"
            fitting = min(9.0, 45 / len(count))
            axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=fitting)
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with failing_as_io(path):
        try:
            figure.savefig(part, format=kind, dpi=120)
            sync_file(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
