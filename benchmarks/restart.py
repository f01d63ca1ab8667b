"""Is a run that failed and continued the same run? One rank raises an error in the middle; the rest is measured.

    python -m benchmarks.restart --data DIR [--ranks 4] [--steps 50]

Prints the exit code and the seconds from the error to the end of the job, then how many bytes of the weights and of
the optimizer state differ from those of an uninterrupted run after the last step.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from . import jobs

RUN = """
[run]
output_dir = "{output}"
[data]
train = "{data}/train"
[model]
task = "masked_lm"
config = {{ model_type = "bert", hidden_size = 128, num_hidden_layers = 2, num_attention_heads = 2 }}
[train]
max_steps = {steps}
global_batch_size = 48
micro_batch_size = 4
sequence_length = 64
learning_rate = 1e-3
warmup_steps = 10
[checkpoint]
every_steps = 10
keep = 100
"""


def failing_job(run_file, at_step, note):
    """What each rank of the failing job runs: the last but one rank raises before step `at_step` is done."""
    from hpcllm import __main__, mpi, train

    one_step, done, world = train.one_step, [], mpi.join()

    def failing(*arguments):
        done.append(None)
        if len(done) == at_step and world.rank == max(0, world.size - 2):
            Path(note).write_text(str(time.time()))
            raise RuntimeError(f"provoked in step {at_step}")
        return one_step(*arguments)

    train.one_step = failing
    __main__.main(["train", run_file])


def differing_bytes(a, b):
    """(bytes that differ between two safetensors files, all bytes), by tensors; all of them where the names differ."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    a, b = load_file(a), load_file(b)
    if a.keys() != b.keys():
        return (size := sum(t.nbytes for t in a.values())), size
    raw = [(a[name].reshape(-1).view(torch.uint8).numpy(), b[name].reshape(-1).view(torch.uint8).numpy()) for name in a]
    return int(sum(np.count_nonzero(x != y) for x, y in raw)), sum(x.size for x, _ in raw)


def main():
    if sys.argv[1:2] == ["--job"]:
        return failing_job(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that hpcllm prepare wrote")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {}
        for kind in ("whole", "stopped"):
            files[kind] = folder / f"{kind}.toml"
            files[kind].write_text(RUN.format(output=folder / kind, data=Path(args.data).resolve(), steps=args.steps))
        jobs.run(args.ranks, "-m", "hpcllm", "train", files["whole"])
        middle = args.steps // 2
        job = ("-m", "benchmarks.restart", "--job", files["stopped"], middle, folder / "time")
        failed = jobs.run(args.ranks, *job, check=False)
        ended_s = time.time() - float((folder / "time").read_text())
        print(
            f"{args.ranks} ranks, error in step {middle}: exit code {failed.returncode}, job over after {ended_s:.2f} s"
        )
        print("  " + next(line for line in failed.stderr.splitlines() if "hpcllm: rank" in line))
        jobs.run(args.ranks, "-m", "hpcllm", "train", files["stopped"], "--resume")
        events = [json.loads(line) for line in (folder / "stopped" / "events.jsonl").read_text().splitlines()]
        print(f"continued from step {[e['step'] for e in events if e['event'] == 'start'][-1]}")
        for file in ("model.safetensors", "optimizer.safetensors"):
            last = f"checkpoint-{args.steps}/{file}"
            different, size = differing_bytes(folder / "whole" / last, folder / "stopped" / last)
            print(f"{file}, step {args.steps}: {different} of {size} bytes differ from the uninterrupted run")


if __name__ == "__main__":
    main()
