"""Small made-up questions about texts, which can be learnt: what is the one person, or the one place, in a text?"""

import json
import random

from small_labelled import MORE, WORDS

from hpcllm.data.labelled import Reading
from hpcllm.data.prepare_labelled import prepare_labelled

# Words that are a token each, and are in no text.
ASKED = {"fine": "person", "dull": "place"}


def questions(count, seed, missing=0.0, longest=8):
    """[{"id", "context", "question", "answers": [{"text", "answer_start"}]}], two about each text.

    missing: part of the questions that have no answer; longest: other words of a text.
    """
    draw, found = random.Random(seed), []
    while len(found) < count:
        words, answers = draw.choices(WORDS["O"], k=draw.randint(2, longest)), {}
        for word, kind in ASKED.items():
            if draw.random() >= missing:
                answers[word] = " ".join([draw.choice(WORDS[kind]), *draw.choices(MORE[kind], k=draw.randint(0, 1))])
                words.insert(draw.randint(0, len(words)), answers[word])
        context = " ".join(words)
        for word in ASKED:
            answer = answers.get(word)
            told = [{"text": answer, "answer_start": context.index(answer)}] * draw.randint(1, 2) if answer else []
            said = {"id": f"{seed}-{len(found)}", "context": context, "question": " ".join([word] * 4), "answers": told}
            found.append(said)
    return found[:count]


def articles(records):
    """The same as SQuAD has them."""
    paragraphs = []
    for record in records:
        if not paragraphs or paragraphs[-1]["context"] != record["context"]:
            paragraphs.append({"context": record["context"], "qas": []})
        told = {name: record[name] for name in ("id", "question", "answers") if name in record}
        paragraphs[-1]["qas"].append({**told, "is_impossible": not record["answers"]})
    several = [paragraphs[begin : begin + 3] for begin in range(0, len(paragraphs), 3)]
    return [{"title": f"number {number}", "paragraphs": some} for number, some in enumerate(several)]


def write_squad(path, records, **how):
    """how: of json.dumps"""
    path.write_text(json.dumps({"version": "v2.0", "data": articles(records)}, **how), encoding="utf-8")
    return path


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prepare(world, base, output, **how):
    """`prepare_labelled` of `base`'s SQuAD, by its tokenizer."""
    usual = {"inputs": [f"{base}/train.json"], "reading": Reading("span"), "truncation": "split", "max_tokens": 24}
    usual |= {"output": str(base / output), "tokenizer": str(base / "tokenizer")}
    return prepare_labelled(world, **usual | how)
