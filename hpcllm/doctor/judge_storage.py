"""What the facts of `storage` mean: plain functions, facts of all hosts in, findings out."""

from statistics import median

from .finding import duration, failure, odd_ones, ok, on, size, warning
from .storage import OFFLINE

SHM_FAILS_BYTES, SHM_WARNS_BYTES = 16 << 20, 1 << 30
FREE_FAILS_BYTES, FREE_WARNS_BYTES = 1 << 30, 20 << 30
INODES_FAIL, INODES_WARN = 1000, 100_000
QUOTA_WARNS = 0.9
SLOW_READ_BYTES_PER_S = 50e6
SLOW_LOCK_S = 1.0
SLOW_PART = 0.75
_TRUE = {"1", "ON", "YES", "TRUE"}
ELSEWHERE = "choose another --folder, on a file system that all hosts of the job share and may write to"


def judge(path, space, quotas, hosts):
    """Findings about folder `path`: `space` and `quotas` as root sees them, hosts: facts of each host, root's first."""
    findings = judge_folder(path, hosts)
    if space is not None:
        findings += judge_space(path, space) + judge_quotas(path, quotas)
    return findings + judge_shm(hosts) + judge_caches(hosts)


def judge_folder(path, hosts):
    if "error" in hosts[0]["folder"]:
        return [failure("folder", f"{path} cannot be written to: {hosts[0]['folder']['error']}", ELSEWHERE)]
    findings, places = [], [host["host"] for host in hosts]

    def where(key):
        return [host for host in hosts if key in host["folder"]]

    if missing := where("missing"):
        names = [host["host"] for host in missing]
        text = f"{path} is not the same folder everywhere: what {hosts[0]['host']} wrote is not there {on(names)}"
        findings.append(failure("folder", text, ELSEWHERE, names))
    for key, what, cure in (
        ("write_error", "writing", "free space or quota, or choose another --folder"),
        ("read_error", "reading back what another host wrote", "tell the site: its file system loses data"),
    ):
        if failed := where(key):
            names = [host["host"] for host in failed]
            text = f"{what} in {path} failed {on(names)}: {failed[0]['folder'][key]}"
            findings.append(failure("folder", text, cure, odd_ones(names, places)))
    read = {host["host"]: host["folder"]["read_bytes_per_s"] for host in where("read_bytes_per_s")}
    if read:
        findings += _judge_reading(
            path, read, [host["folder"]["write_bytes_per_s"] for host in where("write_bytes_per_s")]
        )
    return findings + _judge_locks(path, hosts)


def _judge_reading(path, read, written):
    usual = median(read.values())
    text = f"{path}: {size(usual)}/s reading and {size(median(written))}/s writing a host"
    findings = []
    if usual < SLOW_READ_BYTES_PER_S:
        cure = "keep data on the parallel file system or stage it to local disks, not on a home folder"
        findings.append(warning("reading", f"{text}, which is slow", cure))
    slow = {host: rate for host, rate in read.items() if rate < SLOW_PART * usual}
    if slow:
        host, rate = min(slow.items(), key=lambda item: item[1])
        part = f"{size(rate)}/s, {rate / usual:.0%} of the median {size(usual)}/s"
        text = f"reading from {path} is slower than elsewhere {on(slow)}: {host} {part}"
        findings.append(warning("reading", text, "run again; if it stays, leave these hosts out or tell the site"))
    return findings or [ok("reading", text)]


def _judge_locks(path, hosts):
    cure = "export HDF5_USE_FILE_LOCKING=FALSE for other programs that read here (slurm/site.sh does)"
    told = [host for host in hosts if "lock_s" in host["folder"]]
    if not told:
        return []
    off = (hosts[0]["hdf5_locking"] or "").upper() in ("FALSE", "0")
    broken = [host for host in told if "lock_error" in host["folder"]]
    if broken:
        text = f"HDF5 cannot lock files in {path} {on(host['host'] for host in broken)}"
        return [
            warning("locks", f"{text}: {broken[0]['folder']['lock_error']}; hpcllm itself reads without locks", cure)
        ]
    slowest = max(told, key=lambda host: host["folder"]["lock_s"])
    if slowest["folder"]["lock_s"] > SLOW_LOCK_S:
        text = f"HDF5 takes {duration(slowest['folder']['lock_s'])} to write and lock a file in {path}"
        return [warning("locks", f"{text} {on([slowest['host']])}", cure)]
    text = "HDF5_USE_FILE_LOCKING=FALSE keeps HDF5 from locking files" if off else f"HDF5 locks files in {path}"
    return [ok("locks", text)]


