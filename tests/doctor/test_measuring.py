"""What the doctor measures: over real ranks, each of which plays a host where hosts are needed, and of this machine."""

import errno
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hpcllm import utilisation
from hpcllm.doctor import cores, job, storage
from hpcllm.mpi import numa


@pytest.fixture
def links(world):
    from hpcllm.mpi import links

    return links


@pytest.fixture
def shared(world, tmp_path):
    """One folder for all ranks."""
    return Path(world.comm.bcast(str(tmp_path)))


@pytest.mark.parametrize("size", range(1, 12))
def test_in_a_tournament_every_pair_meets_once_and_nobody_plays_twice_a_round(links, size):
    met = []
    for pairs in links.rounds(size):
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players)) == size - size % 2
        met += pairs
    assert sorted(met) == [(a, b) for a in range(size) for b in range(a + 1, size)]


@pytest.mark.mpi()
def test_every_pair_of_ranks_is_measured(world, links):
    found = links.measure(world.comm)
    assert (found is not None) == world.is_root
    if world.is_root:
        size = world.size
        assert sorted((link["a"], link["b"]) for link in found) == [
            (a, b) for a in range(size) for b in range(a + 1, size)
        ]
        assert all(0 < link["latency_s"] < 1 and link["bandwidth_bytes_per_s"] > 1e5 for link in found)


@pytest.mark.mpi()
def test_no_round_is_begun_when_the_time_is_over(world, links):
    assert not links.measure(world.comm, budget_s=0.0)


@pytest.mark.mpi()
def test_the_offset_of_a_clock_is_found_within_its_error(world, links):
    ahead_s = [0.0, 3.5, -40.0, 0.0][world.rank % 4]
    found = links.clock_offsets(world.comm, lambda: time.time() + ahead_s)
    if world.is_root:
        assert len(found) == world.size
        for rank, (offset_s, error_s) in enumerate(found):
            assert abs(offset_s - [0.0, 3.5, -40.0, 0.0][rank % 4]) <= error_s + 1e-6
            assert error_s < 1


