"""How many tokens that are no padding does a BERT learn from in a second? hpcllm beside the Hugging Face Trainer.

    python -m benchmarks.masked_lm_speed [--input wiki.valid.txt wiki.test.txt] [--lengths 512 128] [--rounds 5]

masked_lm on one core (4 layers, 512 hidden, vocabulary 30,522, dropout as it comes, bf16, AdamW), 2048 tokens a step,
padding included. Documents are the sections of a text with headings as WikiText has them (" = = Name = = "), or made-up
words in documents of the same lengths. All see the same documents:

    hpcllm        `hpcllm train` from its shards, data.attention = "document": no padding
    padded        one document, or piece of one, a row, padded to the full length (run_mlm.py --line_by_line)
    grouped       the same, rows of about the same length together, padded to the longest of a step
    concatenated  rows full of text that attend across documents (run_mlm.py as it comes): no padding, another model

Every round runs all of them, each in a process of its own, one after the other; peers with the C library's allocator as
it comes and ("kept") with the setting that hpcllm makes. A step is timed from the end of the one before, so the data
path is in it. A round's rate: tokens of all timed steps by their seconds, and the best single step's; ratios are of
one round, medians over rounds (smallest to largest). Peers' batches are samples, evenly spread by length, of those that
the Trainer would make. benchmarks/requirements.txt lists what peers need.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from . import jobs

TOKENS = 2048
MODEL = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 30522,
}
RATE = 1e-4
KEPT = jobs.KEEP | {"THP_MEM_ALLOC_ENABLE": "1"}
WAYS = ["hpcllm", "padded", "padded, kept", "grouped", "grouped, kept", "concatenated, kept"]


def documents(paths):
    """Sections of texts with headings; without a text, made-up ones whose lengths have the same mean and spread."""
    if paths:
        lines = [line for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
        found = [[]]
        for line in lines:
            if re.fullmatch(r" (= )+[^=].* (= )+", line):
                found.append([])
            if line.strip():
                found[-1].append(line.strip())
        return ["\n".join(section) for section in found if len(section) > 1]
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    words = ["".join(draw.choice(letters, draw.integers(2, 9))) for _ in range(20_000)]
    lengths = draw.lognormal(5.66, 0.87, 1150).astype(int) + 5
    return [" ".join(words[i] for i in np.minimum(draw.zipf(1.3, n), 20_000) - 1) for n in lengths]


def prepare(folder, texts, words=MODEL["vocab_size"]):
    """Shards and a tokenizer of `words` word pieces, in `folder`/data."""
    with open(f"{folder}/text.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    make = ["--input", f"{folder}/text.jsonl", "--jsonl-field", "text", "--output", f"{folder}/data"]
    jobs.run(1, "-m", "hpcllm", "prepare", *make, "--tokenizer-kind", "wordpiece", "--vocab-size", words)


# --- hpcllm ------------------------------------------------------------------------------------------------------


def train_hpcllm(folder, length, warm, steps, seed):
    """[(tokens that are no padding, seconds)] of the timed steps."""
    width = TOKENS // length
    records = jobs.train(
        1,
        folder,
        run={"seed": seed},
        data={"train": f"{folder}/data/train", "attention": "document"},
        model={
            "task": "masked_lm",
            "config": {"model_type": "bert", **MODEL, "max_position_embeddings": length},
        },
        train={
            "max_steps": warm + steps,
            "global_batch_size": width,
            "micro_batch_size": width,
            "sequence_length": length,
            "learning_rate": RATE,
            "precision": "bf16",
            "device": "cpu",
        },
    )
    taken = [record["step_s"] for record in records if "step_s" in record]
    return [(TOKENS, seconds) for seconds in taken[warm:]]


# --- peers -------------------------------------------------------------------------------------------------------


def pieces(folder, length, special=True, concatenated=False):
    """(tokenizer, rows of token ids): documents cut to `length`, each piece between [CLS] and [SEP] if `special`, else
    with the separator that ends a document."""
    import h5py
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(f"{folder}/data/tokenizer", local_files_only=True)
    texts = []
    for path in sorted(Path(f"{folder}/data/train").glob("*.h5")):
        with h5py.File(path, "r") as file:
            borders, tokens = file["document_offsets"][:], file["tokens"][:].astype(np.int64)
        texts += [tokens[start : stop - special].tolist() for start, stop in itertools.pairwise(borders)]
    if concatenated:
        texts = [[token for text in texts for token in [*text, words.sep_token_id]]]
    taken = length - 2 * special
    cut = [text[start : start + taken] for text in texts for start in range(0, len(text), taken)]
    return words, [[words.cls_token_id, *piece, words.sep_token_id] if special else piece for piece in cut]


def rows(folder, way, length, seed):
    """Rows of token ids, special tokens included, in the order of the way's steps."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    words, cut = pieces(folder, length, concatenated=way == "concatenated")
    width, draw = TOKENS // length, np.random.default_rng(seed)
    if way == "grouped":
        import torch

        lengths = [len(piece) for piece in cut]
        shuffle = torch.Generator().manual_seed(seed)
        order = list(LengthGroupedSampler(width, lengths=lengths, generator=shuffle))
    else:
        order = draw.permutation(len(cut)).tolist()
    return words, [[cut[i] for i in order[at : at + width]] for at in range(0, len(cut) - width + 1, width)]


