"""What facts mean: every finding of the doctor is provoked by facts that show it, and by no others."""

import pytest

from hpcllm.doctor import cores, finding, job, judge_storage, plot, speed
from hpcllm.errors import UsageError
from hpcllm.mpi import gpu_aware

GB = 10**9


def rank(number, host="n0", own=None, **other):
    """A healthy rank with a core and a GPU-less host of 8 cores."""
    own = [number] if own is None else own
    return {
        "rank": number,
        "host": host,
        "cores": own,
        "physical_cores": own,
        "numa_nodes": [0],
        "host_cores": 8,
        "threads": 1,
        "gpu": None,
        "gpu_devices": [],
        "gpu_calls": [],
        "library": "Open MPI v5",
        "library_path": "/opt/mpi/libmpi.so.40",
        "thread_level": "multiple",
        "software": {"python": "3.11", "torch": "2.13"},
        "flops": {"fp32": 100e9, "bf16": 200e9},
        **other,
    }


def with_gpu(number, host="n0", uuid=None, numa=0, name="H100", **other):
    gpu = {"index": 0, "of": 1, "name": name, "uuid": uuid or f"GPU-{number}", "pci": "0000:c1:00.0", "numa_node": numa}
    return rank(number, host, gpu=gpu, **other)


def host(name="n0", folder=None, **other):
    shm = {"bytes": 64 * GB, "free_bytes": 60 * GB, "inodes": None, "free_inodes": None}
    read = {"write_bytes_per_s": 1e9, "read_bytes_per_s": 2e9, "lock_s": 0.01}
    return {
        "host": name,
        "shm": shm,
        "hf_home": "/home/a/.cache/huggingface",
        "hf_home_exists": True,
        "hf_home_writable": True,
        "offline": {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "True"},
        "hdf5_locking": None,
        "folder": read if folder is None else folder,
        **other,
    }


def links(count, slow=(), bandwidth=10e9, latency=2e-6):
    """All pairs of `count` places; those in `slow` (pairs or single places) at a tenth of the bandwidth."""
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    return [
        {
            "a": a,
            "b": b,
            "latency_s": latency,
            "bandwidth_bytes_per_s": bandwidth / (10 if (a, b) in slow or {a, b} & set(slow) else 1),
        }
        for a, b in pairs
    ]


def only(findings, level, subject, *words, hosts=()):
    """There is one finding, and it is this one, with a cure unless it is ok."""
    (found,) = findings
    assert (found.level, found.subject) == (level, subject), found
    for word in words:
        assert word in found.sentence, found.sentence
    assert bool(found.cure) == (level != "ok")
    assert found.hosts == tuple(hosts)


def test_healthy_facts_make_no_warning():
    ranks = [rank(0), rank(1), rank(2, "n1", own=[0]), rank(3, "n1", own=[1])]
    hosts = [host("n0"), host("n1")]
    space = {"bytes": 1000 * GB, "free_bytes": 500 * GB, "inodes": 10**9, "free_inodes": 10**8}
    found = [
        *job.judge("srun", ["n0", "n1"], ranks, prefix="/venv"),
        *job.judge_sums([{"float32": "right"}] * 4),
        *cores.judge(ranks),
        *speed.judge_products(ranks, cores.crowded(ranks)),
        *speed.judge_links(["n0", "n1"], links(2), True),
        *speed.judge_clocks(["n0", "n1"], [(0.0, 0.0), (1e-5, 2e-5)]),
        *judge_storage.judge("/scratch", space, [], hosts),
    ]
    assert {each.level for each in found} == {"ok"}
    assert len(found) == len({each.subject for each in found}) == 15
    assert "4 ranks on 2 hosts, started by srun, Open MPI v5 (/opt/mpi/libmpi.so.40)" in found[0].sentence
    assert finding.excluded(found) == ""


# ---- job


def test_ranks_with_another_libmpi_or_software_are_named():
    ranks = [rank(0), rank(1, library_path="/usr/lib/libmpi.so.12"), rank(2)]
    found = job.judge("srun", ["n0"], ranks, prefix="/venv")
    only(found[:1], "failure", "mpi", "/opt/mpi/libmpi.so.40 on ranks 0, 2; /usr/lib/libmpi.so.12 on rank 1")
    ranks = [rank(0), rank(1, software={"python": "3.12", "torch": "2.13"})]
    only(job.judge("srun", ["n0"], ranks, "/venv")[-1:], "failure", "software", "3.11 on rank 0; 3.12 on rank 1")


