"""A picture of the bandwidth between hosts, or ranks of one host. matplotlib is an extra."""

import os

from ..errors import UsageError

_WRITTEN_OUT = 12  # up to so many places the numbers stand in the cells
_TICKS = 32


def check(path):
    """Refuse before anything is measured: no matplotlib, or an ending it cannot draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'hpcllm[plots]'") from None
    kinds = Figure().canvas.get_supported_filetypes()
    if os.path.splitext(path)[1].removeprefix(".").lower() not in kinds:
        raise UsageError(f"--plot {path}: the name must end in one of .{', .'.join(sorted(kinds))}")


def bandwidth(path, names, links, what):
    """Draw the links between the places called `names` into the file `path`; what: "host" or "rank"."""
    # Figure alone, without pyplot, chooses the file's own renderer and never asks for a display.
    import numpy as np
    from matplotlib.figure import Figure

    rates = np.full((len(names), len(names)), np.nan)
    for link in links:
        rates[link["a"], link["b"]] = rates[link["b"], link["a"]] = link["bandwidth_bytes_per_s"] / 1e9
    side = min(max(4.0, 1.5 + 0.6 * len(names)), 14.0)
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")  # of pairs that were not measured, and of the diagonal
    fastest = max((link["bandwidth_bytes_per_s"] / 1e9 for link in links), default=1.0)
    drawn = axes.imshow(rates, cmap="viridis", vmin=0, vmax=fastest)
    figure.colorbar(drawn, label="bandwidth one way (GB/s)", shrink=0.8)
    ticks = range(0, len(names), -(-len(names) // _TICKS))
    shown = [names[tick] for tick in ticks]
    missing = "" if 2 * len(links) == len(names) * (len(names) - 1) else " (grey: not measured)"
    long = max(map(len, shown)) > 3
    axes.set_xticks(ticks, shown, rotation=45 if long else 0, ha="right" if long else "center")
    axes.set_yticks(ticks, shown)
    axes.set(xlabel=what, ylabel=what, title=f"Bandwidth between {what}s, MPI messages of 4 MiB{missing}")
    if len(names) <= _WRITTEN_OUT:
        for (row, column), rate in np.ndenumerate(rates):
            if not np.isnan(rate):
                colour = "black" if rate > fastest / 2 else "white"
                axes.text(column, row, f"{rate:#.3g}", ha="center", va="center", color=colour, fontsize=9)
    figure.savefig(path, dpi=120)
