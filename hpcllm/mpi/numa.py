"""Which memory is near which cores, as the kernel tells it."""

import glob
import os
from pathlib import Path


def parse_list(text):
    """The kernel's "0-3,8" as [0, 1, 2, 3, 8]."""
    result = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            result += range(int(first), int(last or first) + 1)
    return result


def nodes(sys="/sys"):
    """{core: NUMA node} of this host; empty where the kernel does not say."""
    found = {}
    for path in glob.glob(f"{sys}/devices/system/node/node[0-9]*/cpulist"):
        node = int(Path(path).parent.name.removeprefix("node"))
        found.update(dict.fromkeys(parse_list(Path(path).read_text()), node))
    return found


def own_node(sys="/sys"):
    """The NUMA node that this process is bound to; None where it may run on several, or the kernel does not say."""
    places = nodes(sys)
    mine = {places.get(core) for core in os.sched_getaffinity(0)}
    return mine.pop() if len(mine) == 1 else None
