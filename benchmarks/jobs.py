"""Start jobs of several ranks on this machine, the way the job scripts do, and read what they left. Not a command."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import tomli_w

# What hpcllm sets by itself: the C library keeps memory that is freed.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
ROOT = Path(__file__).parent.parent
_LAUNCH = """
here="$1"; shift; source "$here/site.sh"
launch "$@"
"""


def run(ranks, *arguments, check=True, timeout_s=1800):
    """Run `python ARGUMENTS` on `ranks` ranks; returns the CompletedProcess, its output as text."""
    job = start(ranks, *arguments)
    try:
        stdout, stderr = job.communicate(timeout=timeout_s)
    except BaseException:
        job.kill()
        raise
    if check and job.returncode:
        told = f"{stdout[-3000:]}\n{stderr[-5000:]}"
        sys.exit(f"{' '.join(map(str, arguments))}: exit code {job.returncode}\n{told}")
    return subprocess.CompletedProcess(job.args, job.returncode, stdout, stderr)


def start(ranks, *arguments):
    """Start `python ARGUMENTS` on `ranks` ranks; returns the Popen of the launcher."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HPCLLM_PROGRESS": "lines",
        "HPCLLM_RANKS": str(ranks),
    }
    command = ["bash", "-c", _LAUNCH, "benchmarks", str(ROOT / "slurm"), sys.executable, *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=ROOT, **pipes)


def train(ranks, folder, **sections):
    """Run `hpcllm train` in `folder` as `sections` of a run file say, over what it left there; returns its metrics."""
    output, run_file = Path(folder) / "run", Path(folder) / "run.toml"
    sections["run"] = {"output_dir": str(output), **sections.get("run", {})}
    run_file.write_text(tomli_w.dumps(sections), encoding="utf-8")
    run(ranks, "-m", "hpcllm", "train", run_file, "--overwrite")
    return metrics(output)


def torchrun(ranks, *arguments, env=None):
    """Run `python ARGUMENTS` on `ranks` ranks by torchrun, `env` added to the environment; returns what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += map(str, arguments)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(env or {})}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-9000:]}")
    return done.stdout


def end_gloo():
    """End this rank. Gloo's threads end the process by an abort at times, whether or not the group is destroyed."""
    import torch.distributed as dist

    dist.barrier()
    os._exit(0)


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


def ranks_with(argument):
    """Process numbers of the ranks, on this machine, of the job that has `argument` in its command."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"python" in words[0] and str(argument).encode() in words and b"-np" not in words:
                found.append(int(process.name))
    return sorted(found)


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