@pytest.mark.mpi()
def test_one_rank_a_host_is_picked(world, links):
    comm = links.one_per_host(replace(world, local_rank=world.rank // 2))
    if world.rank < 2:
        assert (comm.rank, comm.size) == (world.rank, min(world.size, 2))
        comm.Free()
    else:
        assert comm is None
    assert links.thread_level() in ("single", "funneled", "serialized", "multiple")


@pytest.mark.mpi()
def test_sums_of_all_dtypes_are_right_on_these_ranks(world):
    assert set(job.add_up(world).values()) == {"right"}


@pytest.mark.mpi(min_size=2)
def test_a_sum_without_one_rank_or_in_coarser_numbers_is_seen(world, monkeypatch):
    import torch.distributed as dist

    all_reduce = dist.all_reduce

    def forgetful(tensor):
        if world.rank == 1:
            tensor.zero_()
        all_reduce(tensor)

    def coarse(tensor):
        all_reduce(tensor)
        if tensor.dtype is torch.float32:
            tensor.copy_((tensor / 2).round() * 2)

    monkeypatch.setattr(dist, "all_reduce", forgetful)
    assert all("sums are wrong" in verdict for verdict in job.add_up(world).values())
    monkeypatch.setattr(dist, "all_reduce", coarse)
    found = job.add_up(world)
    assert "sums are wrong" in found.pop("float32") and set(found.values()) == {"right"}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_the_exact_sums_are_those_of_the_terms_and_survive_bfloat16(size):
    for dtype in job.dtypes():
        wide = torch.complex128 if dtype.is_complex else torch.float64
        expected = sum(job.terms(rank, size, 101, dtype).to(wide) for rank in range(size))
        assert torch.equal(job.exact_sum(size, 101, dtype), expected)
        assert torch.equal(expected.to(dtype).to(wide), expected)
        assert (expected != 0).all()


@pytest.mark.mpi()
def test_hosts_write_and_read_each_others_files_and_leave_nothing(world, shared):
    facts = storage.measure_folder(world.comm, str(shared))
    assert {"write_bytes_per_s", "read_bytes_per_s", "lock_s"} == set(facts)
    world.comm.Barrier()
    assert list(shared.iterdir()) == []


@pytest.mark.mpi(min_size=2)
def test_a_host_that_reads_other_bytes_than_were_written_is_found(world, shared, monkeypatch):
    write = storage._write
    monkeypatch.setattr(storage, "_write", lambda path, rank: write(path, rank + (rank == 1)))
    facts = storage.measure_folder(world.comm, str(shared))
    assert ("read_error" in facts) == (world.rank == 0)  # rank 0 reads the file of rank 1
    if world.rank == 0:
        assert "differs from what was written in MiB 0" in facts["read_error"]


def test_a_folder_that_cannot_be_written_to_is_a_fact_and_no_traceback(world):
    assert storage.measure_folder(world.comm, "/proc") == {"error": os.strerror(errno.ENOENT)}


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=50", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield str(disk)
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_a_fact(world, small_disk):
    facts = storage.measure_folder(world.comm, small_disk)
    assert facts == {"write_error": os.strerror(errno.ENOSPC)}
    space = storage.space(small_disk)
    assert (space["bytes"], space["inodes"]) == (8 << 20, 50)
    assert space["free_bytes"] == 8 << 20 and 0 < space["free_inodes"] < 50
    assert storage.mount_of(os.path.join(small_disk, "x")) == ("none", "tmpfs")
    assert storage.look({}, shm=small_disk)["shm"]["free_bytes"] == 8 << 20
    assert storage.look({}, shm="/nowhere")["shm"] is None


# A kernel that knows no flock, as file systems without locks answer: a seccomp filter of this process alone.
WITHOUT_LOCKS = """
import ctypes, errno, struct, sys
number, folder = int(sys.argv[1]), sys.argv[2]
load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
program = struct.pack("HBBI" * 4, load, 0, 0, 0, equal, 0, 1, number, give, 0, 0, 0x50000 | errno.ENOLCK,
                      give, 0, 0, 0x7FFF0000)
buffer = ctypes.create_string_buffer(program)
rules = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer)))
libc = ctypes.CDLL(None)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, rules, 0, 0):
    sys.exit(77)
import hpcllm.mpi
from hpcllm.doctor import storage
print(storage.measure_folder(hpcllm.mpi.join().comm, folder))
"""


def test_a_file_system_without_locks_is_a_fact(tmp_path):
    number = {"x86_64": 73, "aarch64": 32}.get(platform.machine())
    env = {name: value for name, value in os.environ.items() if name != "HDF5_USE_FILE_LOCKING"}
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(number), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60) if number else None
    if done is None or done.returncode == 77:
        pytest.skip("system calls cannot be filtered here")
    assert "'lock_error': " in done.stdout and "lock file" in done.stdout, done.stdout + done.stderr


QUOTA = """Disk quotas for user alice (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
{device} 104824*  100000  110000 1700000000       5       0    1000       0
server:/export/other    7       0       0       0       1       0       0       0
"""
LUSTRE = """Disk quotas for usr alice (uid 1000):
      Filesystem  kbytes   quota   limit   grace   files   quota   limit   grace
/scratch/with/a/long/name
                 [2048]       0    4096       -      77*     70      80    6d23h
"""


def test_quotas_of_both_tools_are_read():
    rows = storage.parse_quota(QUOTA.format(device="/dev/sda1"))
    assert [row["device"] for row in rows] == ["/dev/sda1", "server:/export/other"]
    assert rows[0] | {"device": ""} == {
        "device": "",
        "used_bytes": 104824 << 10,
        "limit_bytes": 100000 << 10,
        "files": 5,
        "file_limit": 1000,
    }
    (row,) = storage.parse_quota(LUSTRE)
    assert (row["used_bytes"], row["limit_bytes"], row["files"], row["file_limit"]) == (2 << 20, 4 << 20, 77, 70)
    assert storage.parse_quota("Disk quotas for user root (uid 0): none\n") == []


def test_a_quota_is_asked_for_this_file_system_alone_and_not_for_ever(tmp_path, monkeypatch):
    device, _ = storage.mount_of(tmp_path)
    tool = tmp_path / "quota"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{QUOTA.format(device=device)}END\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    # Names of devices that quota(1) cannot have ("none", "overlay") have no quota either.
    rows = storage.quota(str(tmp_path))
    assert [row["used_bytes"] for row in rows] == ([104824 << 10] if device.startswith("/") else [])
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(storage, "_QUOTA_S", 0.2)
    assert storage.quota(str(tmp_path)) == []
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert storage.quota(str(tmp_path)) == []


def test_cores_and_gpus_are_placed_as_sysfs_says(world, tmp_path, monkeypatch):
    def put(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    put("devices/system/node/node0/cpulist", "0-1,4\n")
    put("devices/system/node/node1/cpulist", "2-3\n")
    for core, siblings in ((2, "2,6"), (3, "3,7"), (6, "2,6")):
        put(f"devices/system/cpu/cpu{core}/topology/thread_siblings_list", f"{siblings}\n")
    put("bus/pci/devices/0000:c1:00.0/numa_node", "1\n")
    put("bus/pci/devices/0000:c2:00.0/numa_node", "-1\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 6})
    found = cores.look(world, sys=tmp_path)
    assert (found["cores"], found["physical_cores"], found["numa_nodes"]) == ([2, 3, 6], [2, 3], [1])
    assert numa.nodes(tmp_path) == {0: 0, 1: 0, 4: 0, 2: 1, 3: 1}
    assert [cores._numa_of_device(tmp_path, f"0000:c{n}:00.0") for n in (1, 2, 3)] == [1, None, None]
    assert cores.node_name("n1.site.org", {"SLURMD_NODENAME": "n1"}) == "n1"
    assert cores.node_name("n1.site.org", {}) == "n1.site.org"


def test_the_gpu_of_a_rank_is_the_one_that_training_would_use(world, tmp_path, monkeypatch):
    node = tmp_path / "bus/pci/devices/0000:c1:00.0/numa_node"
    node.parent.mkdir(parents=True)
    node.write_text("1\n")
    gpus = [
        SimpleNamespace(name="H100", uuid="a", pci_domain_id=0, pci_bus_id=0x41, pci_device_id=0),
        SimpleNamespace(name="H100", uuid="b", pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0),
        SimpleNamespace(name="H100", uuid="c"),  # torch before it told addresses
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    found = [cores.look(replace(world, local_rank=rank), sys=tmp_path)["gpu"] for rank in range(4)]
    assert [gpu["uuid"] for gpu in found] == ["a", "b", "c", "a"]
    assert found[1] == {
        "device": "cuda:1",
        "index": 1,
        "of": 3,
        "name": "H100",
        "uuid": "b",
        "pci": "0000:c1:00.0",
        "numa_node": 1,
    }
    assert (found[0]["numa_node"], found[2]["pci"], found[2]["numa_node"]) == (None, None, None)


def test_a_matrix_product_is_timed_and_counted(monkeypatch):
    monkeypatch.setattr(utilisation, "_AT_MOST_S", 0.01)
    cpu = torch.device("cpu")
    assert all(utilisation.products(cpu, kind, 1) > 1e6 for kind in ("fp32", "bf16"))
    monkeypatch.setattr(utilisation, "multiply", lambda a, b: 1e-3 if a.shape == (512, 512) else 1e-6)
    assert utilisation.products(cpu, "fp32", 1) == pytest.approx(2 * 512**3 / 1e-3)


def test_the_environment_is_that_of_the_start(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "set later")
    assert storage.launched_with().get("HF_HUB_OFFLINE") != "set later"
    assert storage.look({"HF_HOME": "/a", "XDG_CACHE_HOME": "/b"})["hf_home"] == "/a"
    assert storage.look({"XDG_CACHE_HOME": "/b"})["hf_home"] == "/b/huggingface"


def test_a_cache_that_does_not_exist_is_writable_where_the_folder_above_it_is(tmp_path):
    facts = storage.look({"HF_HOME": str(tmp_path / "not" / "yet")})
    assert (facts["hf_home_exists"], facts["hf_home_writable"]) == (False, True)
    if os.geteuid() != 0:  # root may write anywhere
        tmp_path.chmod(0o500)
        assert not storage.look({"HF_HOME": str(tmp_path / "not" / "yet")})["hf_home_writable"]
