"""How fast are collectives? This backend, MPI's own calls, Gloo and one memory copy, side by side in one run.

    mpirun -np 2 python -m benchmarks.collectives [--operation all_reduce ...] [--json FILE] [--plot FILE]

Every round measures all of them one after the other, several rounds make medians and spreads; a call takes as long as
its slowest rank. "size" is that of the whole tensor: what goes into all_reduce, reduce_scatter, broadcast and
all_to_all, what comes out of all_gather. "in place" is this backend on tensors of its `allocate_tensor`, which ranks of
a host reach from where they are, as DDP's gradients with its hooks. MPI's own calls are mpi4py's on NumPy arrays, which
cannot sum bfloat16. "copy" is one copy of as many bytes in each rank at the same time. Short calls are timed in rows of
several.
"""

import argparse
import json
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

import hpcllm.mpi
from hpcllm.mpi import choose, device, rendezvous

from . import jobs

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")
SIZES = (4, 256, 4 << 10, 64 << 10, 1 << 20, 4 << 20, 26 << 20, 64 << 20, 256 << 20)
WAYS = {
    "hpcllm": "tab:blue",
    "in place": "tab:cyan",
    "MPI": "tab:orange",
    "Gloo": "tab:green",
    "copy": "tab:gray",
}  # and their colours
# A row of calls takes about so long; at most so many calls.
ROW_S, ROW_CALLS = 0.02, 200


def start():
    """(World, Gloo group): this backend is torch's default group, Gloo one beside it, over loopback or the network."""
    world = hpcllm.mpi.join()
    device.bind_threads(world)
    device.keep_memory()
    # A store that Gloo can use; this backend needs none.
    backend, _ = rendezvous.meet(world, "mpi", torch.device("cpu"))
    _, store = rendezvous.meet(world, "gloo", torch.device("cpu"))
    hook = sys.excepthook  # torch's would wait for an answer that does not come (see `hpcllm.mpi.init`)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
    sys.excepthook = hook
    return replace(world, group=dist.group.WORLD), dist.new_group(backend="gloo")


