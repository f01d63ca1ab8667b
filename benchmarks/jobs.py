"""Start jobs of several ranks on this machine, the way the job scripts do, and read what they left. Not a command."""

import json
import os
import statistics
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


def spread(values, form="{:.2f}"):
    """Numbers as "median (smallest to largest)"."""
    low, middle, high = (form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def record(what, ratios):
    """Tell `benchmarks.run`, if it is what has started this, how many times better hpcllm was, in each round."""
    if path := os.environ.get("HPCLLM_BENCHMARK_RECORDS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "ratios": [float(ratio) for ratio in ratios]}) + "\n")


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
