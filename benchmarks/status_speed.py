"""How long does `hpcllm status` take on a long run? From the start of the interpreter to its end, as one types it.

    python -m benchmarks.status_speed [--steps 100000] [--events 1000 100000] [--rounds 20] [--folder DIR]

The run is made up: a record of metrics.jsonl for each step, an evaluation in the middle alone, and so many events, most
of them checkpoints. Rounds take turns: warm, and cold, for which the page cache is asked to forget the run's files and
those of hpcllm (posix_fadvise; Python's own and those of other packages stay). Prints best and median.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import jobs


def write_run(folder, steps, events):
    """A run at work in `folder`."""
    now = time.time()
    begun = now - 2.0 * steps
    same = {"learning_rate": 1e-4, "grad_norm": 0.731, "step_s": 2.0, "data_s": 0.001, "compute_s": 1.7}
    same |= {"communication_s": 0.3, "memory_bytes": 61 << 30, "imbalance": 1.02, "mfu": 0.41, "tokens_per_s": 435374.2}
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('[model]\ntask = "causal_lm"\n')
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            told = {"step": step, "samples": 64 * step, "loss": 3.0, **same, "useful_s": 2.0 * step, "restart": 0}
            file.write(json.dumps({**told, "time": begun + 2.0 * step}) + "\n")
            if step == steps // 2:
                scores = {"eval_loss": 3.1, "eval_samples": 500, "restart": 0, "time": begun + 2.0 * step}
                file.write(json.dumps({"step": step, **scores}) + "\n")
    start = {"step": 0, "max_steps": 2 * steps, "job": "4711", "ends": now + 9000.0, "ranks": 16, "hosts": ["n1", "n2"]}
    with open(folder / "events.jsonl", "w", encoding="utf-8") as file:
        file.write(json.dumps({"event": "start", **start, "restart": 0, "time": begun}) + "\n")
        for number in range(1, events):
            step = number * steps // events
            told = {"event": "slow", "step": step, "host": "n2"}
            if number % 10:
                path = f"{folder}/checkpoint-{step}"
                told = {"event": "checkpoint", "step": step, "path": path, "seconds": 2.4, "waited_s": 0.1}
            file.write(json.dumps({**told, "restart": 0, "time": begun + 2.0 * step}) + "\n")


def forget(*folders):
    """Ask the page cache to forget the files of some folders."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def seconds(folder):
    """Of one `hpcllm status`."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "hpcllm", "status", str(folder)]
    done = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, check=True)
    took = time.perf_counter() - began
    assert "step        " in done.stdout and "left        " in done.stdout, done.stdout
    return took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--events", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", help="where the runs are made and removed again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        print(f"hpcllm status, seconds: best, median of {args.rounds}")
        for events in args.events:
            folder = Path(scratch, f"run-{events}")
            write_run(folder, args.steps, events)
            took = {"warm": [], "cold": []}
            seconds(folder)
            for _ in range(args.rounds):
                took["warm"].append(seconds(folder))
                forget(folder, jobs.ROOT / "hpcllm")
                took["cold"].append(seconds(folder))
            sizes = "metrics {:.1f} MB, events {:.1f} MB".format(
                *((folder / name).stat().st_size / 1e6 for name in ("metrics.jsonl", "events.jsonl"))
            )
            for how, times in took.items():
                print(
                    f"{args.steps} steps, {events} events ({sizes}), {how}: "
                    f"{min(times):.3f}, {statistics.median(times):.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
