"""To which of its calls this MPI library takes the addresses of GPU memory, found out by trying.

A library cannot be asked: answers are wrong both ways, awareness differs from call to call, and a wrong guess is a
segmentation fault or wrong numbers. So a small job of its own on each host, two processes on this rank's GPU, makes one
call after the other and says which gave the right numbers; only those get device memory from then on, the others pinned
host memory (`device`). What a library does between hosts is not tried. The answer is kept in the user's cache folder
under library, its variables, GPU and driver.

    HPCLLM_GPU_AWARE    auto, on (every call, untried: for machines where no second job can be started), or off
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from ..errors import UsageError
from ..imports import cache_folder

CALLS = ("Isend", "Bcast", "Allgather", "Allgatherv", "Alltoallv", "Gather", "Gatherv", "Scatter")
# Elements of 4 bytes: libraries take other ways for large messages.
_SIZES = (1, 1000, 1 << 20)
_STARTED, _RIGHT, _WRONG = "hpcllm-gpu-aware", "right", "wrong"
_JOB_S, _RANKS = 120.0, 2
# By these a process knows the job that it belongs to; the trial must not.
_JOB_VARIABLES = ("OMPI_COMM", "OMPI_FILE", "OMPI_UNIVERSE", "PMIX_", "PMI", "PRTE_LAUNCHED", "MPI_LOCAL", "HYD")
_JOB_VARIABLES += ("SLURM_", "PBS_", "PALS_", "FLUX_", "JSM_", "MV2_COMM", "MPIEXEC")
# Open MPI's mpirun tells its ranks of the job by names that look like a user's settings.
_JOB_VARIABLES += ("OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix", "OMPI_MCA_prte", "OMPI_MCA_initial_wdir")
_JOB_VARIABLES += ("OMPI_MCA_num_procs", "OMPI_MCA_shmem_RUNTIME")
# By these users choose what a library does with GPU memory, and how it travels.
_TUNING = ("OMPI_MCA_", "MPICH_", "UCX_", "FI_", "PSM", "MV2_", "I_MPI_", "CUDA_VISIBLE", "LD_PRELOAD")


def find(world, device):
    """The frozenset of MPI calls to which ranks may hand memory of their GPUs. Collective over `world`.

    device: torch.device of this rank. Where nothing is known yet this takes seconds, or minutes if many calls fail.
    """
    wish = world.comm.bcast(os.environ.get("HPCLLM_GPU_AWARE", "auto"))
    if wish not in ("auto", "on", "off"):
        raise UsageError(f'HPCLLM_GPU_AWARE="{wish}" is not one of auto, on, off').known_to_all()
    if wish != "auto":
        return frozenset(CALLS if wish == "on" else ())
    mine = _known(world, device) if world.local_rank == 0 else None
    answers = [answer for answer in world.comm.allgather(mine) if answer is not None]
    return frozenset.intersection(*map(frozenset, answers))


def _known(world, device):
    """What the cache says of this host's library and GPU, or else a trial, which is then written there."""
    key, file, answers = _key(world, device), None, {}
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        file = cache_folder() / "gpu_aware.json"
        answers = json.loads(file.read_text())
    if key in answers:
        return answers[key]
    mpirun = _mpirun(world.library_path)
    proven = trial(mpirun, str(device)) if mpirun else None
    if proven is None:
        return []
    answers[key] = sorted(proven)
    with contextlib.suppress(OSError, AttributeError):  # it would only be asked again
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(answers, indent=1))
        new.replace(file)
    return answers[key]


def _key(world, device):
    """All that the answer depends on: library, the user's settings for it and its transports, GPU and driver."""
    import torch

    settings = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(_TUNING) and not _belongs_to_job(k))
    digest = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:16]
    driver = ""
    with contextlib.suppress(OSError):
        driver = Path("/proc/driver/nvidia/version").read_text().split("\n")[0]
    name = torch.get_device_module(device).get_device_name(device)
    toolkit = torch.version.cuda or torch.version.hip or torch.version.xpu
    return " | ".join((world.library_path, world.library, name, f"{toolkit} {driver}", digest))


def _belongs_to_job(name):
    return name.startswith(_JOB_VARIABLES)


