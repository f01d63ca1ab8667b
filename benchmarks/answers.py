"""Do models that answer in words learn to, and the same at any number of ranks? Sentiment, as text to text and in talk.

    python -m benchmarks.answers --data DIR [--steps 600] [--ranks 1 2] [--task seq2seq_lm dialogue]

DIR holds SST-2: train.tsv and test.tsv (sentence TAB 0 or 1). A small T5 reads "sentiment: <sentence>" and writes
"good" or "bad", as in Raffel et al. 2020, appendix D; a small Llama is asked "Is this good or bad? <sentence>" and
replies so. Both start at random, with a tokenizer of the training sentences, and see each sentence a few times.
Printed: of what is written freely, how much is exactly right (`hpcllm predict --reference-column`), and the loss of the
right answers, before and after training; and how far the losses of the first 50 steps lie apart, relatively, at other
numbers of ranks than the first (later ones by what rounding has grown to).
"""

import argparse
import json
import tempfile
from pathlib import Path

from . import jobs

WORDS = ("bad", "good")
MODELS = {
    "seq2seq_lm": {"model_type": "t5", "d_model": 128, "d_ff": 256, "d_kv": 32, "num_layers": 2, "num_heads": 4},
    "dialogue": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}
KINDS = {"seq2seq_lm": "t5", "dialogue": "bpe"}


def examples(file, task):
    """Lines of JSON, with the wanted answer as "target"."""
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        sentence, label = line.rsplit("\t", 1)
        answer = WORDS[int(label)]
        if task == "seq2seq_lm":
            yield {"source": f"sentiment: {sentence}", "target": answer}
        else:
            asked = {"role": "user", "content": f"Is this good or bad? {sentence}"}
            yield {"messages": [asked, {"role": "assistant", "content": answer}], "target": answer}


def write(folder, data, task):
    """The files and shards of a task in `folder`."""
    for part in ("train", "test"):
        rows = list(examples(Path(data) / f"{part}.tsv", task))
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for row in rows:  # what is asked, without the answer
            row["messages"] = row.get("messages", [None])[:1]
        (folder / f"{part}-asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [json.dumps({"text": " ".join(map(str, row.values()))}) for row in examples(Path(data) / "train.tsv", task)]
    (folder / "text.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    made = ["--input", folder / "text.jsonl", "--jsonl-field", "text", "--output", folder / "text"]
    jobs.run(1, "-m", "hpcllm", "prepare", *made, "--tokenizer-kind", KINDS[task], "--vocab-size", 4000)
    told = ["--task", task, "--tokenizer", folder / "text" / "tokenizer", "--max-tokens", 128]
    told += ["--input", folder / "train.jsonl", "--test", folder / "test.jsonl", "--output", folder / "data"]
    jobs.run(1, "-m", "hpcllm", "prepare", *told, *(["--chat-template", "plain"] if task == "dialogue" else []))


def train(folder, task, ranks, steps, rate):
    """(losses of the steps, loss of the test set, percent of its answers that are exactly right)."""
    records = jobs.train(
        ranks,
        folder,
        data={"train": str(folder / "data" / "train"), "test": str(folder / "data" / "test")},
        model={
            "task": task,
            "config": {**MODELS[task], "max_position_embeddings": 256} if task == "dialogue" else MODELS[task],
        },
        train={
            "max_steps": steps,
            "global_batch_size": 32,
            "micro_batch_size": 8,
            "sequence_length": 128,
            "learning_rate": rate,
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
        },
    )
    results = json.loads((folder / "run" / "results.json").read_text())
    asked = ["--input", folder / "test-asked.jsonl", "--output", folder / "answers.jsonl", "--overwrite"]
    asked += ["--reference-column", "target", "--max-new-tokens", 4]
    asked += ["--text-column", "source"] if task == "seq2seq_lm" else []
    done = jobs.run(ranks, "-m", "hpcllm", "predict", folder / "run", *asked)
    told = json.loads(done.stdout[done.stdout.index("{\n") :])
    return (
        [record["loss"] for record in records if "loss" in record],
        results["test_loss"],
        told["scores"]["exact_match"],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--task", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    print(f"{jobs.versions()}; {args.steps} steps of 32 examples\n")
    print("| task | ranks | exactly right, % | loss of the right answers | 50 losses from the first's, largest |")
    print("|---|---:|---:|---:|---:|")
    for task in args.task:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder, args.data, task)
            _, loss, right = train(folder, task, 1, 1, 1e-12)
            print(f"| {task}, not trained | 1 | {right:.1f} | {loss:.4f} | |", flush=True)
            first = None
            for ranks in args.ranks:
                losses, loss, right = train(folder, task, ranks, args.steps, args.rate)
                first = first or losses
                apart = max(abs(a - b) / abs(a) for a, b in zip(first[:50], losses[:50], strict=True))
                print(f"| {task} | {ranks} | {right:.1f} | {loss:.4f} | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    main()
