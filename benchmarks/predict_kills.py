"""Does a `hpcllm predict` that is killed lose, repeat or change a row? And do its ranks wait for each other?

    python -m benchmarks.predict_kills --model DIR [--rows 20000] [--ranks 4] [--kills 3] [--precision bf16]

A classifier labels texts whose lengths follow a power law, as in `predict_speed`: once without interruption, and once
with every rank killed (SIGKILL) at random times and the same command given again. Printed: how far each start had come,
whether the two outputs are the same bytes, and of the uninterrupted one by how much, relatively, the rank that worked
least differs from the one that worked most.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from . import jobs
from .predict_speed import texts


def answers_in(folder):
    """Bytes of answers that killed runs have put aside."""
    return sum(path.stat().st_size for path in folder.glob("spool-*"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with a model for sequence classification")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, draw = os.path.abspath(args.model), random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"text": text}) + "\n" for text in texts(model, args.rows)]
        (folder / "rows.jsonl").write_text("".join(lines))
        asked = ["-m", "hpcllm", "predict", model, "--input", folder / "rows.jsonl", "--precision", args.precision]
        asked += ["--task", "sequence_classification", "--output"]
        told = jobs.run(args.ranks, *asked, folder / "whole.jsonl").stdout
        summary = json.loads(told[told.index("{\n") :])
        busy = [rank["busy_s"] for rank in summary["ranks"]]
        print(f"{args.rows} rows, {args.ranks} ranks, {args.precision}, {jobs.versions()}")
        apart = f"{min(busy):.1f} to {max(busy):.1f} s, {1 - min(busy) / max(busy):.1%} apart"
        print(
            f"not interrupted: {summary['seconds']:.0f} s, {summary['rows_per_s']:.0f} rows/s, {summary['units']} units"
        )
        print(f"ranks worked {apart}", flush=True)
        for number in range(args.kills):
            job = jobs.start(args.ranks, *asked, folder / "killed.jsonl")
            time.sleep(draw.uniform(0.1, 0.9) * summary["seconds"] / args.kills + 5)  # it takes that long to start
            killed = jobs.ranks_with(folder / "killed.jsonl")
            for rank in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            job.communicate(timeout=60)
            aside = answers_in(folder / ".killed.jsonl.partial") / 1e6
            print(f"kill {number + 1}: {len(killed)} processes, {aside:.1f} MB of answers put aside", flush=True)
        told = jobs.run(args.ranks, *asked, folder / "killed.jsonl").stdout
        again = json.loads(told[told.index("{\n") :])
        digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("whole.jsonl", "killed.jsonl")]
        same = "the same bytes" if digests[0] == digests[1] else "OTHER BYTES"
        print(
            f"started again: {again['reused_units']} of {again['units']} units were there; {again['rows']} rows, {same}"
        )


if __name__ == "__main__":
    main()
