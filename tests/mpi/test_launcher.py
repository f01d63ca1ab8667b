"""Which launcher started us, read from its variables; and what importing hpcllm.mpi does not load."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

from hpcllm.mpi import launcher
from hpcllm.mpi import world as worlds

SLURM = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "name", "size"),
    [
        ({}, None, 1),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "Open MPI's mpirun", 4),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "mpiexec (PMI)", 4),
        ({"PMI_SIZE": "4", "PMI_RANK": "1", "PALS_RANKID": "1"}, "PALS mpiexec", 4),
        ({"PMI_SIZE": "4", "PMI_RANK": "1", "FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "1"}, "flux run", 4),
        ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"}, "MVAPICH's mpirun", 2),
        ({"JSM_NAMESPACE_SIZE": "6", "JSM_NAMESPACE_RANK": "5"}, "jsrun", 6),
        (SLURM, "srun", 8),
        # srun --mpi=pmi2 sets PMI's names too; Hydra inside an allocation says more.
        ({**SLURM, "PMI_SIZE": "8", "PMI_RANK": "3"}, "srun", 8),
        ({**SLURM, "PMI_SIZE": "8", "PMI_RANK": "3", "MPI_LOCALRANKID": "1"}, "mpiexec (PMI)", 8),
        ({**SLURM, "PMI_SIZE": "16", "PMI_RANK": "3"}, "mpiexec (PMI)", 16),
        # mpirun inside a job step, and a batch script that srun did not start.
        ({**SLURM, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "Open MPI's mpirun", 2),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, None, 1),
        ({"OMPI_COMM_WORLD_SIZE": "not a number", "OMPI_COMM_WORLD_RANK": "1"}, None, 1),
    ],
)
def test_launchers_are_told_apart(environment, name, size):
    found, processes = launcher.find(environment)
    assert (found.name if found else None, processes) == (name, size)


def test_one_process_speaks():
    ranks = [{"PMI_SIZE": "4", "PMI_RANK": str(rank)} for rank in range(4)]
    assert [launcher.speaks(environment) for environment in ranks] == [True, False, False, False]
    assert launcher.speaks({})


def test_lone_worlds_are_told_with_the_cure_of_their_launcher():
    srun, _ = launcher.find(SLURM)
    sentence = launcher.lone_world(srun, 8, 1, "Open MPI v5", "/lib/libmpi.so.40")
    assert "srun started 8 processes (SLURM_STEP_NUM_TASKS=8), but MPI sees a world of 1" in sentence
    assert "srun --mpi=pmix" in sentence
    assert "Open MPI v5 (/lib/libmpi.so.40)" in sentence
    assert launcher.lone_world(srun, 8, 8, "", "") is None
    assert launcher.lone_world(None, 1, 1, "", "") is None


def test_components_of_a_heterogeneous_slurm_job_share_one_world(monkeypatch):
    srun, _ = launcher.find(SLURM)
    monkeypatch.setenv("SLURM_HET_SIZE", "2")
    assert launcher.lone_world(srun, 8, 12, "", "") is None
    assert launcher.lone_world(srun, 8, 1, "", "") is not None


def test_only_a_library_without_pmix_is_foreign_to_open_mpis_mpirun():
    mpirun, mpiexec = launcher.MPI_LAUNCHERS[0], launcher.PMI
    plain = "MPICH Version:      5.0.2\nMPICH configure:    --with-pm=hydra"
    assert "MPICH Version: 5.0.2 (libmpi.so)" in launcher.foreign(mpirun, 4, plain, "libmpi.so")
    assert launcher.foreign(mpirun, 4, plain + " --with-pmix=/usr", "") is None
    assert launcher.foreign(mpirun, 4, "Open MPI v5.0.11", "") is None
    assert launcher.foreign(mpiexec, 4, plain, "") is None


def modules_after(code):
    program = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()


def test_importing_starts_neither_mpi_nor_torch_and_joining_needs_no_torch():
    imported = modules_after("import hpcllm.mpi")
    assert not {"mpi4py", "torch", "numpy"} & set(imported)
    joined = modules_after("import hpcllm.mpi; hpcllm.mpi.join()")
    assert "mpi4py.MPI" in joined
    assert "torch" not in joined


def test_mpi4py_is_imported_in_this_package_alone():
    from pathlib import Path

    import hpcllm

    package = Path(hpcllm.__file__).parent
    importers = {
        str(path.relative_to(package).parent)
        for path in package.rglob("*.py")
        if any(line.strip().startswith(("import mpi4py", "from mpi4py")) for line in path.read_text().splitlines())
    }
    assert importers == {"mpi"}


@pytest.mark.parametrize(
    ("library", "said", "expected"),
    [
        (f"{os.path.realpath(sys.prefix)}/lib/libmpi.so.40", None, "^ofi"),
        (f"{os.path.realpath(sys.prefix)}/lib/libmpi.so.40", "self,sm", "self,sm"),
        ("/opt/openmpi/lib/libmpi.so.40", None, None),
    ],
)
def test_only_an_open_mpi_of_this_environment_is_told_to_look_for_no_fabric(monkeypatch, library, said, expected):
    monkeypatch.setenv("OMPI_MCA_btl", "")  # so that it is put back
    monkeypatch.delenv("OMPI_MCA_btl")
    if said:
        monkeypatch.setenv("OMPI_MCA_btl", said)
    library_of_mpi = SimpleNamespace(Is_initialized=lambda: False, Init_thread=lambda level: None, THREAD_MULTIPLE=3)
    with warnings.catch_warnings():
        worlds._start(library_of_mpi, library)
    assert dict(os.environ).get("OMPI_MCA_btl") == expected
