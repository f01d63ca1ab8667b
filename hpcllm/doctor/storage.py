"""The folder a job would work in, seen from every host: space, quota, speed, locks; and /dev/shm and caches.

Finds facts; `judge_storage` says what they mean.
"""

import getpass
import os
import random
import re
import shutil
import subprocess
import tempfile
import time

# What each host writes and then reads of another host's file; bounded, so that 1,000 hosts move 32 GB in all.
FILE_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20
# Network file systems remember for a while that a file was not there.
_APPEARS_S = 5.0
_QUOTA_S = 5.0
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def launched_with():
    """The environment as it was when this process started: hpcllm's commands set the offline variables themselves."""
    with open("/proc/self/environ", encoding="utf-8", errors="replace") as file:
        return dict(entry.split("=", 1) for entry in file.read().split("\0") if "=" in entry)


def look(environ, shm="/dev/shm"):
    """Facts of this host: shared memory, the cache of Hugging Face's libraries, variables. environ: as launched."""
    home = environ.get("HF_HOME") or os.path.join(
        environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    above = home
    while not os.path.exists(above) and above != os.path.dirname(above):
        above = os.path.dirname(above)
    return {
        "shm": space(shm) if os.path.isdir(shm) else None,
        "hf_home": home,
        "hf_home_exists": os.path.isdir(home),
        "hf_home_writable": os.access(above, os.W_OK),
        "offline": {name: environ.get(name) for name in OFFLINE},
        "hdf5_locking": environ.get("HDF5_USE_FILE_LOCKING"),
    }


def space(folder):
    """Bytes and inodes of the file system of `folder`, in all and free for this user; inodes None where endless."""
    status = os.statvfs(folder)
    return {
        "bytes": status.f_blocks * status.f_frsize,
        "free_bytes": status.f_bavail * status.f_frsize,
        "inodes": status.f_files or None,
        "free_inodes": status.f_favail if status.f_files else None,
    }


def mount_of(folder):
    """(device, type) of the file system that holds `folder`, as /proc/self/mountinfo has them."""
    folder, best = os.path.realpath(folder), ("", "unknown", "unknown")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
            if os.path.commonpath([point, folder]) == point and len(point) >= len(best[0]):
                kind, device = after.split()[:2]
                best = point, device, kind
    return best[1:]


def quota(folder):
    """[{"used_bytes", "limit_bytes", "files", "file_limit"}] of `folder`'s file system, as `lfs quota` or `quota` tell.

    Limits are 0 where there is none; soft limits count as limits. Empty where it cannot be asked.
    """
    device, kind = mount_of(folder)
    if kind == "lustre" and shutil.which("lfs"):
        command = ["lfs", "quota", "-u", getpass.getuser(), folder]
    elif shutil.which("quota"):
        command = ["quota", "-w", "-p"]
    else:
        return []
    try:
        # `quota` exits with 1 where a limit is exceeded, so the exit code says nothing here.
        told = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_QUOTA_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [row for row in parse_quota(told.stdout) if command[0] == "lfs" or row.pop("device") == device]


def parse_quota(text):
    """Rows of quota(1) with -w -p, or of `lfs quota`: device; used, soft, hard, grace in blocks of 1 KiB; files alike.

    A used amount has a * where it is over its limit; Lustre puts what it is not sure of into brackets, and begins a new
    line after a long name.
    """
    amount = r"\s+\[?(\d+)\]?\*?\s+\[?(\d+)\]?\s+\[?(\d+)\]?\s+\S+"
    rows = []
    for row in re.finditer(rf"(/\S*|\S+:\S+){amount}{amount}", text):
        used, soft, hard, files, soft_files, hard_files = map(int, row.groups()[1:])
        rows.append(
            {
                "device": row[1],
                "used_bytes": used << 10,
                "limit_bytes": (soft or hard) << 10,
                "files": files,
                "file_limit": soft_files or hard_files,
            }
        )
    return rows


def measure_folder(comm, folder):
    """Facts of `folder` as this host sees it; collective over `comm`, one rank a host.

    Each host writes a file, and reads the file of the next host, which is not in its own page cache. Everything is in
    a hidden folder that is removed at the end. Errors are facts, as text: {"error"}, or {"write_error"} and so on.
    """
    made = None
    if comm.rank == 0:
        made = _attempt(
            "error", lambda: {"made": tempfile.mkdtemp(prefix=".hpcllm-doctor-", dir=os.path.abspath(folder))}
        )
    made = comm.bcast(made)
    if "error" in made:
        return made
    scratch = made["made"]
    try:
        return _measure_in(comm, scratch)
    finally:
        comm.Barrier()
        if comm.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _measure_in(comm, scratch):
    from ..data import shards

    def file_of(rank):
        return os.path.join(scratch, f"{rank}")

    facts = _attempt("missing", lambda: _wait_for(scratch))
    facts |= {} if facts else _attempt("write_error", lambda: _write(file_of(comm.rank), comm.rank))
    written = comm.allgather("write_bytes_per_s" in facts)
    neighbour = (comm.rank + 1) % comm.size
    if written[neighbour] and "missing" not in facts:
        facts |= _attempt("read_error", lambda: _read(file_of(neighbour), neighbour))
        # The first call also loads HDF5.
        facts |= _attempt("lock_error", lambda: shards.try_locking(f"{file_of(comm.rank)}.h5"))
        start = time.perf_counter()
        facts |= _attempt("lock_error", lambda: shards.try_locking(f"{file_of(comm.rank)}.h5"))
        facts["lock_s"] = time.perf_counter() - start
    return facts


def _attempt(key, function):
    try:
        return function() or {}
    except OSError as error:
        return {key: f"{error.strerror or error}"}


def _wait_for(path):
    deadline = time.monotonic() + _APPEARS_S
    while True:
        try:
            os.stat(path)
            return
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _write(path, rank):
    block = random.Random(rank).randbytes(_BLOCK_BYTES)
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(FILE_BYTES // _BLOCK_BYTES):
            left = memoryview(block)
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())
        spent = time.perf_counter() - start
        # For the one host that reads its own file.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"write_bytes_per_s": FILE_BYTES / spent}


def _read(path, rank):
    _wait_for(path)
    block, found = random.Random(rank).randbytes(_BLOCK_BYTES), bytearray(_BLOCK_BYTES)
    blocks, spent = 0, 0.0
    with open(path, "rb", buffering=0) as file:
        while True:
            start = time.perf_counter()
            count = _fill(file, found)
            spent += time.perf_counter() - start
            if not count:
                break
            if found[:count] != block[:count]:
                raise OSError(f"what was read differs from what was written in MiB {blocks} of {path}")
            blocks += 1
    if blocks != FILE_BYTES // _BLOCK_BYTES:
        raise OSError(f"{path} was read as {blocks} MiB, {FILE_BYTES // _BLOCK_BYTES} MiB were written")
    return {"read_bytes_per_s": FILE_BYTES / spent}


def _fill(file, buffer):
    filled = 0
    while filled < len(buffer) and (count := file.readinto(memoryview(buffer)[filled:])):
        filled += count
    return filled
