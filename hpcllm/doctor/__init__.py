"""`hpcllm doctor`: is this machine, as this job sees it, fit to train on? Measures on all ranks, judges on root.

`measure` finds facts (plain dicts) and is collective; `judge` turns them into findings without MPI; what a finding
looks like is in `finding`, the rest is a file a subject. It changes nothing but a hidden folder that it removes.
"""

import json
import os
from dataclasses import asdict

from ..errors import CannotCreate, MissingInput
from ..files import failing_as_io, write_text
from . import cores, job, judge_storage, speed, storage
from .finding import FAILURE, OK, WARNING, excluded

# EX_UNAVAILABLE of sysexits.h; not 1, which is a doctor that failed itself.
UNFIT = 69
PRODUCTS_S = 0.3  # for a rank's matrix products, of each kind


def check(folder, plot_file, exclude_file):
    """Refuse what cannot be looked at or written, before anything is measured."""
    if not os.path.isdir(folder):
        raise MissingInput(f"--folder {folder} is not a folder")
    for option, path in (("--plot", plot_file), ("--exclude-file", exclude_file)):
        if path and (os.path.isdir(path) or not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK)):
            raise CannotCreate(f"{option} {path}: it is a folder, or its folder is missing or may not be written to")
    if plot_file:
        from . import plot

        plot.check(plot_file)


def measure(world, folder):
    """Facts of all ranks, on root; None elsewhere. Collective over the world, torch.distributed running over it.

    {"launcher", "folder", "space", "quotas", "ranks": [facts], "sums": [{dtype: verdict}], "hosts": [facts],
    "clocks": [(offset_s, error_s)], "between": "host" or "rank", "places": [names], "links": [...]}
    """
    from .. import utilisation
    from ..mpi import links

    comm = world.comm
    mine = {**cores.look(world), **job.look(world, links.thread_level())}
    sums = comm.gather(job.add_up(world))
    comm.Barrier()  # all multiply at the same time, as in training
    device = utilisation.torch.device(mine["gpu"]["device"] if mine["gpu"] else "cpu")
    mine["flops"] = {kind: utilisation.products(device, kind, mine["threads"], PRODUCTS_S) for kind in ("fp32", "bf16")}
    ranks = comm.gather(mine)

    # One rank a host looks at what a host has once; root is one of them.
    hosts, clocks, found = links.one_per_host(world), None, None
    if hosts is not None:
        seen = {"host": mine["host"], **storage.look(storage.launched_with())}
        seen["folder"] = storage.measure_folder(hosts, folder)
        found = hosts.gather(seen)
        clocks = links.clock_offsets(hosts)
    comm.Barrier()
    several = len(world.hosts) > 1
    measured = links.measure(hosts if several else comm) if hosts is not None or not several else None
    if hosts is not None:
        hosts.Free()
    if not world.is_root:
        return None
    return {
        "launcher": world.launcher,
        "folder": os.path.abspath(folder),
        "space": storage.space(folder),
        "quotas": storage.quota(folder),
        "ranks": ranks,
        "sums": sums,
        "hosts": found,
        "clocks": clocks,
        "between": "host" if several else "rank",
        "places": [host["host"] for host in found] if several else [str(rank) for rank in range(world.size)],
        "links": measured,
    }


def judge(facts):
    """All findings about what `measure` found, in the order of the report."""
    ranks, between_hosts = facts["ranks"], facts["between"] == "host"
    names = [host["host"] for host in facts["hosts"]]
    return [
        *job.judge(facts["launcher"], names, ranks),
        *job.judge_sums(facts["sums"]),
        *cores.judge(ranks, os.environ.get("HPCLLM_SHARE_GPU") == "1"),
        *speed.judge_products(ranks, cores.crowded(ranks)),
        *speed.judge_links(facts["places"], facts["links"], between_hosts),
        *speed.judge_clocks(names, facts["clocks"]),
        *judge_storage.judge(facts["folder"], facts["space"], facts["quotas"], facts["hosts"]),
    ]


def report(facts, findings, seconds, as_json=False, plot_file=None, exclude_file=None):
    """Print the findings and write the files that were asked for; on root."""
    counts = {level: sum(each.level == level for each in findings) for level in (OK, WARNING, FAILURE)}
    if as_json:
        told = {"counts": counts, "seconds": seconds, "findings": [asdict(each) for each in findings], "facts": facts}
        print(json.dumps(told, indent=2))
    else:
        for each in findings:
            print(each.line())
        told = [f"{n} {word}{'s' * (n != 1 and word != OK)}" for word, n in counts.items()]
        print(f"doctor: {', '.join(told)} in {seconds:.1f} s")
    if plot_file:
        from . import plot

        with failing_as_io(plot_file):
            plot.bandwidth(plot_file, facts["places"], facts["links"], facts["between"])
    if exclude_file:
        write_text(exclude_file, f"{excluded(findings)}\n")