def judge_space(path, space):
    findings = []
    free, cure = space["free_bytes"], "remove old checkpoints, or choose another --folder"
    text = f"{size(free)} of {size(space['bytes'])} are free in {path}"
    if free < FREE_WARNS_BYTES:
        level = failure if free < FREE_FAILS_BYTES else warning
        findings.append(level("space", f"only {text}", cure))
    inodes = space["free_inodes"]
    if inodes is not None:
        text += f", and {inodes} inodes"
        if inodes < INODES_WARN:
            level = failure if inodes < INODES_FAIL else warning
            findings.append(level("space", f"only {inodes} of {space['inodes']} inodes are free in {path}", cure))
    return findings or [ok("space", text)]


def judge_quotas(path, quotas):
    findings, told = [], []
    for row in quotas:
        for used, limit, show in (
            (row["used_bytes"], row["limit_bytes"], size),
            (row["files"], row["file_limit"], "{} files".format),
        ):
            if not limit:
                continue
            text = f"{show(used)} of your quota of {show(limit)} in {path} are used"
            if used >= QUOTA_WARNS * limit:
                level = failure if used >= limit else warning
                findings.append(level("quota", text, "remove old checkpoints and environments, or ask for more"))
            else:
                told.append(text)
    return findings or [ok("quota", ", ".join(told) or f"none that could be asked for {path}")]


def judge_shm(hosts):
    places = [host["host"] for host in hosts]
    missing = [host["host"] for host in hosts if host["shm"] is None]
    cure = "`--shm-size` or `--ipc=host` for containers, remove what dead jobs left there, or ask the site"
    if missing:
        return [failure("shm", f"there is no /dev/shm {on(missing)}", cure, odd_ones(missing, places))]
    least = min(hosts, key=lambda host: host["shm"]["free_bytes"])
    text = f"{size(least['shm']['free_bytes'])} of {size(least['shm']['bytes'])} are free in /dev/shm"
    for limit, level in ((SHM_FAILS_BYTES, failure), (SHM_WARNS_BYTES, warning)):
        names = [host["host"] for host in hosts if host["shm"]["free_bytes"] < limit]
        if names:
            text = f"only {text} {on([least['host']])}; too little {on(names)}"
            return [level("shm", text, cure, odd_ones(names, places))]
    return [ok("shm", f"{text}{' where it is least' if len(hosts) > 1 else ''}")]


def judge_caches(hosts):
    findings = []
    unset = {name for host in hosts for name in OFFLINE if (host["offline"][name] or "").upper() not in _TRUE}
    if unset:
        text = f"{' and '.join(sorted(unset))} not set to 1: other programs than hpcllm may wait for the internet"
        names = " ".join(f"{name}=1" for name in OFFLINE)
        findings.append(warning("caches", f"{text} that nodes do not have", f"export {names} (slurm/site.sh does)"))
    homes = sorted({host["hf_home"] for host in hosts})
    locked = [host["host"] for host in hosts if not host["hf_home_writable"]]
    cure = "export HF_HOME=/a/folder/on/the/shared/file/system, filled on the login node"
    if locked:
        findings.append(warning("caches", f"HF_HOME ({homes[0]}) cannot be written to {on(locked)}", cure))
    there = [host["host"] for host in hosts if host["hf_home_exists"]]
    absent = [host["host"] for host in hosts if not host["hf_home_exists"]]
    if there and absent:
        text = f"HF_HOME ({', '.join(homes)}) exists {on(there)} but not {on(absent)}"
        findings.append(warning("caches", text, cure))
    state = "exists" if there else "does not exist yet"
    return findings or [ok("caches", f"offline; HF_HOME is {homes[0]}, which {state}")]
