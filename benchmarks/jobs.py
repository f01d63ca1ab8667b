"""Start jobs of several ranks on this machine, the way the job scripts do, and read what they left. Not a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_LAUNCH = """
here="$1"; shift; source "$here/site.sh"
launch "$@"
"""


def run(ranks, *arguments, check=True, timeout_s=1800):
    """Run `python ARGUMENTS` on `ranks` ranks; returns the CompletedProcess, its output as text."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HPCLLM_PROGRESS": "lines",
        "HPCLLM_RANKS": str(ranks),
    }
    command = [
        "bash",
        "-c",
        _LAUNCH,
        "benchmarks",
        str(ROOT / "slurm"),
        sys.executable,
        *map(str, arguments),
    ]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, cwd=ROOT
    )
    if check and done.returncode:
        told = f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        sys.exit(f"{' '.join(map(str, arguments))}: exit code {done.returncode}\n{told}")
    return done


def metrics(output):
    """Records of metrics.jsonl; of several of one step and kind the last."""
    records = {}
    for line in (Path(output) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        records[record["step"], "eval_loss" in record] = record
    return list(records.values())


def held():
    """Bytes of this process, those of pages that several share in equal parts (PSS)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/smaps_rollup has no Pss")


def versions():
    """One line: what this was measured with."""
    from importlib.metadata import version

    names = ("torch", "mpi4py", "transformers", "h5py", "numpy")
    return ", ".join(f"{name} {version(name)}" for name in names) + f", {os.cpu_count()} cores"