def test_an_mpi_from_pypi_is_for_one_host():
    ranks = [rank(0, library_path="/venv/lib/libmpi.so.40"), rank(1, "n1", library_path="/venv/lib/libmpi.so.40")]
    only(job.judge("mpirun", ["n0", "n1"], ranks, "/venv")[:1], "warning", "mpi", "a library from PyPI")
    only(job.judge("mpirun", ["n0"], ranks, "/venv")[:1], "ok", "mpi", "2 ranks on 1 host")


def test_one_process_and_missing_thread_support_are_told():
    found = job.judge("hand", ["n0"], [rank(0, thread_level="serialized")], "/venv")
    only(found[:1], "warning", "mpi", "one process, so nothing between ranks was tested")
    only(found[1:2], "warning", "threads", "MPI_THREAD_SERIALIZED to rank 0")


def test_wrong_and_refused_sums_are_told_by_dtype():
    right = {"float32": "right", "bfloat16": "right"}
    only(job.judge_sums([right, right]), "ok", "sums", "float32, bfloat16")
    wrong = right | {"bfloat16": "1 of 5 sums are wrong on rank 1: element 0 is 1.3e38, not 2.0"}
    only(job.judge_sums([right, wrong]), "failure", "sums", "bfloat16 adds up wrongly: 1 of 5", "not 2.0")
    refused = right | {"bfloat16": "refused: cast it first"}
    only(job.judge_sums([refused, refused]), "warning", "sums", "bfloat16 is refused")


# ---- cores and GPUs


def test_ranks_bound_to_too_few_cores_are_a_failure_and_too_many_ranks_a_warning():
    ranks = [rank(0, own=[3]), rank(1, own=[3]), rank(2), rank(3, "n1", own=[3])]
    words = "two workers on one core on n0: ranks 0-1 on n0 have core 3 between them, although the host has 8 cores"
    only(cores.judge_cores(ranks), "failure", "cores", words)
    assert cores.crowded(ranks) == {0, 1}
    # Three ranks in a net of two cores, none of which is theirs alone.
    ranks = [rank(0, own=[1, 2]), rank(1, own=[1, 2]), rank(2, own=[1, 2]), rank(3, own=[1, 2, 3, 4])]
    only(cores.judge_cores(ranks), "failure", "cores", "ranks 0-2 on n0 have cores 1-2")
    everything = list(range(8))
    ranks = [rank(number, own=everything) for number in range(9)]
    only(cores.judge_cores(ranks), "warning", "cores", "more ranks than cores on n0")
    only(cores.judge_cores(ranks[:8]), "ok", "cores")


def test_two_hardware_threads_of_one_core_are_not_two_cores():
    ranks = [rank(0, own=[0], physical_cores=[0]), rank(1, own=[4], physical_cores=[0])]
    only(cores.judge_cores(ranks), "warning", "cores", "ranks share physical cores on n0: ranks 0-1")


def test_loose_ranks_and_too_many_threads_are_told():
    ranks = [rank(0, own=[0, 1], numa_nodes=[0, 1]), rank(1, own=[0, 1], numa_nodes=[0, 1])]
    only(cores.judge_cores(ranks), "warning", "cores", "may wander between NUMA nodes on n0, such as ranks 0-1")
    only(cores.judge_cores([rank(0, numa_nodes=[0, 1])]), "ok", "cores")  # one rank that owns its host
    ranks = [rank(0), rank(1, threads=8)]
    only(cores.judge_cores(ranks), "warning", "cores", "rank 1 run more threads than they have cores: rank 1 8 on 1")


