"""Labelled text to shards, on all ranks of a job: find the labels, encode the examples, write, check, publish.

As `prepare`: who does what only decides how long it takes, the files are the same bytes at any number of ranks, and a
rank holds no more than a batch of examples and 16 bytes for each of its own. What the labels are is decided by the
training examples before anything is encoded; they are read twice.
"""

import dataclasses
import os
import shutil
import time
from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..errors import DataError, MissingInput, UsageError
from ..files import failing_as_io
from ..mpi import on_root, together
from . import encode, labelled, labels, scratch, spans, squad, text, turns
from .layout import write_lines, write_part
from .prepare import (
    TEST,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    Split,
    check_numbers,
    check_output,
    check_replaceable,
    tokenizer_on_all,
    use_own_cores,
)
from .tokenise import BATCH_CHARACTERS, fill, share

PARTS = (TRAIN, VALIDATION, TEST)


@dataclass(frozen=True)
class _Unit:
    """A text.Unit of a part of the data: "train" is split further where a validation fraction is asked for."""

    part: str
    text: text.Unit


def prepare_labelled(
    world,
    *,
    inputs,
    output,
    tokenizer,
    reading,
    validation=(),
    test=(),
    validation_fraction=0.0,
    given_labels=None,
    label_separator=",",
    max_tokens=512,
    truncation="cut",
    chat_template=None,
    stride=None,
    shard_tokens=1 << 28,
    overwrite=False,
):
    """Write `output`/train, /validation and /test (where there are such examples) and /tokenizer; collective.

    inputs, validation, test: paths and globs; tokenizer: a Hugging Face tokenizer folder, of the model to fine-tune;
    reading: labelled.Reading, which says of what kind labels are; given_labels: all names in order, None: those of the
    training examples; truncation: of encode.TRUNCATION; chat_template: see turns.choose; stride: see spans.Windows.
    Returns a summary (dict), the same on every rank. Raises a Refusal, the same on every rank, and then leaves nothing
    behind.
    """
    comm, kind, began = world.comm, reading.kind, time.monotonic()
    sources = {TRAIN: inputs, VALIDATION: validation, TEST: test}
    units = on_root(comm, _plan, sources, output, tokenizer, reading, validation_fraction, shard_tokens, overwrite)
    folder = on_root(comm, scratch.make, output)
    use_own_cores(world)
    try:
        encoder, facts = tokenizer_on_all(comm, folder, (tokenizer, None, None), None, None, None)
        mine = share([unit.text.weight for unit in units], comm.size)[comm.rank]
        ours = [units[index].text for index in mine if units[index].part == TRAIN]
        known = labels.find(comm, kind, ours, reading, label_separator, given_labels)
        template = None
        if kind == "turns":
            template = turns.Template(
                encoder, **on_root(comm, turns.choose, os.path.join(folder, TOKENIZER), chat_template)
            )
        with together(comm):
            encoding = encode.encoding(encoder, known, max_tokens, truncation, facts["separator_id"], template, stride)
        split = Split(validation_fraction)
        parts = [part for part in PARTS if sources[part] or part in split.parts]
        counts, names = {part: Counter() for part in parts}, {part: array("Q") for part in parts}

        def work(spool, progress):
            _encode_units(spool, units, mine, reading, encoding, split, progress, counts, names)

        how = encoding.columns, encoding.with_lines
        spool = fill(comm, folder, [unit.text for unit in units], parts, facts, work, *how)
        told = _check_counts(comm, counts, encoding, validation_fraction)
        if kind == "span":
            _refuse_twice(comm, names, [units[index] for index in mine], reading)
        meaning = {
            "kind": kind,
            "names": list(known.names),
            "chunks": known.chunks,
            "max_tokens": max_tokens,
            "truncation": truncation,
            "columns": [dataclasses.asdict(column) for column in encoding.columns],
            **encoding.says,
        }
        if kind == "span":  # which rules of SQuAD count
            meaning["version"] = 1 + any(told[part]["became"]["unanswerable"] for part in parts)
        manifests = {}
        for part in parts:
            said = {**meaning, **told[part]}
            if encoding.with_lines:
                said["text_bytes"] = write_lines(comm, folder, part, spool, len(units))
            labelled_facts = {**facts, "labelled": said}
            manifests[part] = write_part(comm, folder, part, spool, len(units), labelled_facts, shard_tokens)
        inputs = {unit.text.path for unit in units}
        on_root(comm, scratch.publish, folder, output, overwrite, lambda: check_replaceable(output, inputs))
    finally:
        if world.is_root:
            shutil.rmtree(folder, ignore_errors=True)
    summary = {"output": output, "tokenizer_hash": facts["tokenizer_hash"], "labels": list(known.names)}
    for part, manifest in manifests.items():
        numbers = {"examples": manifest["document_count"], "tokens": manifest["token_count"]}
        summary[part] = {**numbers, "digest": manifest["digest"], **told[part]}
    return {**summary, "ranks": comm.size, "seconds": round(time.monotonic() - began, 3)}


