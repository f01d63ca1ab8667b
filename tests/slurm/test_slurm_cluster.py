"""Claims about the test cluster itself: its nodes are hosts of their own, and it leaves nothing behind."""

import shlex
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm


def traces():
    """All that a cluster could leave on the machine: links, namespaces, mounts, processes, /etc."""
    commands = (
        ["ip", "-o", "link"],
        ["ip", "-o", "addr", "show", "scope", "global"],
        ["ip", "netns", "list"],
        ["findmnt", "--noheadings", "--list", "--output", "TARGET,FSTYPE"],
        ["ls", "/run", "/dev/shm"],
    )
    found = {" ".join(c): subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands}
    for path in ("/etc/hosts", "/etc/munge/munge.key", "/etc/slurm/slurm.conf", "/etc/hostname"):
        found[path] = Path(path).read_bytes() if Path(path).exists() else None
    found["processes"] = [
        status.read_text().split("\n")[0]
        for status in Path("/proc").glob("[0-9]*/stat")
        if any(name in status.read_text() for name in ("slurm", "munged)")) and ") Z " not in status.read_text()
    ]
    return found


def test_down_leaves_the_machine_as_it_was_also_after_a_crash(cluster):
    cluster.control("down", cluster.folder)
    before = traces()
    cluster.control("up", "1", cluster.folder)
    assert traces() != before
    controller = int(Path(cluster.folder, "run/slurmctld.pid").read_text())
    subprocess.run(["kill", "-9", str(controller)], check=True)
    cluster.control("up", "2", cluster.folder)  # over the left-overs of the one that died
    assert "idle" in cluster.login("sinfo").stdout
    cluster.control("down", cluster.folder)
    assert traces() == before
    cluster.control("up", "3", cluster.folder)


def test_each_node_is_a_host_of_its_own(cluster, job_folder):
    look = shlex.quote("hostname; ip -br -4 address show dev eth0; touch /dev/shm/$(hostname); ls /dev/shm")
    script = f"srun -N1 -w n1 bash -c {look}; srun -N1 -w n2 bash -c {look}"
    shown = [line.split()[-1] for line in cluster.login(script, cwd=job_folder).stdout.splitlines()]
    assert shown == ["n1", "10.77.0.1/24", "n1", "n2", "10.77.0.2/24", "n2"]
    assert not Path("/dev/shm/n1").exists()


def test_a_cut_link_is_cut_and_heals(cluster):
    reach = "timeout 1 bash -c '</dev/tcp/n2/6818'"
    cluster.login(reach)
    cluster.control("cut", "n2")
    assert cluster.login(reach, check=False).returncode != 0
    cluster.control("heal", "n2", cluster.folder)
    cluster.login(f"for _ in 1 2 3 4 5; do {reach} && exit; sleep 0.2; done; exit 1")


def test_a_killed_node_is_dead_and_heals(cluster):
    cluster.control("kill", "n2", cluster.folder)
    assert subprocess.run(["ip", "netns", "pids", "hpcllm-n2"], capture_output=True, text=True).stdout == ""
    cluster.control("heal", "n2", cluster.folder)
    assert cluster.login("srun -N1 -w n2 hostname").stdout.split() == ["n2"]
