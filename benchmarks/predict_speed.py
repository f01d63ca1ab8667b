"""How many rows a second does `hpcllm predict` classify, beside `transformers.pipeline`? And do ranks wait for others?

    python -m benchmarks.predict_speed --model DIR [--rows 20000] [--ranks 1 2] [--precision fp32 bf16]

A classifier labels texts whose lengths follow a power law, as made-up sentences of the model's own words. The peer is
`pipeline("text-classification")` over the same texts with the best of several batch sizes (found on a part of them), as
one process with as many threads as there are ranks and, for several, as one process of one thread a part of the texts;
the quicker of the two counts. Both read the rows from a file and write JSON lines; times are of computing, without
imports and loading, and both have the malloc setting that hpcllm chooses. They take turns. Idle: the
largest less the smallest busy time of ranks, of the largest. Which labels differ is counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from . import jobs


def texts(folder, count, alpha=1.3, seed=0):
    """Texts of 1 to 400 words whose numbers follow a power law."""
    from transformers import AutoTokenizer

    words = [word for word in AutoTokenizer.from_pretrained(folder).get_vocab() if word.isalpha()]
    words.sort()
    draw = np.random.default_rng(seed)
    lengths = np.minimum(400, (4 * (1 + draw.pareto(alpha, count))).astype(int))
    return [" ".join(draw.choice(words, length)) for length in lengths]


def peer(args):
    """Classify by a pipeline the rows of a file; print seconds."""
    import torch
    from transformers import pipeline

    torch.set_num_threads(args.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision[0]]
    rows = [json.loads(line)["text"] for line in Path(args.input).read_text().splitlines()]
    classify = pipeline("text-classification", model=args.model, dtype=dtype, device="cpu")
    classify(rows[:4])
    began = time.perf_counter()
    with open(args.output, "w", encoding="utf-8") as file:
        for text, answer in zip(rows, classify(rows, batch_size=args.batch_size, truncation=True), strict=True):
            file.write(json.dumps({"text": text, "prediction": answer}) + "\n")
    print(json.dumps({"seconds": time.perf_counter() - began}))


def pipelines(args, precision, inputs, threads, batch_size):
    """Seconds of the slowest of pipelines that run at once, one for each of the files `inputs`."""
    started = []
    for file in inputs:
        how = ["--one", file, "--threads", threads, "--batch-size", batch_size, "--precision", precision]
        command = [sys.executable, "-m", "benchmarks.predict_speed", "--model", args.model, *how]
        env = {**os.environ, **jobs.KEEP, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(list(map(str, command)), env=env, cwd=jobs.ROOT, **quiet))
    found = []
    for job in started:
        told, problems = job.communicate()
        if job.returncode:
            sys.exit(problems[-5000:])
        found.append(json.loads(told.strip().splitlines()[-1])["seconds"])
    return max(found)


def ours(args, precision, ranks, rows, output):
    """(seconds, idle part of the rank that waits longest) of `hpcllm predict`."""
    asked = ["predict", args.model, "--input", rows, "--output", output, "--precision", precision, "--overwrite"]
    asked += ["--task", "sequence_classification"]
    told = jobs.run(ranks, "-m", "hpcllm", *asked).stdout
    summary = json.loads(told[told.index("{") :])
    busy = [rank["busy_s"] for rank in summary["ranks"]]
    return summary["seconds"], 1 - min(busy) / max(busy)


def labels(path):
    return [json.loads(line)["prediction"]["label"] for line in Path(path).read_text().splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder with a model for sequence classification")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("--one", "--threads", "--batch-size"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.one:
        args.input, args.output = args.one, args.one + ".answers"
        args.threads, args.batch_size = int(args.threads), int(args.batch_size)
        return peer(args)
    args.model = os.path.abspath(args.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"text": text}) + "\n" for text in texts(args.model, args.rows)]
        (folder / "rows.jsonl").write_text("".join(lines))
        (folder / "some.jsonl").write_text("".join(lines[: max(64, args.rows // 20)]))
        print(f"{args.rows} rows, {sum(map(len, lines)) / 1e6:.1f} MB, {jobs.versions()}\n")
        print("| precision | ranks | hpcllm, rows/s | pipeline, rows/s | times | peer as | idle | other labels |")
        print("|---|---:|---:|---:|---:|---|---:|---:|", flush=True)
        for precision in args.precision:
            tried = {n: pipelines(args, precision, [folder / "some.jsonl"], 1, n) for n in args.batch_sizes}
            best = min(tried, key=tried.get)
            for ranks in args.ranks:
                compare(args, precision, ranks, best, lines, folder)


def compare(args, precision, ranks, batch_size, lines, folder):
    parts = [folder / f"part-{part}.jsonl" for part in range(ranks)]
    for part, file in enumerate(parts):
        file.write_text("".join(lines[part::ranks]))
    ways = {"threads": ([folder / "rows.jsonl"], ranks)} | ({"processes": (parts, 1)} if ranks > 1 else {})
    mine, theirs, idle = [], {way: [] for way in ways}, []
    for _ in range(args.rounds):
        seconds, waited = ours(args, precision, ranks, folder / "rows.jsonl", folder / "answers.jsonl")
        mine.append(seconds)
        idle.append(waited)
        for way, (files, threads) in ways.items():
            theirs[way].append(pipelines(args, precision, files, threads, batch_size))
    way = min(theirs, key=lambda way: np.median(theirs[way]))
    other = sum(
        a != b for a, b in zip(labels(folder / "answers.jsonl"), labels(folder / "rows.jsonl.answers"), strict=True)
    )
    times = np.divide(theirs[way], mine)
    jobs.record(f"predict, {ranks} ranks, {precision}: pipeline", times)
    count = ranks if way == "threads" else 1
    cells = [precision, ranks, *(jobs.spread(args.rows / np.array(of), "{:.0f}") for of in (mine, theirs[way]))]
    cells += [jobs.spread(times), f"{ranks if way == 'processes' else 1} x {count} threads, batches of {batch_size}"]
    print("|", " | ".join(map(str, [*cells, jobs.spread(idle, "{:.3f}"), other])), "|", flush=True)


if __name__ == "__main__":
    main()
