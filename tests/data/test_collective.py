"""Collective reading through a parallel HDF5 gives what mapping gives, at any number of ranks.

Runs in .venv-mpio, which tests/data/parallel_h5py.sh builds, under the mpirun of the MPI that HDF5 was built with.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from small_inputs import write_shards

from hpcllm.data import shards

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-mpio" / "bin" / "python"
MPIRUN = shutil.which("mpirun.openmpi")

pytestmark = pytest.mark.skipif(
    not PYTHON.exists() or MPIRUN is None,
    reason="no .venv-mpio or no mpirun.openmpi: tests/data/parallel_h5py.sh builds the parallel h5py",
)

# Run in every rank: argv is the folder. Ranks ask for different numbers of samples, some for none.
READ = """
import sys
import numpy as np
import hpcllm.mpi
from hpcllm.data import shards
from hpcllm.errors import DataError

folder, damaged = sys.argv[1:]
comm = hpcllm.mpi.join().comm
mapped = shards.open_folder(folder, comm=comm)
together = shards.open_folder(folder, reader="mpio", comm=comm)
assert type(together).__name__ == "CollectiveStream" and together.digest == mapped.digest
rng = np.random.default_rng(comm.rank)
for turn, length in enumerate((1, 100, 1024, 3000, 600_000)):
    for rows in (4, 0, comm.rank, (turn + comm.rank) % 3):
        starts = rng.integers(0, mapped.token_count - length + 1, rows)
        starts[:1] = max(0, 700_003 - length)  # across two borders, where the sample is long enough
        got = together.gather(starts, length)
        assert got.dtype == np.int64 and np.array_equal(got, mapped.gather(starts, length)), (turn, rows)
assert together.gather([], 7).shape == (0, 7)
together.close()

broken = shards.open_folder(damaged, reader="mpio", comm=comm)
try:
    broken.gather([0] if comm.rank == comm.size - 1 else [], 10)
    raise SystemExit("the damage was not seen")
except DataError as refusal:  # found by one rank, told to all
    assert "block 0 of its tokens" in str(refusal) and refusal.agreed
broken.close()
alike = comm.allreduce(1)
if comm.rank == 0:
    print("same on", alike)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("collective")
    parts = [[range(1000)] * 700, [[7, 8, 9, 10, 3]], [[5] * 1500, range(500)]]
    whole = write_shards(base / "whole", parts)
    damaged = write_shards(base / "damaged", [[[1, 2, 3] * 100]])
    with open(damaged / "shard-00000.h5", "r+b") as file:
        file.seek(shards.read_manifest(damaged)["shards"][0]["tokens_offset"])
        file.write(b"\xff")
    return whole, damaged


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_collective_reading_equals_mapping(folders, ranks):
    left_by_mpi = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "SLURM_", "MPI4PY_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(left_by_mpi)}
    if os.geteuid() == 0:
        env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    env["PATH"] = os.path.dirname(MPIRUN) + ":" + env["PATH"]
    command = [MPIRUN, "-np", str(ranks), "--oversubscribe", "--bind-to", "none", PYTHON, "-c", READ, *folders]
    job = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=100,
        env=env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout == f"same on {ranks}\n"


def test_the_parallel_h5py_is_built_once():
    built = subprocess.run(
        ["bash", ROOT / "tests/data/parallel_h5py.sh"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "is built already" in built.stdout
