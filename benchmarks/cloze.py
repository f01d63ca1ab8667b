"""Questions made from running text, in SQuAD's format, where there are none: which name fits a gap?

    python -m benchmarks.cloze --input wiki.txt [...] --output DIR [--missing 0.3] [--seed 1]

Of each paragraph (a line) a sentence is taken out and a name in it, which occurs elsewhere in the paragraph, becomes a
gap, "[gap]": that is the question. The rest is the text, in which the name is the answer (Hermann et al. 2015, arXiv
1506.03340, make theirs from news alike). With --missing a part of the texts lose all sentences with the name, and the
question has no answer. DIR gets train.json, validation.json and test.json: 8, 1 and 1 of ten articles, which headings
like " = Title = " begin (or paragraphs, where there are no headings). The same input makes the same files.
"""

import argparse
import json
import random
import re
from pathlib import Path

_HEADING = re.compile(r"\s*= ([^=].*) =\s*")
_SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z\"])")
# Capitalised words one after the other that do not begin a sentence.
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][\w'-]+(?: [A-Z][\w'-]+)*")
_LEAST_SENTENCES, _MOST_WORDS = 4, 40  # of a text, of a question


def articles(lines):
    """[(title, [paragraphs])]"""
    found = []
    for line in map(str.strip, lines):
        heading = _HEADING.fullmatch(line)
        if heading or not found:
            found.append((heading[1] if heading else "", []))
        if line and not line.startswith("="):
            found[-1][1].append(line)
    return found


def ask(paragraph, draw, missing):
    """(text, question, answer, first character in the text or None) of a paragraph, None where it has no name twice."""
    sentences = _SENTENCE.split(paragraph)
    if len(sentences) < _LEAST_SENTENCES:
        return None
    able = []
    for number, sentence in enumerate(sentences):
        if len(sentence.split()) > _MOST_WORDS:
            continue
        rest = " ".join(sentences[:number] + sentences[number + 1 :])
        names = set(_NAME.findall(sentence))
        able += [(number, name) for name in sorted(names) if re.search(rf"\b{re.escape(name)}\b", rest)]
    if not able:
        return None
    number, name = draw.choice(able)
    whole = re.compile(rf"\b{re.escape(name)}\b")
    question = whole.sub("[gap]", sentences[number])
    rest = sentences[:number] + sentences[number + 1 :]
    if draw.random() < missing:
        rest = [sentence for sentence in rest if not whole.search(sentence)]
    text = " ".join(rest)
    found = whole.search(text)
    return (text, question, name, found and found.start()) if text else None


def squad(some, draw, missing):
    """The articles (title, paragraphs) with a question for each paragraph that makes one, as SQuAD has them."""
    told = []
    for title, paragraphs in some:
        asked = [(number, ask(paragraph, draw, missing)) for number, paragraph in enumerate(paragraphs)]
        made = []
        for number, (text, question, name, start) in ((number, one) for number, one in asked if one):
            answers = [] if start is None else [{"text": name, "answer_start": start}]
            record = {"id": f"{len(told)}-{number}", "question": question, "answers": answers}
            made.append({"context": text, "qas": [{**record, "is_impossible": not answers}]})
        if made:
            told.append({"title": title, "paragraphs": made})
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text, a paragraph a line")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument(
        "--missing", type=float, default=0.0, metavar="F", help="part of the questions without an answer"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    found = []
    for file in args.input:
        with open(file, encoding="utf-8") as lines:
            found += articles(lines)
    if len(found) < 10:
        found = [(f"{title} {number}", [one]) for title, some in found for number, one in enumerate(some)]
    draw, folder = random.Random(args.seed), Path(args.output)
    draw.shuffle(found)
    folder.mkdir(parents=True, exist_ok=True)
    borders = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}
    for part, (begin, end) in borders.items():
        some = [one for number, one in enumerate(found) if begin <= number % 10 < end]
        told = squad(some, draw, args.missing)
        (folder / f"{part}.json").write_text(json.dumps({"version": "cloze", "data": told}), encoding="utf-8")
        count = sum(len(one["paragraphs"]) for one in told)
        print(f"{part}: {count} questions about {len(told)} articles")


if __name__ == "__main__":
    main()