def spread(batches, count, seed):
    """`count` of the batches, evenly spread by their tokens, in any order."""
    batches = sorted(batches, key=lambda batch: sum(map(len, batch)))
    chosen = [batches[int((number + 0.5) * len(batches) / count)] for number in range(count)]
    return [chosen[number] for number in np.random.default_rng(seed).permutation(count)]


def train_peer(folder, way, length, warm, steps, seed):
    """As train_hpcllm, in this process."""
    import torch
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    torch.set_num_threads(1)
    words, batches = rows(folder, way, length, seed)
    batches = spread(batches, warm, seed) + spread(batches, steps, seed)
    samples = [{"input_ids": row} for batch in batches for row in batch]
    if way == "padded":
        samples = [words.pad(sample, padding="max_length", max_length=length) for sample in samples]
    collate, counts, ends = DataCollatorForLanguageModeling(words, mlm_probability=0.15), [], []

    def counted(batch):
        made = collate(batch)
        counts.append(int((made["input_ids"] != words.pad_token_id).sum()))
        return made

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    torch.manual_seed(seed)
    trainer = Trainer(
        model=BertForMaskedLM(BertConfig(**MODEL, max_position_embeddings=length, pad_token_id=words.pad_token_id)),
        args=TrainingArguments(
            output_dir=f"{folder}/peer",
            per_device_train_batch_size=TOKENS // length,
            max_steps=warm + steps,
            learning_rate=RATE,
            weight_decay=0.01,
            bf16=True,
            use_cpu=True,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=samples,
        data_collator=counted,
        callbacks=[Clock()],
    )
    trainer.train()
    taken = np.diff(ends)[warm - 1 :].tolist()
    return list(zip(counts[warm:], taken, strict=False))


# --- side by side ------------------------------------------------------------------------------------------------


def measure(folder, way, length, warm, steps, seed):
    if way == "hpcllm":
        return train_hpcllm(folder, length, warm, steps, seed)
    name, kept = way.split(",")[0], "kept" in way
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(KEPT if kept else {})}
    child = [sys.executable, "-m", "benchmarks.masked_lm_speed", "--child", folder, name]
    done = subprocess.run(
        [*child, *map(str, (length, warm, steps, seed))], env=env, capture_output=True, text=True, cwd=jobs.ROOT
    )
    if done.returncode:
        sys.exit(f"{way}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rates(steps):
    """(tokens a second of all steps, of the best one)."""
    tokens, seconds = np.array(steps).T
    return tokens.sum() / seconds.sum(), (tokens / seconds).max()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", help="texts with headings; made up if left out")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, way, *numbers = args.child
        print(json.dumps(train_peer(folder, way, *map(int, numbers))))
        return
    print(f"{jobs.versions()}; {args.rounds} rounds of {args.steps} timed steps, {TOKENS} tokens each, one thread\n")
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder, documents(args.input))
        for length in args.lengths:
            found = {way: [] for way in args.ways}
            for turn in range(args.rounds):
                for way in args.ways:
                    found[way].append(measure(folder, way, length, args.warm, args.steps, 1 + turn))
            ours = np.array([rates(steps) for steps in found["hpcllm"]])
            print(f"| S {length} | rows without padding | tokens/s | best step | hpcllm's, times | of best steps |")
            print("|---|---:|---:|---:|---:|---:|")
            for way, all_steps in found.items():
                theirs = np.array([rates(steps) for steps in all_steps])
                # What a step has room for is known of all but the grouped, which have less of it.
                share = np.mean([tokens for steps in all_steps for tokens, _ in steps]) / TOKENS
                full = "" if way.startswith("grouped") else f"{share:.0%}"
                ratios = [jobs.spread(column) for column in (ours / theirs).T]
                if way != "hpcllm":
                    jobs.record(f"masked_lm, useful tokens/s, S {length}: {way}", (ours / theirs).T[0])
                numbers = [jobs.spread(column, "{:.0f}") for column in theirs.T]
                print(f"| {way} | {full} | {' | '.join(numbers + ratios)} |", flush=True)
            print()


if __name__ == "__main__":
    main()
