"""Claims about jobs under a real Slurm of two nodes: who runs where, what a failure costs, what a job ends with."""

import shlex
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")

pytestmark = pytest.mark.slurm

# A user's own batch script: the site profile and hpcllm.mpi, nothing else of hpcllm.
SCRIPT = """#!/bin/bash
#SBATCH --output=%x-%j.out --job-name=own
here=$HPCLLM_ROOT/slurm
source "$here/site.sh"
launch python own.py
exit $?
"""


@pytest.fixture
def submit_python(cluster, job_folder, module_load):
    """Submit a Python program on 2 nodes x 2 ranks through the site profile; returns the ended job and its seconds."""

    def submit(program):
        (job_folder / "own.sbatch").write_text(SCRIPT)
        (job_folder / "own.py").write_text(program)
        number = cluster.submit(*TWO_BY_TWO, "own.sbatch", cwd=job_folder, before=module_load)
        start = time.monotonic()
        return cluster.wait(number, timeout_s=60), time.monotonic() - start

    return submit


def test_three_lines_make_torch_run_on_all_ranks_of_all_nodes(submit_python):
    job, _ = submit_python(
        "import torch, torch.distributed as dist, hpcllm.mpi\n"
        "world = hpcllm.mpi.init()\n"
        "total = torch.tensor([1 << world.rank])\n"
        "dist.all_reduce(total)\n"
        "print('rank', world.rank, world.host, world.local_rank, world.local_size, total.item(), flush=True)\n"
        "if world.is_root: print(world.describe(), flush=True)\n"
    )
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job["log"]
    lines = sorted(line for line in job["log"].splitlines() if line.startswith("rank "))
    assert lines == ["rank 0 n1 0 2 15", "rank 1 n1 1 2 15", "rank 2 n2 0 2 15", "rank 3 n2 1 2 15"]
    assert "4 ranks on 2 hosts (n1, n2), started by srun, Open MPI" in job["log"]
    assert "start 1: srun --mpi=pmix" in job["log"]


def test_large_tensors_are_reduced_within_and_between_nodes(submit_python):
    job, _ = submit_python(
        "import torch, torch.distributed as dist, hpcllm.mpi\n"
        "world = hpcllm.mpi.init()\n"
        "n, ranks = (1 << 20) + 5, range(world.size)\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    draws = [torch.randn(n, generator=torch.Generator().manual_seed(r)).to(dtype) for r in ranks]\n"
        "    # Within each node in rank order, then the nodes: in float32, rounded once.\n"
        "    wide = [draw.float() for draw in draws]\n"
        "    exact = ((wide[0] + wide[1]) + (wide[2] + wide[3])).to(dtype)\n"
        "    total = draws[world.rank].clone()\n"
        "    dist.all_reduce(total)\n"
        "    assert torch.equal(total, exact)\n"
        "    part = torch.empty(n // 4, dtype=dtype)\n"
        "    dist.reduce_scatter_tensor(part, draws[world.rank][: n // 4 * 4].clone())\n"
        "    assert torch.equal(part, exact[world.rank * (n // 4) : (world.rank + 1) * (n // 4)])\n"
        "    every = torch.empty(4, n, dtype=dtype)\n"
        "    dist.all_gather_into_tensor(every.view(-1), draws[world.rank])\n"
        "    assert torch.equal(every, torch.stack(draws))\n"
        "assert world.group._shared.table == [[0, 1], [2, 3]]\n"
        "print('all right on rank', world.rank, flush=True)\n"
    )
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job["log"]
    assert job["log"].count("all right on rank") == 4


def test_the_doctor_looks_at_both_nodes(cluster, module_load, job_folder):
    (job_folder / "own.sbatch").write_text(SCRIPT.replace("python own.py", "hpcllm doctor --exclude-file bad"))
    job = cluster.wait(cluster.submit(*TWO_BY_TWO, "own.sbatch", cwd=job_folder, before=module_load), timeout_s=100)
    # Pretended nodes have pretended cores, so there may be something to find; what it finds has two hosts and a cure.
    assert (job["JobState"], job["ExitCode"]) in {("COMPLETED", "0:0"), ("FAILED", "69:0")}, job["log"]
    assert "4 ranks on 2 hosts, started by srun" in job["log"]
    assert "all_reduce is exact for" in job["log"] and "doctor: " in job["log"]
    assert set((job_folder / "bad").read_text().strip().split(",")) <= {"", "n1", "n2"}


def test_an_exception_on_one_rank_ends_the_job_with_one_traceback(submit_python):
    job, seconds = submit_python(
        "import time, hpcllm.mpi\n"
        "world = hpcllm.mpi.join()\n"
        "world.comm.Barrier()\n"
        "if world.rank == 2: raise ValueError('two is a bad number')\n"
        "world.comm.Barrier()\n"
    )
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0"), job["log"]
    assert seconds < 20
    assert job["log"].count("ValueError: two is a bad number") == 1
    assert "hpcllm: rank 2 of 4 on n2: uncaught ValueError" in job["log"]


def test_the_exit_code_of_one_rank_is_the_exit_code_of_the_job(submit_python):
    job, seconds = submit_python(
        "import sys, hpcllm.mpi\n"
        "world = hpcllm.mpi.join()\n"
        "world.comm.Barrier()\n"
        "if world.rank == 3: sys.exit(65)\n"
        "world.comm.Barrier()\n"
    )
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "65:0"), job["log"]
    assert seconds < 20


