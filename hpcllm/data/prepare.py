"""Text to shards, on all ranks of a job: train or load a tokenizer, tokenise, lay out, write, check, publish.

Every decision (units, validation split, shard borders) is a function of the input alone, so the files are the same
bytes for any number of ranks; who does what only decides how long it takes. Memory is bounded by the longest
document and by 8 bytes a document. The steps are in `text`, `tokenizer`, `tokenise`, `layout` and `scratch`; this
file puts them in order.
"""

import hashlib
import os
import shutil
import sys
import time

from ..errors import CannotCreate, DataError, UsageError
from ..files import failing_as_io, sync_files
from ..mpi import agree, on_root, together
from . import scratch, shards, text, tokenizer
from .layout import write_part
from .progress import meet
from .tokenise import pieces, tokenise

TRAIN, VALIDATION, TEST, TOKENIZER = "train", "validation", "test", "tokenizer"


def prepare(
    world,
    *,
    inputs,
    output,
    tokenizer=None,
    tokenizer_kind="wordpiece",
    vocab_size=30522,
    jsonl_field=None,
    document_separator="newline",
    validation_fraction=0.0,
    shard_tokens=1 << 28,
    overwrite=False,
):
    """Write `output`/train, `output`/validation (when a fraction is asked for) and `output`/tokenizer; collective.

    inputs: paths and globs. tokenizer: a Hugging Face tokenizer folder; None trains one of tokenizer_kind.
    document_separator: "newline" or "blank-line", for plain text. shard_tokens: a shard ends with the
    document in which it reaches a multiple of this; no document is divided.
    Returns a summary (dict), the same on every rank.
    Raises a Refusal, the same on every rank, and then leaves nothing behind.
    """
    comm, began = world.comm, time.monotonic()
    reading = {"jsonl_field": jsonl_field, "document_separator": document_separator}
    units = on_root(comm, _plan, inputs, output, reading, validation_fraction, shard_tokens, overwrite)
    folder = on_root(comm, scratch.make, output)
    use_own_cores(world)
    try:
        split = Split(validation_fraction)
        choice = (tokenizer, tokenizer_kind, vocab_size)
        encoder, facts = tokenizer_on_all(comm, folder, choice, units, reading, split)
        spool = tokenise(comm, folder, units, reading, encoder, facts, split)
        counts = _check_counts(comm, spool, split)
        manifests = {
            part: write_part(comm, folder, part, spool, len(units), facts, shard_tokens) for part in split.parts
        }
        inputs = {unit.path for unit in units}
        on_root(comm, scratch.publish, folder, output, overwrite, lambda: check_replaceable(output, inputs))
    finally:
        # Where all is well the folder has its new name. On a refusal every rank arrives here at the same time.
        if world.is_root:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - began
    tokens = sum(manifest["token_count"] for manifest in manifests.values())
    summary = {"output": output, "tokenizer_hash": facts["tokenizer_hash"], "vocab_size": facts["vocab_size"]}
    for part, manifest in manifests.items():
        summary[part] = {key: manifest[key] for key in ("token_count", "document_count", "digest")}
        summary[part]["shards"] = len(manifest["shards"])
    return {
        **summary,
        "empty_documents_skipped": counts["empty"],
        "ranks": comm.size,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds),
    }


# --- before work starts ------------------------------------------------------------------------------------------


def _plan(inputs, output, reading, validation_fraction, shard_tokens, overwrite):
    """Check all that can be checked without reading the text, and return the units of work."""
    check_numbers(validation_fraction, shard_tokens)
    paths = text.find_inputs(inputs)
    text.check_format(paths, **reading)
    check_output(output, paths, overwrite)
    return text.cut(paths)


def check_numbers(validation_fraction, shard_tokens):
    """Raise UsageError for numbers that mean nothing."""
    if not 0 <= validation_fraction < 1:
        raise UsageError(f"validation-fraction: {validation_fraction} is not at least 0 and below 1")
    if shard_tokens < 1:
        raise UsageError(f"shard-tokens: {shard_tokens} is not a positive number")


def check_output(output, paths, overwrite):
    """Refuse an output that is in the way, and tell of what killed runs have left beside it. paths: of the input."""
    if os.path.lexists(output):
        if not overwrite:
            raise CannotCreate(f"output: {output} exists; give another name or --overwrite")
        check_replaceable(output, paths)
    for left in scratch.leftovers(output):
        print(f"prepare: {left} is of a run that was killed, or of one at work; delete it if none is", file=sys.stderr)


