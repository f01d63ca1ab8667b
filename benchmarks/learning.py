"""Does it learn? Validation loss against steps on a text, beside the entropy of its words taken one by one.

    python -m benchmarks.learning --input wiki.valid.txt wiki.test.txt [--task causal_lm masked_lm] [--steps 400]

Prepares the text (one document a line), trains a model of hidden size 256 and 4 layers on 4 ranks, and prints a table.
A model that knows only how often each token occurs cannot do better than the unigram entropy (nats per token).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from . import jobs

TASKS = {
    "causal_lm": (
        "bpe",
        'model.config={model_type="gpt2",n_embd=256,n_layer=4,n_head=4,n_positions=128}',
    ),
    "masked_lm": (
        "wordpiece",
        'model.config={model_type="bert",hidden_size=256,num_hidden_layers=4,num_attention_heads=4,intermediate_size=1024}',
    ),
}
# A BERT of 4 layers with its norms after the blocks stays at the word frequencies at the rate that suits GPT-2.
RATE = {"causal_lm": 2e-3, "masked_lm": 5e-4}


def unigram_entropy(folder):
    """Entropy in nats of the distribution of single tokens in a folder of shards."""
    from hpcllm.data import shards

    stream = shards.open_folder(folder)
    counts = np.bincount(stream.gather(np.zeros(1, dtype=np.int64), stream.token_count)[0])
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum()), stream.token_count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True, help="text files, one document a line")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--learning-rate", type=float, help="default: 2e-3 for causal_lm, 5e-4 for masked_lm")
    parser.add_argument("--vocab-size", type=int, default=8000)
    args = parser.parse_args()
    inputs = [str(Path(path).resolve()) for path in args.input]
    with tempfile.TemporaryDirectory() as folder:
        for task in args.task:
            kind, model = TASKS[task]
            data, output, run_file = f"{folder}/{kind}", f"{folder}/{task}", Path(folder) / "run.toml"
            run_file.write_text("[train]\nglobal_batch_size = 64\nmicro_batch_size = 16\nsequence_length = 128\n")
            make = ["--output", data, "--tokenizer-kind", kind, "--vocab-size", args.vocab_size]
            jobs.run(args.ranks, "-m", "hpcllm", "prepare", "--input", *inputs, *make, "--validation-fraction", "0.05")
            entropy, tokens = unigram_entropy(f"{data}/train")
            settings = [f"run.output_dir={output}", f"data.train={data}/train", f"data.validation={data}/validation"]
            settings += [
                f"model.task={task}",
                model,
                f"train.max_steps={args.steps}",
                f"train.precision={args.precision}",
            ]
            settings += [
                f"train.warmup_steps={args.steps // 10}",
                f"train.learning_rate={args.learning_rate or RATE[task]}",
            ]
            settings += [f"train.eval_every_steps={max(1, args.steps // 8)}", "train.lr_scheduler_type=cosine"]
            jobs.run(args.ranks, "-m", "hpcllm", "train", run_file, *settings, timeout_s=7200)
            records = jobs.metrics(output)
            steps = [record["step_s"] for record in records if "step_s" in record]
            print(f"\n{task}: {tokens} training tokens, {args.vocab_size} pieces, {args.ranks} ranks, {args.precision}")
            print(f"unigram entropy {entropy:.3f} nats; median step {np.median(steps):.3f} s; {jobs.versions()}\n")
            print("| step | tokens seen | validation loss | below unigram entropy | accuracy |\n|---|---|---|---|---|")
            for record in records:
                if "eval_loss" in record:
                    seen = record["step"] * 64 * 128
                    gain = entropy - record["eval_loss"]
                    score = f"{record['eval_loss']:.3f} | {gain:+.3f} | {record['eval_accuracy']:.3f}"
                    print(f"| {record['step']} | {seen} | {score} |", flush=True)


if __name__ == "__main__":
    main()