def _plan(sources, output, tokenizer, reading, validation_fraction, shard_tokens, overwrite):
    """Check all that can be checked without reading examples, and return the units of work."""
    check_numbers(validation_fraction, shard_tokens)
    if validation_fraction and sources[VALIDATION]:
        raise UsageError("give either validation files or a validation-fraction of the training examples")
    if tokenizer is None:
        raise UsageError("tokenizer: name the folder of the model to fine-tune, or of its tokenizer")
    if not os.path.isdir(tokenizer):
        raise MissingInput(f"tokenizer: there is no folder {tokenizer}")
    units, every = [], []
    for part, patterns in sources.items():
        paths = text.find_inputs(patterns)
        every += paths
        units += [_Unit(part, unit) for unit in labelled.cut(paths, reading)]
    check_output(output, every, overwrite)
    return units


def _encode_units(spool, units, mine, reading, encoding, split, progress, counts, names):
    done = 0
    for index in mine:
        unit, batch, characters = units[index], [], 0
        for example, position in labelled.examples(unit.text, reading):
            batch.append((example, unit.text))
            characters += sum(map(len, example.text)) + len(example.pair or "")
            if characters >= BATCH_CHARACTERS:
                _write(spool, batch, unit.part, encoding, split, counts, names)
                batch, characters = [], 0
                if not progress.advance(done + position, spool.tokens):
                    return
        _write(spool, batch, unit.part, encoding, split, counts, names)
        spool.end_unit(index)
        done += unit.text.stop - unit.text.start
        if not progress.advance(done, spool.tokens):
            return


def _write(spool, batch, part, encoding, split, counts, names):
    """Documents of a batch of examples to their parts. names: {part: keys of the questions that have names}."""
    dealt = {}
    for example, unit in batch:
        words = example.text if isinstance(example.text, str) else " ".join(example.text)
        to = split.part(words) if part == TRAIN else part
        dealt.setdefault(to, []).append((example, unit))
    for to, some in dealt.items():
        if encoding.labels.kind == "span":
            names[to].extend(example.label.key for example, _ in some if example.label.own)
        for ids, beside in encoding.documents(some, counts[to]):
            spool.example(to, ids, beside)


def _refuse_twice(comm, names, units, reading):
    """Raise DataError where two questions of a part have one name. units: of this rank."""

    def find(part, key):
        for unit in units:
            if unit.part == part or (unit.part, part) == (TRAIN, VALIDATION):  # held out of training data
                with failing_as_io(unit.text.path):
                    found = [example for example, _ in labelled.examples(unit.text, reading) if example.label.own]
                yield from ((str(each.label.name), unit.text.path) for each in found if each.label.key == key)

    for part, keys in names.items():
        squad.refuse_twice(comm, np.array(keys, np.uint64), lambda key, part=part: list(find(part, key)))


def _check_counts(comm, counts, encoding, validation_fraction):
    """{part: what became of its examples, and how often each label occurs}, of all ranks. Refuses an empty part."""
    everybody = comm.allgather(counts)
    told = {}
    for part in counts:
        total, longest = Counter(), 0
        for rank in everybody:
            longest = max(longest, rank[part].pop("longest", 0))
            total.update(rank[part])
        if not total["documents"]:
            read = f"{total['read']} were read, {total['empty']} of them empty, {total['dropped']} dropped"
            if validation_fraction and part in (TRAIN, VALIDATION):
                read += f"; validation-fraction is {validation_fraction}"
            raise DataError(f"input: no example is left for {part} ({read})").known_to_all()
        names = {name: total["label", number] for number, name in enumerate(encoding.labels.names)}
        became = {name: total[name] for name in encoding.counted}
        told[part] = {"became": {**became, "longest": longest}, "label_counts": names}
    return told


def table(summary):
    """The summary of `prepare_labelled` as text: what was read, dropped and cut, and the labels."""
    parts = [part for part in PARTS if part in summary]
    rows = [["examples read", *(summary[part]["became"]["read"] for part in parts)]]
    words = {
        "empty": "left out: empty",
        "dropped": "left out: too long",
        "cut": "cut: too long",
        "split": "split: too long",
        "wordless": "words without tokens, as unknown ones",
        "shortened": f"cut: questions of more than {spans.QUESTION_TOKENS} tokens",
        "unanswerable": "questions without an answer",
        "lost": "answers that are in no document",
        "longest": "tokens of the longest document",
    }
    became = [summary[part]["became"] for part in parts]
    rows += [[text, *(each[name] for each in became)] for name, text in words.items() if name in became[0]]
    rows += [["documents", *(summary[part]["examples"] for part in parts)]]
    rows += [[f"label {name}", *(summary[p]["label_counts"][name] for p in parts)] for name in summary["labels"]]
    left = max(len(row[0]) for row in rows)
    lines = [" " * left + "".join(f"{part:>12}" for part in parts)]
    return "\n".join(lines + [f"{row[0]:<{left}}" + "".join(f"{number:>12,}" for number in row[1:]) for row in rows])