def test_ranks_that_share_a_gpu_or_have_none_are_a_failure():
    only(cores.judge_gpus([rank(0), rank(1)]), "ok", "gpu", "no rank sees a GPU")
    only(cores.judge_gpus([with_gpu(0), with_gpu(1)]), "ok", "gpu", "a GPU of its own (H100)")
    shared = [with_gpu(0, uuid="GPU-a"), with_gpu(1, uuid="GPU-a"), with_gpu(2, "n1", uuid="GPU-a")]
    only(cores.judge_gpus(shared), "failure", "gpu", "ranks share a GPU on n0: ranks 0-1 on n0 have GPU-a")
    only(cores.judge_gpus(shared, sharing_allowed=True), "warning", "gpu", "ranks 0-1")
    some = [with_gpu(0), rank(1, "n1")]
    only(cores.judge_gpus(some), "failure", "gpu", "1 of 2 ranks see no GPU", "rank 1 on n1", hosts=["n1"])
    unseen = [rank(0, gpu_devices=["/dev/nvidia0"]), rank(1)]
    only(cores.judge_gpus(unseen), "warning", "gpu", "torch sees no GPU although there is /dev/nvidia0 on n0")


def test_mpi_that_takes_gpu_memory_or_not_is_told():
    assert cores.judge_awareness([rank(0)]) == []
    only(
        cores.judge_awareness([with_gpu(0), with_gpu(1)]),
        "warning",
        "gpu",
        "no MPI call was seen",
        "pinned host memory",
    )
    some = [with_gpu(0, gpu_calls=["Bcast", "Isend"]), with_gpu(1, gpu_calls=["Bcast"])]
    only(cores.judge_awareness(some), "ok", "gpu", "takes GPU memory in Bcast;")
    every = [with_gpu(0, gpu_calls=gpu_aware.CALLS), rank(1)]
    only(cores.judge_awareness(every), "ok", "gpu", "Isend, Scatter")


def test_a_gpu_far_from_its_cores_and_gpus_of_two_kinds_are_told():
    far = [with_gpu(0), with_gpu(1, numa=1)]
    words = (
        "rank 1 have a GPU far from their cores: rank 1 on n0 runs on NUMA node 0, its GPU 0000:c1:00.0 is at node 1"
    )
    only(cores.judge_gpus(far), "warning", "gpu", words)
    only(cores.judge_gpus([with_gpu(0), with_gpu(1, numa=None)]), "ok", "gpu")
    only(cores.judge_gpus([with_gpu(0), with_gpu(1, name="A100")]), "warning", "gpu", "different GPUs: A100, H100")


# ---- speed


def test_a_slow_host_is_found_by_comparison():
    ranks = [rank(number, f"n{number // 2}") for number in range(6)]
    only(speed.judge_products(ranks, set()), "ok", "speed", "fp32 100 GFLOP/s, bf16 200 GFLOP/s")
    ranks[2]["flops"] = {"fp32": 74e9, "bf16": 200e9}
    words = "n1 is slow: fp32 matrix products of rank 2 at 74 GFLOP/s, 74% of the median 100 GFLOP/s"
    only(speed.judge_products(ranks, set()), "failure", "speed", words, hosts=["n1"])
    ranks[2]["flops"] = {"fp32": 76e9, "bf16": 200e9}
    only(speed.judge_products(ranks, set()), "ok", "speed")


def test_ranks_that_take_turns_and_lone_ranks_are_not_compared():
    ranks = [rank(0), rank(1, flops={"fp32": 1e9, "bf16": 1e9})]
    only(speed.judge_products(ranks, {0, 1}), "ok", "speed", "ranks that take turns on a core")
    only(speed.judge_products(ranks[:1], set()), "ok", "speed", "one rank, which cannot be compared")


def test_a_cpu_without_bf16_is_told():
    found = speed.judge_products([rank(0, flops={"fp32": 100e9, "bf16": 2e9})], set())
    only(found[:1], "warning", "speed", "bf16 matrix products are 50 times slower than fp32")


def test_slow_links_are_told_by_host_or_by_pair():
    names = [f"n{number}" for number in range(5)]
    only(
        speed.judge_links(names, links(5), True),
        "ok",
        "links",
        "10 of 10 pairs of hosts: latency 2 us, bandwidth 10.0 GB/s",
    )
    only(speed.judge_links(names, links(5, slow=[2]), True), "failure", "links", "links of n2 are slow", hosts=["n2"])
    words = "1 of 10 links are slow, worst n1 to n3 at 1.0 GB/s"
    only(speed.judge_links(names, links(5, slow=[(1, 3)]), True), "warning", "links", words)
    only(speed.judge_links(names, links(5, bandwidth=1e8), True), "warning", "links", "MPI is not on a fast network")
    only(speed.judge_links(names, links(5, latency=1e-3), True), "warning", "links", "latency 1 ms")
    # Within a host there is no network to judge, and one process has no links.
    only(speed.judge_links(names, links(5, slow=[2]), False), "ok", "links", "pairs of ranks")
    assert speed.judge_links(["n0"], [], True) == []


