"""Labelled text to shards, on all ranks of a job: find the labels, encode the examples, write, check, publish.

As `prepare`: who does what only decides how long it takes, the files are the same bytes at any number of ranks, and a
rank holds no more than a batch of examples and 8 bytes for each of its own. What the labels are is decided by the
training examples before anything is encoded; they are read twice.
"""

import dataclasses
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass

from ..errors import DataError, MissingInput, UsageError
from ..mpi import on_root, together
from . import encode, labelled, labels, scratch, text, turns
from .layout import write_part
from .prepare import TEST, TRAIN, VALIDATION, Split, check_numbers, check_output, tokenizer_on_all, use_own_cores
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
    shard_tokens=1 << 28,
    overwrite=False,
):
    """Write `output`/train, /validation and /test (where there are such examples) and /tokenizer; collective.

    inputs, validation, test: paths and globs; tokenizer: a Hugging Face tokenizer folder, of the model to fine-tune;
    reading: labelled.Reading, which says of what kind labels are; given_labels: all names in order, None: those of the
    training examples; truncation: of encode.TRUNCATION; chat_template: see turns.choose. Returns a summary (dict), the
    same on every rank. Raises a Refusal, the same on every rank, and then leaves nothing behind.
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
            template = turns.Template(encoder, **on_root(comm, turns.choose, folder, chat_template))
        with together(comm):
            encoding = encode.encoding(encoder, known, max_tokens, truncation, facts["separator_id"], template)
        split = Split(validation_fraction)
        parts = [part for part in PARTS if sources[part] or part in split.parts]
        counts = {part: Counter() for part in parts}

        def work(spool, progress):
            _encode_units(spool, units, mine, reading, encoding, split, progress, counts)

        spool = fill(comm, folder, [unit.text for unit in units], parts, facts, work, encoding.columns)
        told = _check_counts(comm, counts, known, validation_fraction)
        meaning = {
            "kind": kind,
            "names": list(known.names),
            "chunks": known.chunks,
            "max_tokens": max_tokens,
            "truncation": truncation,
            "columns": [dataclasses.asdict(column) for column in encoding.columns],
        }
        manifests = {}
        for part in parts:
            labelled_facts = {**facts, "labelled": {**meaning, **told[part]}}
            manifests[part] = write_part(comm, folder, part, spool, len(units), labelled_facts, shard_tokens)
        on_root(comm, scratch.publish, folder, output, overwrite)
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
        for kind in {reading.by_paragraph(path) for path in paths}:
            some = [path for path in paths if reading.by_paragraph(path) == kind]
            units += [_Unit(part, unit) for unit in text.cut(some)]
    check_output(output, every, overwrite)
    return units


def _encode_units(spool, units, mine, reading, encoding, split, progress, counts):
    done = 0
    for index in mine:
        unit, batch, characters = units[index], [], 0
        for example, position in labelled.examples(unit.text, reading):
            batch.append((example, unit.text))
            characters += sum(map(len, example.text)) + len(example.pair or "")
            if characters >= BATCH_CHARACTERS:
                _write(spool, batch, unit.part, encoding, split, counts)
                batch, characters = [], 0
                if not progress.advance(done + position, spool.tokens):
                    return
        _write(spool, batch, unit.part, encoding, split, counts)
        spool.end_unit(index)
        done += unit.text.stop - unit.text.start
        if not progress.advance(done, spool.tokens):
            return


def _write(spool, batch, part, encoding, split, counts):
    """Documents of a batch of examples to their parts."""
    dealt = {}
    for example, unit in batch:
        words = example.text if isinstance(example.text, str) else " ".join(example.text)
        to = split.part(words) if part == TRAIN else part
        dealt.setdefault(to, []).append((example, unit))
    for to, some in dealt.items():
        for ids, beside in encoding.documents(some, counts[to]):
            spool.example(to, ids, beside)


def _check_counts(comm, counts, known, validation_fraction):
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
        names = {name: total["label", number] for number, name in enumerate(known.names)}
        told[part] = {"became": {**encode.summary(total), "longest": longest}, "label_counts": names}
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
        "longest": "tokens of the longest document",
    }
    rows += [[text, *(summary[part]["became"][name] for part in parts)] for name, text in words.items()]
    rows += [["documents", *(summary[part]["examples"] for part in parts)]]
    rows += [[f"label {name}", *(summary[p]["label_counts"][name] for p in parts)] for name in summary["labels"]]
    left = max(len(row[0]) for row in rows)
    lines = [" " * left + "".join(f"{part:>12}" for part in parts)]
    return "\n".join(lines + [f"{row[0]:<{left}}" + "".join(f"{number:>12,}" for number in row[1:]) for row in rows])
