"""Which cores and which GPU each rank has, and whether ranks are in each other's way.

`look` reads this process's binding from the kernel; `judge` compares what all ranks saw, without MPI.
"""

import glob
import os
from collections import defaultdict
from pathlib import Path

from ..mpi import numa
from ..mpi.gpu_aware import CALLS
from .finding import failure, named, odd_ones, ok, on, warning

# What the kernel shows of GPUs, whether or not torch can use them: NVIDIA's, AMD's, Intel's.
_DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dri/by-path/*-render")
BIND = "bind each rank to its own cores (`srun --cpu-bind=cores -c N`, `mpirun --bind-to core --map-by slot:PE=N`)"


# --- looking -----------------------------------------------------------------------------------------------------


def look(world, sys="/sys"):
    """Facts of this rank: cores, their physical cores and NUMA nodes, threads, GPU. `sys`: where sysfs is mounted."""
    import torch

    from ..mpi.device import handed_over

    cores = sorted(os.sched_getaffinity(0))
    places = numa.nodes(sys)
    return {
        "rank": world.rank,
        "host": node_name(world.host),
        "cores": cores,
        "physical_cores": sorted({_first_sibling(sys, core) for core in cores}),
        "numa_nodes": sorted({places[core] for core in cores if core in places}),
        "host_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **_gpu(world.local_rank, sys),
        "gpu_calls": handed_over(),
    }


def node_name(host, environ=os.environ):
    """The host as Slurm calls it, where Slurm does, since that is what sbatch's --exclude understands."""
    return environ.get("SLURMD_NODENAME") or host


def _first_sibling(sys, core):
    """The lowest hardware thread of a core's physical core."""
    try:
        return numa.parse_list(Path(f"{sys}/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text())[0]
    except (OSError, ValueError, IndexError):
        return core


def _gpu(local_rank, sys):
    """The GPU that `mpi.device.choose` would give this rank, {"gpu": None} without; and devices that torch misses."""
    import torch

    from ..mpi import device

    found = device.local_gpu(local_rank)
    if found is None:
        return {"gpu": None, "gpu_devices": [path for pattern in _DEVICES for path in glob.glob(pattern)]}
    gpus = torch.get_device_module(found)
    known = gpus.get_device_properties(found.index)
    # torch tells the address from 2.9 on.
    address = [getattr(known, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    pci = None if None in address else "{:04x}:{:02x}:{:02x}.0".format(*address)
    gpu = {"device": str(found), "index": found.index, "of": gpus.device_count(), "name": known.name, "pci": pci}
    gpu |= {"uuid": str(known.uuid), "numa_node": _numa_of_device(sys, pci)}
    return {"gpu": gpu, "gpu_devices": []}


def _numa_of_device(sys, pci):
    """NUMA node of a PCI device, None where the kernel does not know."""
    try:
        node = int(Path(f"{sys}/bus/pci/devices/{pci}/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


# --- judging -----------------------------------------------------------------------------------------------------


def judge(ranks, sharing_allowed=False):
    """Findings about the facts of all ranks; sharing_allowed: HPCLLM_SHARE_GPU=1 was given."""
    return judge_cores(ranks) + judge_gpus(ranks, sharing_allowed) + judge_awareness(ranks)


def by_host(ranks):
    hosts = defaultdict(list)
    for rank in ranks:
        hosts[rank["host"]].append(rank)
    return hosts


def crowds(group, what="cores"):
    """[(cores, ranks)] of the ranks of one host that have fewer cores between them than they are.

    what: "cores" (hardware threads) or "physical_cores". Smallest sets of cores first; a set that only repeats a
    smaller one is left out.
    """
    found = []
    for cores in sorted({frozenset(rank[what]) for rank in group}, key=lambda cores: (len(cores), sorted(cores))):
        inside = [rank["rank"] for rank in group if cores.issuperset(rank[what])]
        if len(inside) > len(cores) and not any(cores > smaller for smaller, _ in found):
            found.append((cores, inside))
    return found


def crowded(ranks):
    """The ranks that have to share a core with another one."""
    return {rank for group in by_host(ranks).values() for _, inside in crowds(group) for rank in inside}


def judge_cores(ranks):
    hosts = by_host(ranks)
    findings, full, bad, twins, loose = [], [], [], [], []
    for host, group in hosts.items():
        for cores, inside in crowds(group):
            # All cores of the host: too many ranks. Some of them: a binding that puts ranks in each other's way.
            (full if len(cores) >= group[0]["host_cores"] else bad).append((host, cores, inside))
        if not crowds(group):
            twins += [(host, cores, inside) for cores, inside in crowds(group, "physical_cores")]
        wide = [rank["rank"] for rank in group if len(rank["numa_nodes"]) > 1]
        if len(group) > 1 and wide:
            loose.append((host, wide))

    def example(found):
        host, cores, inside = found[0]
        return f"{named('rank', inside)} {on([host])} have {named('core', cores)} between them"

    if bad:
        places = [host for host, _, _ in bad]
        of = ranks_host_cores(hosts, places[0])
        text = f"two workers on one core {on(places)}: {example(bad)}, although the host has {of} cores"
        findings.append(failure("cores", text, BIND))
    if full:
        places = [host for host, _, _ in full]
        most = ranks_host_cores(hosts, places[0])
        text = f"more ranks than cores {on(places)}: {example(full)}, so they take turns"
        findings.append(warning("cores", text, f"start at most {most} ranks on such a host"))
    if twins:
        text = f"ranks share physical cores {on(host for host, _, _ in twins)}: {example(twins)}"
        cure = "`srun --hint=nomultithread`, `mpirun --map-by core`, or fewer ranks a host"
        findings.append(warning("cores", text, cure))
    if loose:
        host, wide = loose[0]
        text = f"ranks may wander between NUMA nodes {on(host for host, _ in loose)}, such as {named('rank', wide)}"
        findings.append(warning("cores", f"{text} {on([host])}", BIND))
    eager = [rank for rank in ranks if rank["threads"] > len(rank["cores"])]
    if eager:
        first = eager[0]
        text = (
            f"{named('rank', [rank['rank'] for rank in eager])} run more threads than they have cores: rank "
            f"{first['rank']} {first['threads']} on {len(first['cores'])}"
        )
        findings.append(warning("cores", text, "lower OMP_NUM_THREADS, or unset it and let hpcllm choose"))
    if not findings:
        each = sorted({len(rank["cores"]) for rank in ranks})
        text = f"no two ranks must share a core; a rank may use {' or '.join(map(str, each))} of its host's cores"
        findings.append(ok("cores", text))
    return findings


def ranks_host_cores(hosts, host):
    return hosts[host][0]["host_cores"]


def judge_gpus(ranks, sharing_allowed=False):
    without = [rank for rank in ranks if rank["gpu"] is None]
    unseen = [rank["host"] for rank in without if rank["gpu_devices"]]
    if len(without) == len(ranks):
        if unseen:
            device = next(rank["gpu_devices"][0] for rank in without if rank["gpu_devices"])
            text = f"torch sees no GPU although there is {device} {on(unseen)}"
            cure = "ask the scheduler for GPUs (`--gpus-per-node`), and install the torch that fits the driver"
            return [warning("gpu", text, cure)]
        return [ok("gpu", "no rank sees a GPU: the CPU is used, and there is no GPU-awareness of MPI to look at")]
    findings = []
    if without:
        text = f"{len(without)} of {len(ranks)} ranks see no GPU and the others do: "
        text += f"{named('rank', [rank['rank'] for rank in without])} {on(rank['host'] for rank in without)}"
        cure = "give every task a GPU (`--gpus-per-task=1`) or leave those hosts out"
        poor = odd_ones([rank["host"] for rank in without], by_host(ranks))
        findings.append(failure("gpu", text, cure, poor))
    seen = [rank for rank in ranks if rank["gpu"] is not None]
    owners = defaultdict(list)
    for rank in seen:
        owners[rank["host"], rank["gpu"]["uuid"]].append(rank["rank"])
    shared = {place: inside for place, inside in owners.items() if len(inside) > 1}
    if shared:
        (host, uuid), inside = next(iter(shared.items()))
        text = f"ranks share a GPU {on(host for host, _ in shared)}: {named('rank', inside)} {on([host])} have {uuid}"
        if sharing_allowed:
            findings.append(warning("gpu", text, "unset HPCLLM_SHARE_GPU and start one rank per GPU"))
        else:
            findings.append(failure("gpu", text, "start one rank per GPU (`--ntasks-per-node` = GPUs of a node)"))
    far = [
        rank
        for rank in seen
        if rank["gpu"]["numa_node"] is not None
        and rank["numa_nodes"]
        and rank["gpu"]["numa_node"] not in rank["numa_nodes"]
    ]
    if far:
        first = far[0]
        text = (
            f"{named('rank', [rank['rank'] for rank in far])} have a GPU far from their cores: rank {first['rank']} "
            f"{on([first['host']])} runs on NUMA {named('node', first['numa_nodes'])}, its GPU {first['gpu']['pci']} "
            f"is at node {first['gpu']['numa_node']}"
        )
        findings.append(warning("gpu", text, "`srun --gpu-bind=closest`, or bind the cores next to each GPU"))
    models = sorted({rank["gpu"]["name"] for rank in seen})
    if len(models) > 1:
        text = f"the ranks have different GPUs: {', '.join(models)}; the slowest sets the pace"
        findings.append(warning("gpu", text, "ask for nodes of one kind (`--constraint`)"))
    if not findings:
        findings.append(ok("gpu", f"each rank has a GPU of its own ({models[0]})"))
    return findings


def judge_awareness(ranks):
    """What MPI does with the memory of GPUs; nothing where no rank has one."""
    seen = [set(rank["gpu_calls"]) for rank in ranks if rank["gpu"] is not None]
    if not seen:
        return []
    calls = set.intersection(*seen)
    if not calls:
        text = "no MPI call was seen to take GPU memory: tensors travel through pinned host memory"
        cure = "load the site's GPU-aware MPI; on Cray machines also MPICH_GPU_SUPPORT_ENABLED=1 and its GTL library"
        return [warning("gpu", text, cure)]
    rest = "" if calls.issuperset(CALLS) else "; in other calls tensors travel through pinned host memory"
    return [ok("gpu", f"MPI takes GPU memory in {', '.join(sorted(calls))}{rest}")]
