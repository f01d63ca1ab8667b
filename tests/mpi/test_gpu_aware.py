"""Which MPI calls take device memory: the trial job, what it survives, and what is kept of it. No GPU is needed."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from launching import clean_environment, find_mpirun
from rank_tensors import needs_gpu

import hpcllm.mpi
from hpcllm.errors import UsageError
from hpcllm.mpi import device, gpu_aware

# Says that Isend is right and Bcast wrong, ends with Allgather as a segmentation fault would, and likes the rest.
SCRIPT = """
import os, sys
print("hpcllm-gpu-aware", flush=True)
for call in sys.argv[1:]:
    if call == "Allgather":
        {end}
    print("wrong" if call == "Bcast" else "right", call, flush=True)
"""


def script(monkeypatch, end):
    started = []

    def command(mpirun, device, calls):
        started.append(calls)
        return [sys.executable, "-c", SCRIPT.format(end=end), *calls]

    monkeypatch.setattr(gpu_aware, "_command", command)
    return started


@pytest.fixture
def no_job(monkeypatch):
    """The environment of a process that no MPI launcher has started."""
    for name in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(name)
    for name, value in clean_environment().items():
        monkeypatch.setenv(name, value)


def test_a_job_of_its_own_tries_every_call(no_job, monkeypatch):
    # The addresses of main memory are taken by every library, by all calls.
    # As if this were a rank of a job, which the trial must not join; the second name is Open MPI 4's.
    monkeypatch.setenv("PMIX_RANK", "0")
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1;tcp://127.0.0.1:1")
    assert gpu_aware.trial(find_mpirun()[0], "cpu") == set(gpu_aware.CALLS)


def test_a_call_that_gives_wrong_numbers_is_not_proven(monkeypatch, capsys):
    hpcllm.mpi.join()
    make = gpu_aware._make
    monkeypatch.setattr(gpu_aware, "_make", lambda call, *rest: make(call, *rest) and call != "Gather")
    monkeypatch.setattr(gpu_aware, "_RANKS", 1)
    gpu_aware.main("cpu", ["Bcast", "Gather"])
    assert capsys.readouterr().out.split() == ["hpcllm-gpu-aware", "right", "Bcast", "wrong", "Gather"]


def test_a_call_that_ends_the_trial_is_left_out_and_the_rest_is_tried_anew(monkeypatch):
    started = script(monkeypatch, "os.abort()")
    assert gpu_aware.trial("mpirun", "cuda:0") == set(gpu_aware.CALLS) - {"Bcast", "Allgather"}
    assert len(started) == 2 and started[1] == list(gpu_aware.CALLS[3:])


def test_a_call_that_does_not_end_is_left_out_too(monkeypatch):
    monkeypatch.setattr(gpu_aware, "_JOB_S", 2.0)
    script(monkeypatch, "import time; time.sleep(600)")
    assert gpu_aware.trial("mpirun", "cuda:0") == set(gpu_aware.CALLS) - {"Bcast", "Allgather"}


def test_where_no_second_job_can_be_started_nothing_is_known(no_job, monkeypatch):
    assert gpu_aware.trial("/no/such/mpirun", "cuda:0") is None
    assert gpu_aware.trial("/bin/true", "cuda:0") is None
    # An mpirun of another library: every process is alone in its world.
    monkeypatch.setattr(
        gpu_aware, "_command", lambda *_: [sys.executable, "-m", "hpcllm.mpi.gpu_aware", "cpu", "Bcast"]
    )
    assert gpu_aware.trial("mpirun", "cpu") is None


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return SimpleNamespace(library="Open MPI 5", library_path="/opt/mpi/lib/libmpi.so")


def test_one_trial_for_each_library_and_gpu(gpu, monkeypatch, tmp_path):
    tried = []
    monkeypatch.setattr(gpu_aware, "_mpirun", lambda path: path)
    monkeypatch.setattr(gpu_aware, "trial", lambda mpirun, device: tried.append(device) or {"Isend", "Bcast"})
    for _ in range(2):
        assert gpu_aware._known(gpu, torch.device("cuda", 1)) == ["Bcast", "Isend"]
    assert tried == ["cuda:1"]
    for name in ("OMPI_MCA_ess_base_jobid", "OMPI_MCA_num_procs"):  # another job, the same machine
        monkeypatch.setenv(name, "17")
    gpu_aware._known(gpu, torch.device("cuda", 1))
    assert tried == ["cuda:1"]
    gpu.library = "MPICH 5"
    gpu_aware._known(gpu, torch.device("cuda", 1))
    assert len(tried) == 2
    monkeypatch.setenv("MPICH_GPU_SUPPORT_ENABLED", "1")
    gpu_aware._known(gpu, torch.device("cuda", 1))
    assert len(tried) == 3
    (file,) = (tmp_path / "cache" / "hpcllm").iterdir()
    assert len(json.loads(file.read_text())) == 3
    file.write_text("{ not JSON")
    assert gpu_aware._known(gpu, torch.device("cuda", 1)) == ["Bcast", "Isend"]
    # What could not be tried is not kept, and may be tried by the next job.
    file.unlink()
    monkeypatch.setattr(gpu_aware, "trial", lambda *_: None)
    assert gpu_aware._known(gpu, torch.device("cuda", 1)) == [] and not file.exists()


def test_mpirun_is_the_one_beside_the_library(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib" / "libmpi.so.40").touch()
    mpirun = tmp_path / "bin" / "mpirun"
    mpirun.touch(mode=0o755)
    (tmp_path / "libmpi.so").symlink_to(tmp_path / "lib" / "libmpi.so.40")
    assert gpu_aware._mpirun(str(tmp_path / "libmpi.so")) == str(mpirun)
    monkeypatch.setenv("PATH", "/no/such/folder")
    assert gpu_aware._mpirun("/usr/lib/nowhere/libmpi.so") is None


@pytest.mark.mpi()
def test_ranks_use_what_is_proven_on_every_host(world, monkeypatch):
    here = SimpleNamespace(comm=world.comm, local_rank=0)  # every rank on a host of its own
    proven = ["Bcast", "Isend"] if world.rank == 0 else ["Bcast", "Gather"]
    monkeypatch.setattr(gpu_aware, "_known", lambda *_: proven)
    monkeypatch.delenv("HPCLLM_GPU_AWARE", raising=False)
    everywhere = gpu_aware.find(here, None)
    assert everywhere == ({"Bcast", "Isend"} if world.size == 1 else {"Bcast"})
    monkeypatch.setenv("HPCLLM_GPU_AWARE", "on")
    assert gpu_aware.find(here, None) == set(gpu_aware.CALLS)
    monkeypatch.setenv("HPCLLM_GPU_AWARE", "off")
    assert gpu_aware.find(here, None) == set()
    monkeypatch.setenv("HPCLLM_GPU_AWARE", "maybe")
    with pytest.raises(UsageError, match='HPCLLM_GPU_AWARE="maybe"'):
        gpu_aware.find(here, None)


@needs_gpu
@pytest.mark.mpi()
def test_device_memory_that_is_handed_over_gives_what_staged_memory_gives(world):
    import torch.distributed as dist

    def everything():
        mine = torch.randn(1 << 18, generator=torch.Generator().manual_seed(world.rank)).cuda()
        whole = torch.empty(world.size * len(mine), device="cuda")
        dist.all_gather_single(whole, mine)
        part = torch.empty_like(mine)
        dist.reduce_scatter_single(part, whole * (world.rank + 1))
        dist.all_reduce(mine, dist.ReduceOp.AVG)
        short = mine.bfloat16()
        dist.all_reduce(short)
        exchanged = torch.empty_like(whole)
        dist.all_to_all_single(exchanged, whole + world.rank)
        parts = [torch.empty_like(mine) for _ in range(world.size)] if world.is_root else None
        dist.gather(mine + world.rank, parts)
        scattered = torch.empty_like(mine)
        dist.scatter(scattered, parts)
        dist.broadcast(part, world.size - 1)
        around = torch.empty_like(mine)
        sent = dist.isend(mine * world.rank, (world.rank + 1) % world.size)
        dist.recv(around, (world.rank - 1) % world.size)
        sent.wait()
        return [t.cpu() for t in (whole, part, mine, short, exchanged, scattered, around)]

    device.hand_over(gpu_aware.find(world, world.device))
    handed_over = everything()
    device.hand_over(())
    assert all(map(torch.equal, handed_over, everything()))
    device.hand_over(gpu_aware.find(world, world.device))
