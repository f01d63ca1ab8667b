"""Small labelled inputs: made-up sentences whose labels can be learnt, in every format and of every kind."""

import json
import random

from hpcllm.data import tokenizer
from hpcllm.data.labelled import Reading
from hpcllm.data.prepare_labelled import prepare_labelled

WORDS = {
    "O": [
        "the",
        "a",
        "of",
        "to",
        "sees",
        "near",
        "with",
        "and",
        "then",
        "walks",
        "reads",
        "builds",
        "under",
        "slowly",
        "never",
        "often",
    ],
    "person": ["anna", "bert", "clara", "dieter", "emma", "felix", "greta"],
    "place": ["paris", "rome", "oslo", "lima", "tunis", "quito"],
}
MORE = {"person": ["smith", "jones", "weber"], "place": ["city", "harbour"]}
GOOD, BAD = ["good", "fine", "lovely", "great"], ["bad", "poor", "awful", "dull"]
KINDS = ("single", "multi", "value", "tags")
LANGUAGE = ("text", "turns")  # whose answers are text


def sentences(count, seed):
    """[(words, IOB2 tags)]"""
    draw, found = random.Random(seed), []
    for _ in range(count):
        words, tags = [], []
        for _ in range(draw.choice((1, 2, 3, 5, 9, 14))):
            kind = draw.choice(("O", "O", "person", "place"))
            length = 1 if kind == "O" else draw.choice((1, 1, 2))
            words += [draw.choice(WORDS[kind]), *draw.choices(MORE.get(kind, [""]), k=length - 1)]
            tags += ["O"] if kind == "O" else [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]
        found.append((words, tags))
    return found


def record(kind, words, tags, draw):
    """A line of JSON of a kind of labels, and what a model can learn it from."""
    if kind == "tags":
        return {"tokens": words, "tags": tags}
    mood = draw.choice((GOOD, BAD))
    text = " ".join([draw.choice(mood), *words])  # first: the end of a long text is cut
    kinds = sorted({tag[2:] for tag in tags} - {""})
    if kind in LANGUAGE:
        answer = " ".join(["good" if mood is GOOD else "bad", *kinds])
        asked = {"role": "user", "content": text}, {"role": "assistant", "content": answer}
        again = {"role": "user", "content": "again"}, {"role": "assistant", "content": answer}
        return {"source": text, "target": answer} if kind == "text" else {"messages": [*asked, *again]}
    label = {"single": "good" if mood is GOOD else "bad", "multi": kinds, "value": len(kinds) + 0.5 * (mood is GOOD)}
    return {"text": text, "label": label[kind]}


def write(path, kind, count, seed):
    """JSON lines of `count` examples."""
    draw = random.Random(seed)
    lines = [json.dumps(record(kind, words, tags, draw)) for words, tags in sentences(count, seed)]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def reading(kind, **more):
    return Reading(kind, **more)


def write_tokenizer(folder, kind="wordpiece"):
    """A tokenizer of these words and little else; the folder."""
    texts = [" ".join([*words, *GOOD, *BAD]) for words, _ in sentences(60, 0)] * 2
    size = {"wordpiece": 140, "bpe": 320, "t5": 420}[kind]
    tokenizer.save(tokenizer.train(kind, size, lambda: iter(texts)), kind, str(folder))
    return folder


def prepare(world, base, output, kind, **how):
    """`prepare_labelled` of `base`'s JSON lines, by its tokenizer, as is usual for a kind of labels."""
    usual = {
        "inputs": [f"{base}/*.jsonl"],
        "reading": reading(kind),
        "truncation": "split" if kind == "tags" else "cut",
    }
    usual |= {"output": str(base / output), "tokenizer": str(base / "tokenizer")}
    return prepare_labelled(world, **usual | how)
