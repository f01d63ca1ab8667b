"""All benchmarks that compare, one after the other, in one command: a table, a JSON file and a picture of the ratios.

    python -m benchmarks.run [--quick] [--only NAME ...] [--output DIR] [--input TEXT ...]

Each benchmark has its ways take turns and says what it does itself (`python -m benchmarks.NAME --help`). Here are kept
of each what it prints, NAME.txt, and the ratios of its rounds: how many times better hpcllm was than the other, which
stands behind the colon. The whole takes about an hour and a half on two cores, --quick a quarter of an hour, in rounds
too few to decide anything. Peers that are not installed (benchmarks/requirements.txt) are left out or end their
benchmark, which the table then says.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from . import jobs

# name: (ranks of an MPI job, None for a program that starts its own; arguments; those of --quick)
BENCHMARKS = {
    "collectives": (
        2,
        ["--rounds", "7"],
        ["--rounds", "2", "--operation", "all_reduce", "--size", str(1 << 16), str(26 << 20)],
    ),
    "ddp_step": (2, [], ["--rounds", "2", "--model", "14M"]),
    "startup": (None, [], ["--rounds", "2"]),
    "input_speed": (None, ["--megatokens", "256"], ["--megatokens", "8", "--rounds", "2", "--steps", "6"]),
    "prepare_speed": (None, [], ["--rounds", "1", "--megabytes", "4"]),
    "train_step": (None, [], ["--rounds", "1", "--rows", "1"]),
    "masked_lm_speed": (None, [], ["--rounds", "1", "--steps", "3", "--lengths", "128"]),
    "loss_curves": (None, [], ["--seeds", "1", "--steps", "40"]),
}
TAKES_TEXT = ("masked_lm_speed", "loss_curves")


def run(name, arguments, ranks, output):
    """The ratios of one benchmark: [{"what": ..., "ratios": [...]}], and its exit code."""
    records = output / f"{name}.jsonl"
    records.unlink(missing_ok=True)
    os.environ["HPCLLM_BENCHMARK_RECORDS"] = str(records)
    module = ["-m", f"benchmarks.{name}", *arguments]
    if ranks:
        done = jobs.run(ranks, *module, check=False, timeout_s=7200)
    else:
        command = [sys.executable, *module]
        done = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    del os.environ["HPCLLM_BENCHMARK_RECORDS"]
    (output / f"{name}.txt").write_text(done.stdout + (f"\n{done.stderr}" if done.returncode else ""))
    if not records.exists():
        return [], done.returncode
    found = [json.loads(line) for line in records.read_text().splitlines()]
    records.unlink()
    return found, done.returncode


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def table(results):
    lines = ["| benchmark | hpcllm beside | times better, median (smallest to largest) |", "|---|---|---:|"]
    for name, result in results.items():
        if result["exit_code"]:
            lines.append(f"| {name} | ended with exit code {result['exit_code']}, see {name}.txt | |")
        lines += [f"| {name} | {one['what']} | {jobs.spread(one['ratios'])} |" for one in result["ratios"]]
    return "\n".join(lines)


def plot(path, results, title):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [one for result in results.values() for one in result["ratios"]]
    if not shown:
        return
    figure, axis = plt.subplots(figsize=(9, 1 + 0.24 * len(shown)))
    for row, one in enumerate(shown):
        low, high, middle = min(one["ratios"]), max(one["ratios"]), statistics.median(one["ratios"])
        axis.plot([low, high], [row, row], color="0.6", linewidth=3, solid_capstyle="butt")
        axis.plot(middle, row, "o", color="tab:green" if middle >= 1 else "tab:red", markersize=4)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(shown)), [one["what"] for one in shown], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("times better than what stands behind the colon (median and range of rounds)")
    axis.set_title(textwrap.fill(title, 80), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), metavar="DIR", help="(%(default)s)")
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="TEXT", help="texts with headings for masked_lm_speed"
    )
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    title = f"{processor()}, {jobs.versions()}, {time.strftime('%Y-%m-%d')}" + (", --quick" if args.quick else "")
    results = {}
    for name in args.only:
        ranks, whole, quick = BENCHMARKS[name]
        arguments = list(quick if args.quick else whole)
        if name in TAKES_TEXT and args.input:
            arguments += ["--input", *(str(Path(text).resolve()) for text in args.input)]
        if name == "loss_curves":
            arguments += ["--plot", str(output / "loss_curves.png")]
        began = time.monotonic()
        ratios, code = run(name, arguments, ranks, output)
        results[name] = {"arguments": arguments, "exit_code": code, "ratios": ratios}
        print(f"{name}: {time.monotonic() - began:.0f} s, exit code {code}", file=sys.stderr, flush=True)
    text = f"{title}\n\n{table(results)}\n"
    print(text)
    (output / "results.md").write_text(text)
    (output / "results.json").write_text(json.dumps({"machine": title, "benchmarks": results}, indent=1))
    plot(output / "results.png", results, title)
    sys.exit(any(result["exit_code"] for result in results.values()))


if __name__ == "__main__":
    main()
