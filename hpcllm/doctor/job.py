"""Whether the processes are one job: launcher and libmpi, software, thread level, and sums that are right.

`look` and `add_up` run on every rank; the judging functions compare what they returned, without MPI.
"""

import platform
import sys
from importlib import metadata

from .finding import failure, named, ok, warning

# Elements of a sum: few take one all-gather, many an exchange of slices (see mpi.reduce), neither divides evenly.
COUNTS = (1001, 70001)


# --- looking -----------------------------------------------------------------------------------------------------


def look(world, thread_level):
    """Facts of this rank: what it runs. thread_level: what MPI granted, in words."""
    import torch

    from .. import __version__

    return {
        "library": world.library,
        "library_path": world.library_path,
        "thread_level": thread_level,
        "software": {
            "python": f"{platform.python_version()} ({sys.executable})",
            "hpcllm": __version__,
            "torch": torch.__version__,
            "mpi4py": metadata.version("mpi4py"),
        },
    }


def dtypes():
    import torch

    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
    return [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *floats]


def terms(rank, size, count, dtype):
    """What `rank` of `size` contributes to a sum: a tensor [count] of `dtype`.

    Small multiples of 0.75, of both signs, whose sums in any order are exact even in bfloat16 at any number of ranks;
    no sum is 0, and every rank decides some elements alone. Unsigned integers get only that last part.
    """
    import torch

    index = torch.arange(count)
    alone = torch.where(index % size == rank, index % 5 + 1, 0)
    return _scaled(alone, (index + rank) % 3 - 1, dtype)


def exact_sum(size, count, dtype):
    """The sum of `terms` over all ranks, in closed form, as float64 or complex128."""
    import torch

    index = torch.arange(count)
    # Over three neighbouring ranks -1, 0 and 1 cancel, so that no partial sum grows with the number of ranks.
    waves = sum(((index + rank) % 3 - 1 for rank in range(size - size % 3, size)), torch.zeros_like(index))
    wide = _scaled(index % 5 + 1, waves, dtype)
    return wide.to(torch.complex128 if dtype.is_complex else torch.float64)


def _scaled(alone, waves, dtype):
    if not dtype.is_signed:
        return alone.to(dtype)
    return ((alone * 4 + waves) * (0.75 if dtype.is_floating_point or dtype.is_complex else 1)).to(dtype)


def add_up(world):
    """{dtype: "right", or what is wrong} of all_reduce over all ranks against the exact sum. Collective."""
    import torch.distributed as dist

    found = {}
    for dtype in dtypes():
        verdict = "right"
        for count in COUNTS:
            exact = exact_sum(world.size, count, dtype)
            tensor = terms(world.rank, world.size, count, dtype)
            try:
                dist.all_reduce(tensor)
            except (TypeError, NotImplementedError) as error:  # refusals, which all ranks make alike
                verdict = f"refused: {error}"
                break
            wrong = (tensor.to(exact.dtype) != exact).nonzero()
            if len(wrong):
                place = int(wrong[0])
                verdict = (
                    f"{len(wrong)} of {count} sums are wrong on rank {world.rank}: element {place} is "
                    f"{tensor[place].item()}, not {exact[place].item()}"
                )
                break
        found[str(dtype).removeprefix("torch.")] = verdict
    return found


# --- judging -----------------------------------------------------------------------------------------------------


def judge(launcher, hosts, ranks, prefix=sys.prefix):
    """Findings about the start of the job. launcher: how it was started, in words; hosts: all of them; ranks: facts.

    prefix: folder of this Python's environment. That launcher and library make one world has been seen to before:
    `mpi.join` refuses lone worlds with exit code 2.
    """
    first = ranks[0]
    described = f"{len(ranks)} rank{'s' * (len(ranks) > 1)} on {len(hosts)} host{'s' * (len(hosts) > 1)}"
    described += f", started by {launcher}, {first['library']} ({first['library_path']})"
    findings = []
    for subject, key in (("mpi", "library"), ("mpi", "library_path")):
        findings += _differing(subject, {rank["rank"]: rank[key] for rank in ranks}, "MPI library")
    wheel = first["library_path"].startswith(prefix)
    if len(hosts) > 1 and wheel:
        text = f"{described}: a library from PyPI, which knows no fabric but TCP and shared memory"
        findings.append(warning("mpi", text, "load the site's MPI module and set MPI4PY_LIBMPI to its libmpi"))
    if len(ranks) == 1:
        text = f"{described}: one process, so nothing between ranks was tested"
        findings.append(warning("mpi", text, "start it as the job will be: `srun hpcllm doctor`, `mpirun -np 4 ...`"))
    if not findings:
        findings.append(ok("mpi", described))
    return findings + _judge_threads(ranks) + _judge_software(ranks)


def _differing(subject, values, what):
    """A failure where not all ranks have the same value. values: {rank: value}."""
    kinds = list(dict.fromkeys(values.values()))
    if len(kinds) == 1:
        return []
    told = "; ".join(
        f"{kind} on {named('rank', [rank for rank, value in values.items() if value == kind])}" for kind in kinds[:4]
    )
    cure = "give all ranks the same modules, environment and file system (`srun --export=ALL`)"
    return [failure(subject, f"the ranks have different versions of {what}: {told}", cure)]


def _judge_threads(ranks):
    poor = [rank["rank"] for rank in ranks if rank["thread_level"] != "multiple"]
    if not poor:
        return [ok("threads", "MPI grants MPI_THREAD_MULTIPLE")]
    level = ranks[poor[0]]["thread_level"].upper()
    text = f"MPI grants MPI_THREAD_{level} to {named('rank', poor)}, so nothing can be sent while a rank computes"
    return [warning("threads", text, "unset MPI4PY_RC_THREAD_LEVEL, or use an MPI built with thread support")]


def _judge_software(ranks):
    findings = []
    for name in ranks[0]["software"]:
        findings += _differing("software", {rank["rank"]: rank["software"][name] for rank in ranks}, name)
    software = ranks[0]["software"]
    return findings or [ok("software", ", ".join(f"{name} {version}" for name, version in software.items()))]


def judge_sums(sums):
    """Findings about what `add_up` returned on each rank: sums[rank][dtype]."""
    findings = []
    for dtype in sums[0]:
        told = [verdicts[dtype] for verdicts in sums if verdicts[dtype] != "right"]
        if told and told[0].startswith("refused"):
            findings.append(warning("sums", f"all_reduce of {dtype} is {told[0]}", "cast such tensors first"))
        elif told:
            cure = "do not train with this dtype here; try another MPI (MPI4PY_LIBMPI) and report it to the site"
            findings.append(failure("sums", f"all_reduce of {dtype} adds up wrongly: {told[0]}", cure))
    return findings or [ok("sums", f"all_reduce is exact for {', '.join(sums[0])}")]
