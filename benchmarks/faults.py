"""One of four ranks fails while the others wait for it in an all_reduce: when is the job over, and who is blamed?

    python -m benchmarks.faults [--timeout 3] [FAULT ...]

Prints a table: seconds from the fault to the end of mpirun, its exit code, the lines that name rank 2 (which is the one
that fails), processes of the job that are left, and files that are left in /dev/shm and the temporary folder. The job
is tests/mpi/hang_how.py.
"""

import argparse
import contextlib
import os
import re
import tempfile
import time
from pathlib import Path

from . import jobs

FAULTS = {
    "stop": "SIGSTOP",
    "holds_gil": "infinite loop in C that holds the GIL",
    "loop": "infinite loop in Python",
    "other_group": "waits in another group, in a circle",
    "other_call": "broadcast where the others all_reduce",
    "exception": "exception",
    "thread_exception": "exception in a thread",
    "sys_exit": "sys.exit(3)",
    "exit_7": "os._exit(7)",
    "exit_0": "os._exit(0)",
    "segfault": "segmentation fault",
    "kill": "SIGKILL",
}
RANKS, BLAMED = 4, 2
JOB = jobs.ROOT / "tests" / "mpi" / "hang_how.py"


def unused(folder):
    """Files of `folder` that MPI or hpcllm may have made and that no process has mapped."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped |= set(re.findall(rf"{folder}/\S+", maps.read_text(errors="replace")))
    kinds = ("mpich_shm", "sm_segment", "hpcllm")
    return {str(f) for f in Path(folder).iterdir() if f.name.startswith(kinds)} - mapped


def left(pids):
    """How many of these processes are there although they had five seconds to go."""
    deadline = time.monotonic() + 5
    while (alive := sum(os.path.exists(f"/proc/{pid}") for pid in pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def naming(said):
    """Who names the failing rank: hpcllm, the launcher, or both; "nobody" is what must not happen."""
    ours = re.findall(r"^hpcllm: .*", said, re.MULTILINE)
    blames = (
        rf"waits for ranks? .*\brank {BLAMED} on |^hpcllm: rank {BLAMED} of |not the same call .* on rank {BLAMED}\b"
    )
    who = ["hpcllm"] if any(re.search(blames, line) for line in ours) else []
    if re.search(rf"process rank {BLAMED} with PID [1-9]|Process name: \[[^\]]*,{BLAMED}\]", said):
        who.append("mpirun")
    return " and ".join(who) or "nobody"


def measure(fault, checking=False):
    """One row: seconds, exit code, who named rank 2, processes left, files left."""
    before = unused("/dev/shm")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder
        os.environ["HPCLLM_CHECK"] = str(int(checking))
        done = jobs.run(RANKS, JOB, fault, check=False, timeout_s=120)
        over = time.time()
        del os.environ["TMPDIR"]
        said = done.stdout + done.stderr
        orphans = left(re.findall(r"started (\d+)", said))
        files = len(unused("/dev/shm") - before) + len([f for _, _, files in os.walk(folder) for f in files])
    seconds = over - float(re.search(r"failing at ([\d.]+)", said)[1])
    who = naming(said)
    if checking:
        who = "hpcllm, both lines" if len(re.findall(r"#17 .* at .*hang_how.py:\d+", said)) >= 2 else "nobody"
    return f"{seconds:.1f}", done.returncode, who, orphans, files


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all by default")
    parser.add_argument("--timeout", default="3", help="HPCLLM_TIMEOUT_S of the jobs")
    args = parser.parse_args()
    os.environ["HPCLLM_TIMEOUT_S"] = args.timeout
    print(f"HPCLLM_TIMEOUT_S={args.timeout}, {RANKS} ranks, {jobs.versions()}\n")
    print("| rank 2 | seconds to the end | exit code | rank 2 named by | processes left | files left |")
    print("|---|---:|---:|---|---:|---:|", flush=True)
    for fault in args.faults or FAULTS:
        print(f"| {FAULTS[fault]} | {' | '.join(map(str, measure(fault)))} |", flush=True)
    if not args.faults:
        row = measure("other_call", checking=True)
        print(f"| {FAULTS['other_call']}, HPCLLM_CHECK=1 | {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