def _mpirun(library_path):
    """The mpirun that belongs to the library, or the one on the path; None where there is none."""
    for name in ("mpirun", "mpiexec"):
        beside = Path(library_path).resolve().parent.parent / "bin" / name
        if os.access(beside, os.X_OK):
            return str(beside)
    return shutil.which("mpirun") or shutil.which("mpiexec")


def _command(mpirun, device, calls):
    open_mpi = "open mpi" in subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout.lower()
    options = ["--oversubscribe", "--bind-to", "none"] if open_mpi else []
    return [mpirun, "-np", str(_RANKS), *options, sys.executable, "-m", "hpcllm.mpi.gpu_aware", device, *calls]


def trial(mpirun, device):
    """The set of calls that a job of two processes, started by `mpirun`, found to be right on `device` ("cuda:0").

    A call that ends the job, or does not end, is wrong; those after it are tried by a new job. None where no such job
    can be started.
    """
    environment = {name: value for name, value in os.environ.items() if not _belongs_to_job(name)}
    proven, left = set(), list(CALLS)
    while left:
        try:
            words = [line.split() for line in _output(_command(mpirun, device, left), environment).splitlines()]
        except OSError:
            return None
        if words.count([_STARTED]) != 1:
            return None
        said = [line for line in words if len(line) == 2 and line[0] in (_RIGHT, _WRONG)]
        proven.update(call for verdict, call in said if verdict == _RIGHT)
        left = left[len(said) + 1 :]
    return proven


def _output(command, environment):
    """What the job prints until it ends, or is ended after `_JOB_S`."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, start_new_session=True, **options) as job:
        for patience_s, end in ((_JOB_S, signal.SIGTERM), (10.0, signal.SIGKILL)):  # mpirun passes the first one on
            try:
                return job.communicate(timeout=patience_s)[0]
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, end)
        return job.communicate()[0]


# ---- what each of the two processes does


def _make(call, count, device):
    """True if `call` of `count` elements on `device` gives the right numbers on this rank."""
    import torch
    from mpi4py import MPI

    from .device import memory, units

    comm = MPI.COMM_WORLD
    rank, size = comm.rank, comm.size
    everything = torch.arange(size * count, dtype=torch.int32)
    parts = everything.chunk(size)
    mine, one = parts[rank].to(device), torch.full((count,), -1, dtype=torch.int32, device=device)
    whole = torch.full((size * count,), -1, dtype=torch.int32, device=device)
    counts, last = [count] * size, size - 1
    split = [memory(whole), counts, MPI.INT32_T]
    if call == "Isend":
        other = size - 1 - rank
        MPI.Request.Waitall([comm.Irecv(units(one), other), comm.Isend(units(mine), other)])
        return torch.equal(one.cpu(), parts[other])
    if call == "Bcast":
        comm.Bcast(units(mine), root=last)
        return torch.equal(mine.cpu(), parts[last])
    if call == "Scatter":
        everything = everything.to(device)
        comm.Scatter([memory(everything), count, MPI.INT32_T], units(one), root=last)
        return torch.equal(one.cpu(), parts[rank])
    if call == "Alltoallv":
        sent = torch.cat([parts[rank] + 10 * other for other in range(size)]).to(device)
        comm.Alltoallv([memory(sent), counts, MPI.INT32_T], split)
        return torch.equal(whole.cpu(), everything + 10 * rank)
    if call == "Allgather":
        comm.Allgather(units(mine), [memory(whole), count, MPI.INT32_T])
    elif call == "Allgatherv":
        comm.Allgatherv(units(mine), split)
    elif call == "Gather":
        comm.Gather(units(mine), [memory(whole), count, MPI.INT32_T] if rank == last else None, root=last)
    else:
        comm.Gatherv(units(mine), split if rank == last else None, root=last)
    return torch.equal(whole.cpu(), everything) or (call.startswith("Gather") and rank != last)


def main(device, calls):
    import torch
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.size != _RANKS:
        sys.exit("this mpirun does not belong to this MPI library")
    torch.zeros(1, device=device)  # a GPU that serves one process alone ends the trial here
    comm.Barrier()
    if comm.rank == 0:
        print(_STARTED, flush=True)
    for call in calls:
        right = [_make(call, count, device) for count in _SIZES]
        right = comm.allreduce(all(right), op=MPI.LAND)
        if comm.rank == 0:
            print(_RIGHT if right else _WRONG, call, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
