"""A Slurm cluster on this machine for the tests beside this file; `tests/slurm/run.sh` provides what they need."""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = Path(__file__).parent / "cluster.sh"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def why_not():
    """The reason why no cluster can be started here, or None."""
    if os.environ.get("HPCLLM_TEST_SLURM") != "1":
        return "tests/slurm/run.sh (make test-slurm) starts these tests"
    if os.geteuid() != 0:
        return "needs root: each node of the test cluster is a network namespace"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "ip", "nsenter") if not shutil.which(name)]
    return f"not installed: {', '.join(missing)}" if missing else None


def pytest_collection_modifyitems(items):
    reason = why_not()
    for item in items:
        if reason and item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=reason))


def user_environment(**extra):
    """What a user has after logging in: no virtual environment, no MPI, no job."""
    home, path = os.environ.get("HOME", "/root"), "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    # The nodes of the cluster share the cores of one machine: who waits makes room.
    return {"HOME": home, "PATH": path, "OMPI_MCA_mpi_yield_when_idle": "1", **extra}


class Cluster:
    """A running cluster whose configuration, state and logs lie in `folder`."""

    def __init__(self, folder):
        self.folder = folder

    def control(self, verb, *arguments):
        """Run `cluster.sh verb arguments`; returns what it printed."""
        done = subprocess.run([CLUSTER, verb, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"cluster.sh {verb}: {done.stdout}{done.stderr}"
        return done.stdout

    def login(self, script, cwd=ROOT, check=True, **env):
        """Run a bash script on the login node, in the environment of a user who has just logged in."""
        done = subprocess.run(
            [CLUSTER, "login", self.folder, "bash", "-c", script],
            capture_output=True,
            text=True,
            timeout=100,
            cwd=cwd,
            env=user_environment(**env),
            stdin=subprocess.DEVNULL,
        )
        if check:
            assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done

    def submit(self, *arguments, cwd, before="", **env):
        """`sbatch arguments` from the folder `cwd`, after the shell commands `before`; returns the job's number."""
        command = shlex.join(["sbatch", "--parsable", *map(str, arguments)])
        return self.login(f"{before}\n{command}", cwd=cwd, **env).stdout.split()[-1]

    def job(self, number):
        """JobState, ExitCode, Restarts, ... of a job as `scontrol` shows them (without sacct), and its log."""
        shown = self.login(f"scontrol -o show job {number}").stdout
        fields = dict(re.findall(r"(\w+)=(\S*)", shown))
        log = Path(re.search(r"StdOut=(.*?) Power=", shown)[1])
        fields["log"] = log.read_text() if log.exists() else ""
        return fields

    def wait(self, number, timeout_s=120, until=ENDED):
        """Wait until the job's state is one of `until`; returns `job(number)`."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] not in until:
            if time.monotonic() > deadline:
                self.login(f"scancel {number}")
                pytest.fail(f"job {number} is {job['JobState']} after {timeout_s} s\n{job['log']}")
            time.sleep(0.3)
        return job


@pytest.fixture(scope="session")
def short_folder():
    """A new folder with a short name: the names of sockets in it may not grow beyond 107 characters."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture(scope="module")
def cluster(short_folder):
    """A cluster of three nodes, n1 to n3, for one file of tests; a job of two gets n1 and n2 while they live."""
    cluster = Cluster(short_folder)
    cluster.control("up", "3", short_folder)
    yield cluster
    cluster.control("down", short_folder)


@pytest.fixture
def job_folder(tmp_path):
    """A folder to submit jobs from, with blanks in its name."""
    folder = tmp_path / "my jobs"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def module_load():
    """Shell commands with which a user of a centre starts: `module load hpcllm`."""
    init = f"{os.environ['HPCLLM_MODULE_TOOLS']}/environment-modules/usr/share/modules/init/bash"
    return f"source {shlex.quote(init)}; module use {shlex.quote(str(ROOT / 'modules'))}; module load hpcllm"