def test_an_unknown_key_fails_the_job_with_2_and_sbatch_options_win(cluster, module_load, job_folder):
    options = (*TWO_BY_TWO, "--job-name=other", "--time=7", "--output=other name.log", "--cpus-per-task=2")
    number = cluster.submit(
        *options, ROOT / "slurm/train_bert.sbatch", "train.max_step=3", cwd=job_folder, before=module_load
    )
    job = cluster.wait(number, timeout_s=60)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), job["log"]
    assert job["log"].count('unknown key "max_step" (did you mean "max_steps"?)') == 1
    assert (job["JobName"], job["TimeLimit"], job["NumNodes"], job["NumTasks"]) == ("other", "00:07:00", "2", "4")
    assert "--cpus-per-task=2" in job["log"]
    assert (job_folder / "other name.log").exists() and not (job_folder / "runs").exists()


def test_without_the_module_the_job_finds_the_repository_it_was_submitted_from(cluster, job_folder):
    for folder in (ROOT, ROOT / "slurm"):
        script = ROOT.joinpath("slurm/train_gpt.sbatch").relative_to(folder)
        number = cluster.submit(f"--output={job_folder}/%x.out", script, "run.oops=1", cwd=folder)
        job = cluster.wait(number, timeout_s=60)
        assert job["ExitCode"] == "2:0" and 'run: unknown key "oops"' in job["log"], job["log"]


def test_a_launcher_that_mpi_does_not_know_is_refused_with_the_cure(cluster, module_load, job_folder):
    site = (ROOT / "slurm/site.sh").read_text()
    assert "--mpi=pmix" in site
    (job_folder / "my site.sh").write_text(site.replace("--mpi=pmix", "--mpi=none"))
    number = cluster.submit(
        *TWO_BY_TWO,
        ROOT / "slurm/train_bert.sbatch",
        cwd=job_folder,
        before=f"{module_load}; export HPCLLM_SITE={shlex.quote(str(job_folder / 'my site.sh'))}",
    )
    job = cluster.wait(number, timeout_s=60)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), job["log"]
    assert job["log"].count("start with `srun --mpi=pmix` (Open MPI)") == 1
    assert job["RunTime"] < "00:00:20"  # 2 s on an idle machine, and not the minutes of ranks that wait for each other


def test_a_job_script_that_is_copied_away_says_what_it_misses(cluster, job_folder):
    (job_folder / "train_bert.sbatch").write_text((ROOT / "slurm/train_bert.sbatch").read_text())
    job = cluster.wait(cluster.submit("train_bert.sbatch", cwd=job_folder), timeout_s=30)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), job["log"]
    assert "site.sh: No such file or directory" in job["log"]


@pytest.mark.parametrize(("array", "folders"), [("1-3%1", {""}), ("1-3", {"/task-1", "/task-2", "/task-3"})])
def test_an_array_of_which_one_runs_at_a_time_is_a_chain(cluster, module_load, job_folder, array, folders):
    told = 'slurm_launcher=(echo)\nlaunch hpcllm train "$here/train_gpt.toml" --resume'
    (job_folder / "own.sbatch").write_text(SCRIPT.replace("launch python own.py", told).replace("%j", "%a"))
    first = cluster.submit(f"--array={array}", "own.sbatch", cwd=job_folder, before=module_load)
    deadline = time.monotonic() + 120
    while left := cluster.login(f"squeue -h -j {first} -o %T").stdout.strip():
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    lines = [(job_folder / f"own-{member}.out").read_text().splitlines()[-1] for member in (1, 2, 3)]
    assert all(line.endswith("--resume") for line in lines)
    expected = {f" run.output_dir=runs/gpt{folder} --resume" if folder else " --resume" for folder in folders}
    assert {line.partition("train_gpt.toml")[2] for line in lines} == expected


def test_a_heterogeneous_job_is_one_mpi_job_over_all_of_its_parts(cluster, module_load, job_folder):
    (job_folder / "own.sbatch").write_text(SCRIPT)
    (job_folder / "own.py").write_text(
        "import time, hpcllm.mpi\n"
        "from hpcllm import deadline\n"
        "world = hpcllm.mpi.join()\n"
        "minutes = round((deadline.end_of_job() - time.time()) / 60 + 0.3)\n"
        "print('rank', world.rank, 'of', world.size, 'on', world.host, 'has', minutes, 'minutes', flush=True)\n"
    )
    parts = ("--nodes=1", "--ntasks-per-node=1", "--time=9", ":", "--nodes=1", "--ntasks-per-node=2", "--time=3")
    number = cluster.submit(*parts, "own.sbatch", cwd=job_folder, before=module_load, HPCLLM_STEP_POLL_S="1")
    job = cluster.wait(number, timeout_s=120)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job["log"]
    lines = sorted(line for line in job["log"].splitlines() if line.startswith("rank "))
    assert lines == [f"rank {rank} of 3 on n{host} has 3 minutes" for rank, host in enumerate((1, 2, 2))]
    assert " --het-group=0-1 " in job["log"]