def test_clocks_count_as_different_only_beyond_the_error_and_the_middle_one_is_believed():
    names = ["n0", "n1", "n2"]

    def judge(*offsets):
        return speed.judge_clocks(names[: len(offsets)], list(offsets))

    only(judge((0.0, 0.0), (0.3, 0.01), (0.0, 0.01)), "warning", "clocks", "n1 is 300 ms ahead of n2", hosts=["n1"])
    only(judge((0.0, 0.0), (-60.0, 0.1), (1e-3, 0.1)), "failure", "clocks", "n1 is 60 s behind n0", hosts=["n1"])
    only(judge((0.0, 0.0), (60.0, 0.1), (60.1, 0.1)), "failure", "clocks", "n0 is 60 s behind n1", hosts=["n0"])
    only(judge((0.0, 0.0), (60.0, 0.1)), "failure", "clocks", "n1 is 60 s ahead of n0")
    only(judge((0.0, 0.0), (0.3, 0.29)), "ok", "clocks", "2 hosts agree within 590 ms")
    assert judge((0.0, 0.0)) == []


# ---- storage


def judge_folder(*hosts):
    return judge_storage.judge_folder("/scratch", list(hosts))


def test_folders_that_cannot_be_used_are_failures():
    only(judge_folder(host(folder={"error": "Read-only file system"})), "failure", "folder", "Read-only file system")
    found = judge_folder(host(), host("n1", folder={"missing": "No such file"}))
    only(found[:1], "failure", "folder", "/scratch is not the same folder everywhere", "on n1", hosts=["n1"])
    full = {"write_error": "No space left on device"}
    only(judge_folder(host(folder=full)), "failure", "folder", "writing in /scratch failed on n0: No space left")
    only(judge_folder(host(), host("n1", folder=full))[:1], "failure", "folder", hosts=["n1"])
    lost = host()["folder"] | {"read_error": "what was read differs"}
    lost.pop("read_bytes_per_s")
    only(judge_folder(host(folder=lost))[:1], "failure", "folder", "reading back what another host wrote", "differs")


def test_slow_reading_is_told_by_comparison_and_where_all_are_slow():
    reading = [host(f"n{number}", {**host()["folder"], "read_bytes_per_s": 1e9}) for number in range(3)]
    only(judge_folder(*reading)[:1], "ok", "reading", "1.0 GB/s reading")
    reading[1]["folder"]["read_bytes_per_s"] = 0.7e9
    only(judge_folder(*reading)[:1], "warning", "reading", "slower than elsewhere on n1", "70% of the median", hosts=[])
    crawling = host(folder={**host()["folder"], "read_bytes_per_s": 10e6})
    only(judge_folder(crawling)[:1], "warning", "reading", "10.0 MB/s reading", "which is slow")


def test_missing_and_slow_locks_are_told():
    only(judge_folder(host())[1:], "ok", "locks", "HDF5 locks files in /scratch")
    only(judge_folder(host(hdf5_locking="FALSE"))[1:], "ok", "locks", "HDF5_USE_FILE_LOCKING=FALSE keeps")
    none = host(folder=host()["folder"] | {"lock_error": "No locks available"})
    only(judge_folder(none)[1:], "warning", "locks", "cannot lock files in /scratch on n0: No locks available")
    slow = host(folder=host()["folder"] | {"lock_s": 3.0})
    only(judge_folder(slow)[1:], "warning", "locks", "HDF5 takes 3 s")


