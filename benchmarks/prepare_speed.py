"""How fast is text made into shards? `hpcllm prepare` on 1 and more ranks, beside a bare loop of the tokenizer.

    python -m benchmarks.prepare_speed [--tokenizer DIR] [--megabytes 40] [--ranks 1 2]

The text is the corpus of `hpcllm.data.corpus` over and over, the tokenizer is there before; so only tokenising and
writing are timed. The bare loop is `encode_batch_fast` of the tokenizers library on the same documents, in as many
processes at once as there are ranks, each on all of them. Each rank has one core, as on a node that is full. Medians of
three rounds, in which all take turns; whether the shards of all rank counts are the same is checked by their digests.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from . import jobs


def bare(tokenizer, documents):
    """Tokens a second of the library alone, in batches of the size that `prepare` uses."""
    from tokenizers import Tokenizer

    from hpcllm.data.tokenise import BATCH_CHARACTERS

    encoder = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    began, tokens, batch, characters = time.perf_counter(), 0, [], 0
    for text in [*documents, None]:
        if text is not None:
            batch.append(text)
            characters += len(text)
        if batch and (text is None or characters >= BATCH_CHARACTERS):
            tokens += sum(len(e.ids) for e in encoder.encode_batch_fast(batch, add_special_tokens=False))
            batch, characters = [], 0
    return tokens / (time.perf_counter() - began)


def train_tokenizer(folder, documents):
    with open(folder / "once.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    made = ["--input", folder / "once.jsonl", "--jsonl-field", "text", "--output", folder / "once"]
    jobs.run(1, "-m", "hpcllm", "prepare", *made, "--vocab-size", 8000)
    return folder / "once" / "tokenizer"


@contextlib.contextmanager
def on_cores(count):
    """In this context, what is started has the first `count` cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", help="a folder that `hpcllm prepare` wrote; made from the text if left out")
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from hpcllm.data.corpus import collect

    documents, size = list(collect()), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repeated = []
        with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
            while size < args.megabytes * 1e6:
                for text in documents:
                    size += file.write(json.dumps({"text": text}) + "\n")
                    repeated.append(text)
        tokenizer = args.tokenizer or train_tokenizer(folder, documents)
        rates, digests = {}, set()
        for turn in range(args.rounds):
            for ranks in args.ranks:
                with on_cores(ranks):
                    with ProcessPoolExecutor(ranks) as pool:
                        alone = list(pool.map(bare, [tokenizer] * ranks, [repeated] * ranks))
                    output = folder / f"{turn}-{ranks}"
                    options = ["--jsonl-field", "text", "--tokenizer", tokenizer, "--output", output]
                    done = jobs.run(ranks, "-m", "hpcllm", "prepare", "--input", folder / "text.jsonl", *options)
                summary = json.loads(done.stdout[done.stdout.index("{") :])
                rates.setdefault(ranks, []).append((sum(alone), summary["tokens_per_s"]))
                digests.add(summary["train"]["digest"])
    print(f"{size / 1e6:.0f} MB, {jobs.versions()}; digests of the shards of all runs: {len(digests)} distinct")
    print("| ranks | hpcllm prepare, tokens/s | tokenizers alone, tokens/s | of that | times one rank |")
    print("|---:|---:|---:|---:|---:|")
    one = [ours for _, ours in rates[args.ranks[0]]]
    for ranks, found in rates.items():
        alone, ours = zip(*found, strict=True)
        parts, times = np.divide(ours, alone), np.divide(ours, one)
        jobs.record(f"hpcllm prepare, {ranks} ranks: tokenizers alone", parts)
        cells = [jobs.spread(ours, "{:,.0f}"), jobs.spread(alone, "{:,.0f}"), jobs.spread(parts), jobs.spread(times)]
        print(f"| {ranks} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