def check_replaceable(output, paths):
    """Refuse to overwrite anything but what an earlier `prepare` wrote, or to delete the input with it."""
    if os.path.islink(output) or not os.path.isdir(output):
        raise CannotCreate(f"output: {output} is not a folder that can be overwritten")
    strangers = sorted(set(os.listdir(output)) - {TRAIN, VALIDATION, TEST, TOKENIZER})
    if strangers:
        listed = ", ".join(strangers[:5])
        raise CannotCreate(f"output: {output} also holds {listed}; --overwrite would delete what prepare did not write")
    if os.listdir(output) and not os.path.isfile(os.path.join(output, TRAIN, shards.MANIFEST)):
        raise CannotCreate(f"output: {output} is not a folder that prepare wrote, so --overwrite leaves it alone")
    inside = os.path.realpath(output) + os.sep
    for path in paths:
        if os.path.realpath(path).startswith(inside):
            raise CannotCreate(f"output: --overwrite would delete the input {path}")


def use_own_cores(world):
    """Let the tokenizers library use the cores of this rank, divided by the ranks of the host that share them."""
    cores = world.own_cores()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if cores > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(cores)


class Split:
    """Which part a document belongs to: a function of its text, so equal documents fall on one side."""

    def __init__(self, validation_fraction):
        self.fraction = validation_fraction
        self.parts = (TRAIN, VALIDATION) if validation_fraction > 0 else (TRAIN,)
        self._border = int(validation_fraction * 2**64)

    def part(self, document):
        if len(self.parts) == 1:
            return TRAIN
        digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
        return VALIDATION if int.from_bytes(digest, "little") < self._border else TRAIN


# --- the tokenizer -----------------------------------------------------------------------------------------------


def tokenizer_on_all(comm, folder, choice, units, reading, split):
    """Load or train the tokenizer on root, save it in `folder`; returns (its encoder, facts) on every rank."""
    made = None
    with together(comm):
        try:
            if comm.rank == 0:
                made = _make_tokenizer(folder, choice, units, reading, split)
        finally:
            meet(comm)  # training takes a while, in which the other ranks leave their cores to root
    serialised, facts = comm.bcast(made, root=0)
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(serialised)
    encoder.no_truncation()
    encoder.no_padding()
    # A document that spells [MASK] or <|endoftext|> is text about tokens, not the token.
    encoder.encode_special_tokens = True
    return encoder, facts


def _make_tokenizer(folder, choice, units, reading, split):
    given, kind, vocab_size = choice
    target = os.path.join(folder, TOKENIZER)
    with failing_as_io(target):
        if given is None:
            tokenizer.save(tokenizer.train(kind, vocab_size, lambda: sample(units, reading, split)), kind, target)
        else:
            tokenizer.load(given).save_pretrained(target)
        made = tokenizer.load(target)
        if given is not None and tokenizer.tokenizer_hash(made) != tokenizer.folder_hash(given):
            raise DataError(f"tokenizer: {given} becomes another tokenizer when transformers saves it")
        sync_files(target)
    facts = {
        # Ids may have gaps, so the vocabulary is as large as its highest id asks for, not its number of entries.
        "vocab_size": max(made.get_vocab().values()) + 1,
        "separator_id": tokenizer.separator_id(made, given or target),
        "tokenizer_hash": tokenizer.tokenizer_hash(made),
    }
    return made.backend_tokenizer.to_str(), facts


def sample(units, reading, split, limit_bytes=1 << 30):
    """Yield training documents for the tokenizer: about `limit_bytes` of text, from the start of every unit alike."""
    total = sum(unit.weight for unit in units)
    for unit in units:
        left = unit.weight * min(1.0, limit_bytes / total) if total > limit_bytes else float("inf")
        for document, _ in text.documents(unit, **reading):
            if split.part(document) == TRAIN:
                yield from pieces(document)
            left -= len(document)
            if left <= 0:
                break


def _check_counts(comm, spool, split):
    """Refuse a part without documents; returns the numbers of all ranks together."""
    mine = {part: sum(len(lengths) for *_, lengths in spool.units[part].values()) for part in split.parts}
    total = {part: comm.allreduce(count) for part, count in mine.items()}
    total["empty"] = comm.allreduce(spool.empty)
    documents = sum(total[part] for part in split.parts)
    error = None
    if documents == 0:
        blank = f" ({total['empty']} of blanks only)" if total["empty"] else ""
        error = DataError(f"input: there is no document in it{blank}")
    elif VALIDATION in split.parts and 0 in (total[TRAIN], total[VALIDATION]):
        part = TRAIN if total[TRAIN] == 0 else VALIDATION
        error = DataError(
            f"validation-fraction: {split.fraction} of {documents} documents leaves none for {part}; "
            f"give more documents or another fraction"
        )
    agree(comm, error)
    return total
