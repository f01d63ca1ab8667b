"""Does a run go on under another layout and number of ranks? Saved under one, continued under others, step by step.

    python -m benchmarks.change_layout --data DIR [--steps 20]

DIR is a folder that `hpcllm prepare` wrote. BERT, GPT-2 and Llama, SGD with momentum, fp32, no dropout: half of the
steps under data 2 x tensor 2 on 4 ranks, the rest under each of the others. The largest relative difference of the loss
and gradient norm of any of the latter steps to those of one process that was never stopped. Exit code 1 beyond 1e-5.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from . import jobs

BOUND = 1e-5
MODELS = {
    "bert": 'masked_lm", config = { model_type = "bert", hidden_size = 64, num_hidden_layers = 4, '
    "num_attention_heads = 4, intermediate_size = 128, hidden_dropout_prob = 0.0, attention_probs_dropout_prob = 0.0 }",
    "gpt2": 'causal_lm", config = { model_type = "gpt2", n_embd = 64, n_layer = 4, n_head = 4, n_positions = 64, '
    "resid_pdrop = 0.0, embd_pdrop = 0.0, attn_pdrop = 0.0 }",
    "llama": 'causal_lm", config = { model_type = "llama", hidden_size = 64, num_hidden_layers = 4, '
    "num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = 128 }",
}
SAVED = "data 2 x tensor 2", 4, {"tensor": 2}
CONTINUED = (
    ("data 2 x pipeline 2", 4, {"pipeline": 2}),
    ("data 3, sharding full", 3, {"sharding": '"full"'}),
    ("one process", 1, {}),
)
RUN = """
data = {{ train = "{data}/train" }}
model = {{ task = "{model} }}
[train]
global_batch_size = 24
micro_batch_size = 2
sequence_length = 64
optimizer = "sgd"
sgd_momentum = 0.9
learning_rate = 0.03
lr_scheduler_type = "constant"
warmup_steps = 5
"""


def run(run_file, output, steps, ranks, parallel, *options):
    settings = [f"run.output_dir={output}", f"train.max_steps={steps}"]
    settings += [f"parallel.{key}={value}" for key, value in parallel.items()]
    jobs.run(ranks, "-m", "hpcllm", "train", run_file, *settings, *options)
    return [record for record in jobs.metrics(output) if "loss" in record]


def largest_difference(records, reference, key):
    """Of `key` in all steps, relative."""
    return max(abs(ours[key] / theirs[key] - 1) for ours, theirs in zip(records, reference, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that hpcllm prepare wrote")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    half, worst = args.steps // 2, 0.0
    layout, ranks, parallel = SAVED
    print(f"{half} of {args.steps} steps under {layout} on {ranks} ranks; {jobs.versions()}\n")
    print("| model | continued under | ranks | loss at the end | loss | gradient norm |\n|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family, model in MODELS.items():
            run_file = folder / f"{family}.toml"
            run_file.write_text(RUN.format(data=Path(args.data).resolve(), model=model))
            reference = run(run_file, folder / f"{family}-alone", args.steps, 1, {})
            run(run_file, folder / f"{family}-saved", half, ranks, parallel)
            for number, (other, fewer, changes) in enumerate(CONTINUED):
                output = folder / f"{family}-{number}"
                shutil.copytree(folder / f"{family}-saved", output)
                records = run(run_file, output, args.steps, fewer, changes, "--resume")
                off = [largest_difference(records[half:], reference[half:], key) for key in ("loss", "grad_norm")]
                worst, cells = max(worst, *off), " | ".join(f"{difference:.1e}" for difference in off)
                print(f"| {family} | {other} | {fewer} | {records[-1]['loss']:.4f} | {cells} |", flush=True)
    print(f"\nlargest difference {worst:.1e}")
    sys.exit(worst > BOUND)


if __name__ == "__main__":
    main()