@pytest.mark.parametrize(
    ("free", "inodes", "level", "words"),
    [
        (100 * GB, 10**7, "ok", "100 GB of 200 GB are free"),
        (100 * GB, None, "ok", "100 GB of 200 GB are free"),
        (10 * GB, 10**7, "warning", "only 10.0 GB of 200 GB"),
        (GB // 2, 10**7, "failure", "only 500 MB of 200 GB"),
        (100 * GB, 50_000, "warning", "only 50000 of 20000000 inodes"),
        (100 * GB, 7, "failure", "only 7 of 20000000 inodes"),
    ],
)
def test_little_space_and_few_inodes_are_told(free, inodes, level, words):
    space = {"bytes": 200 * GB, "free_bytes": free, "inodes": 20_000_000, "free_inodes": inodes}
    only(judge_storage.judge_space("/scratch", space), level, "space", words)


@pytest.mark.parametrize(
    ("used", "files", "level", "words"),
    [
        (10, 10, "ok", "10.0 GB of your quota of 100 GB"),
        (95, 10, "warning", "95.0 GB of your quota of 100 GB"),
        (100, 10, "failure", "100 GB of your quota of 100 GB"),
        (10, 90, "warning", "90 files of your quota of 100 files"),
        (10, 120, "failure", "120 files of your quota of 100 files"),
    ],
)
def test_quotas_that_are_nearly_used_up_are_told(used, files, level, words):
    row = {"used_bytes": used * GB, "limit_bytes": 100 * GB, "files": files, "file_limit": 100}
    only(judge_storage.judge_quotas("/scratch", [row]), level, "quota", words)
    only(judge_storage.judge_quotas("/scratch", [row | {"limit_bytes": 0, "file_limit": 0}]), "ok", "quota", "none")


def test_a_small_or_missing_shared_memory_is_told():
    def shm(name, free):
        return host(name, shm={"bytes": 64 * GB, "free_bytes": free, "inodes": None, "free_inodes": None})

    only(judge_storage.judge_shm([shm("n0", 60 * GB), shm("n1", 50 * GB)]), "ok", "shm", "50.0 GB of 64.0 GB")
    found = judge_storage.judge_shm([shm("n0", 60 * GB), shm("n1", 64 << 20)])
    only(found, "warning", "shm", "only 67.1 MB", "on n1", hosts=["n1"])
    only(judge_storage.judge_shm([shm("n0", 1 << 20)]), "failure", "shm", "only 1.0 MB")
    only(judge_storage.judge_shm([host(shm=None), host("n1")]), "failure", "shm", "no /dev/shm on n0", hosts=["n0"])
    only(judge_storage.judge_shm([host(shm=None)]), "failure", "shm", "no /dev/shm on n0")


def test_caches_that_are_not_offline_not_writable_or_not_shared_are_told():
    only(judge_storage.judge_caches([host()]), "ok", "caches", "which exists")
    online = host(offline={"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": None})
    only(judge_storage.judge_caches([online]), "warning", "caches", "HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE not set")
    only(judge_storage.judge_caches([host(), host("n1", hf_home_writable=False)]), "warning", "caches", "to on n1")
    found = judge_storage.judge_caches([host(), host("n1", hf_home_exists=False)])
    only(found, "warning", "caches", "exists on n0 but not on n1")


# ---- words, files and pictures


def test_findings_are_greppable_lines_and_failures_name_hosts_for_sbatch():
    bad = finding.failure("speed", "n1 is slow", "leave it out", ["n1", "n2"])
    assert bad.line() == "FAILURE  speed      n1 is slow; cure: leave it out"
    assert finding.ok("gpu", "fine").line() == "ok       gpu        fine"
    others = [finding.warning("shm", "small", "more", ["n9"]), finding.failure("cores", "x", "y", ["n2", "n0"])]
    assert finding.excluded([bad, *others]) == "n1,n2,n0"


def test_numbers_are_written_for_people():
    assert finding.named("rank", [0, 1, 2, 5]) == "ranks 0-2, 5"
    assert finding.named("core", [3]) == "core 3"
    assert finding.on(["n0", "n1", "n0"]) == "on n0, n1"
    assert finding.on([f"n{number}" for number in range(100)]).endswith("n7, ... (100 hosts)")
    assert [finding.size(amount) for amount in (0, 999, 1500, 2.5e8, 3e15)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "250 MB",
        "3000 TB",
    ]
    assert [finding.duration(seconds) for seconds in (2, 0.003, 4.2e-6)] == ["2 s", "3 ms", "4.2 us"]


def test_the_picture_is_of_the_asked_kind_and_survives_pairs_that_were_not_measured(tmp_path):
    pytest.importorskip("matplotlib")
    names = [f"node{number:03d}" for number in range(40)]
    plot.bandwidth(tmp_path / "a.svg", names, links(40, slow=[7])[:300], "host")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    plot.bandwidth(tmp_path / "b.png", ["0"], [], "rank")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"--plot b\.doc: the name must end in one of \."):
        plot.check("b.doc")