def calls(operation, size_bytes, dtype, comm, gloo):
    """{way: function without arguments} for one operation; ways that cannot do it are left out."""
    n = comm.size
    count = max(1, size_bytes // dtype.itemsize)
    count = -(-count // n) * n if operation in ("reduce_scatter", "all_gather", "all_to_all") else count
    lengths = count, count, count // n or 1
    # Zeros: sums must not overflow in hundreds of calls.
    whole, other, part = ordinary = [torch.zeros(length, dtype=dtype) for length in lengths]
    reached = [dist.group.WORLD.allocate_tensor(length, dtype=dtype).zero_() for length in lengths]
    summed = np.float32 if dtype is torch.float32 else None
    a, b, c = (t.view(torch.uint8).numpy().view(summed or np.uint8) for t in (whole, other, part))
    # The older names cost a warning a call from torch 2.13 on.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    torches = {
        "all_reduce": lambda group, whole, other, part: dist.all_reduce(whole, group=group),
        "reduce_scatter": lambda group, whole, other, part: scatter(part, whole, group=group),
        "all_gather": lambda group, whole, other, part: gather(whole, part, group=group),
        "broadcast": lambda group, whole, other, part: dist.broadcast(whole, 0, group=group),
        "all_to_all": lambda group, whole, other, part: dist.all_to_all_single(other, whole, group=group),
    }
    raw = {
        "all_reduce": lambda: comm.Allreduce(a, b),
        "reduce_scatter": lambda: comm.Reduce_scatter_block(a, c),
        "all_gather": lambda: comm.Allgather(c, a),
        "broadcast": lambda: comm.Bcast(a, root=0),
        "all_to_all": lambda: comm.Alltoall(a, b),
    }
    ours = torches[operation]
    made = {"hpcllm": lambda: ours(None, *ordinary), "Gloo": lambda: ours(gloo, *ordinary)}
    if operation in ("all_reduce", "reduce_scatter", "all_gather"):
        made["in place"] = lambda: ours(None, *reached)
    made["copy"] = lambda: other.copy_(whole)
    if summed or operation in ("all_gather", "broadcast", "all_to_all"):
        made["MPI"] = raw[operation]
    return made


def seconds(call, comm, row):
    """Seconds a call, of the slowest rank."""
    comm.Barrier()
    began = time.perf_counter()
    for _ in range(row):
        call()
    return comm.allreduce(time.perf_counter() - began, op=MPI.MAX) / row


def measure(operation, size_bytes, dtype, comm, gloo, rounds):
    """{way: seconds of each round}."""
    made, taken = calls(operation, size_bytes, dtype, comm, gloo), {}
    rows = {}
    for way, call in made.items():
        first = [seconds(call, comm, 1) for _ in range(3)]
        rows[way] = max(1, min(ROW_CALLS, int(ROW_S / min(first))))
    for _ in range(rounds):
        for way in WAYS:
            if way in made:
                taken.setdefault(way, []).append(seconds(made[way], comm, rows[way]))
    return taken


def text(value_s):
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value_s * factor >= 1 or unit == "us":
            return f"{value_s * factor:.3g} {unit}"


def size_name(size_bytes):
    for shift, unit in ((20, "MB"), (10, "KB")):
        if size_bytes >= 1 << shift:
            return f"{size_bytes >> shift} {unit}"
    return f"{size_bytes} B"


def table(records):
    """Markdown: median (smallest to largest) of each way, and how many times longer the others take."""
    lines = []
    for operation, dtype in dict.fromkeys((record["operation"], record["dtype"]) for record in records):
        ratios = [f"{other} / {ours}" for ours in ("hpcllm", "in place") for other in ("MPI", "Gloo")]
        heads = ["size", *WAYS, *ratios]
        lines += [f"\n**{operation}, {dtype}**\n", f"| {' | '.join(heads)} |", "|---:" * len(heads) + "|"]
        for record in records:
            if (record["operation"], record["dtype"]) != (operation, dtype):
                continue
            cells, middle = [size_name(record["size_bytes"])], {}
            for way in WAYS:
                values = record["seconds"].get(way)
                if values:
                    middle[way] = float(np.median(values))
                    cells.append(f"{text(middle[way])} ({text(min(values))} to {text(max(values))})")
                else:
                    cells.append("none")
            for ratio in ratios:
                other, ours = ratio.split(" / ")
                cells.append(f"{middle[other] / middle[ours]:.2f}" if other in middle and ours in middle else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(records, path, title):
    """A PNG: seconds a call against size, a panel for each operation and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((record["operation"], record["dtype"]) for record in records))
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.4 * rows), squeeze=False, sharex=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        chosen = [record for record in records if (record["operation"], record["dtype"]) == panel]
        for way, colour in WAYS.items():
            points = [(r["size_bytes"], np.median(r["seconds"][way])) for r in chosen if way in r["seconds"]]
            if points:
                axis.loglog(*zip(*points, strict=True), label=way, color=colour, marker="o", markersize=3)
        axis.set_title(", ".join(panel))
        axis.set_xlabel("bytes")
        axis.set_ylabel("seconds a call")
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operation", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--size", nargs="+", type=int, default=SIZES, metavar="BYTES")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="needs matplotlib")
    args = parser.parse_args()
    world, gloo = start()
    records = []
    for operation in args.operation:
        for dtype in args.dtype:
            for size_bytes in args.size:
                taken = measure(operation, size_bytes, getattr(torch, dtype), world.comm, gloo, args.rounds)
                records.append({"operation": operation, "dtype": dtype, "size_bytes": size_bytes, "seconds": taken})
    if world.is_root:
        title = f"{world.size} ranks on {len(world.hosts)} host(s), {world.library}, {jobs.versions()}"
        print(f"{title}; median of {args.rounds} rounds (smallest to largest)")
        print(table(records))
        print("\nWays chosen at the first calls of a size (`hpcllm.mpi.choose`):\n")
        for choice in choose.made():
            times = ", ".join(f"{way} {text(value)}" for way, value in choice["seconds"].items())
            print(f"- {choice['operation']}, up to {choice['bytes_up_to'] + 1} bytes: {choice['way']} ({times})")
        sys.stdout.flush()
        for record in records:
            seconds, size = record["seconds"], size_name(record["size_bytes"])
            for other in ("Gloo", "MPI"):
                if seconds.get(other) and record["size_bytes"] >= 1 << 16:
                    what = f"{record['operation']}, {record['dtype']}, {size}, {world.size} ranks: {other}"
                    jobs.record(what, np.divide(seconds[other], seconds["hpcllm"]))
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump({"title": title, "records": records}, file)
        if args.plot:
            plot(records, args.plot, title)
    dist.destroy_process_group(gloo)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
