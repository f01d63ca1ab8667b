"""The data of a run: its shards as the samples of its task, checked against tokenizer, model and checkpoint."""

from typing import Any, NamedTuple

from . import model
from .config import Lora
from .data import batches, examples
from .errors import DataError
from .mpi import on_root, together
from .names import OF_EXAMPLES, OF_TEXT
from .tasks import TASKS


class Sources(NamedTuple):
    """What a run learns from, and what it is measured on (None: nothing); see `open_source`."""

    training: Any
    validation: Any
    test: Any


def open_all(config, world):
    """The Sources of a run file. Collective."""
    words = on_root(world.comm, read_tokenizer, config.data.tokenizer_dir, config.data.train)
    training = open_source(config, world, config.data.train, words)
    names = training.stream.labelled and examples.labels_of(training.stream)
    held_out = config.data.validation, config.data.test
    return Sources(training, *(folder and open_source(config, world, folder, words, names) for folder in held_out))


def read_tokenizer(folder, data=None):
    """(model.Vocabulary, hash, folder) of the tokenizer in `folder`. Root only: the others are told.

    data: the folder of shards that it is for, which is missed first where nothing was prepared.
    """
    from .data import shards, tokenizer

    if data is not None:
        shards.read_manifest(data)
    loaded = tokenizer.load(folder)
    return model.vocabulary(loaded), tokenizer.tokenizer_hash(loaded), folder


def open_source(config, world, folder, words, names=None):
    """The samples of the shards in `folder`, checked against task and tokenizer: a data.batches.Source of text or
    data.examples.Examples. Collective.

    words: what `read_tokenizer` returned; names: (kind, names) of the labels that these must have.
    """
    from .data import shards, tokenizer

    leave_out = config.data.quarantine and folder == config.data.train
    stream = shards.open_folder(folder, reader=config.data.reader, comm=world.comm, quarantine=leave_out)
    task = TASKS[config.model.task]
    vocabulary, tokenizer_hash, tokenizer_dir = words
    with together(world.comm):
        tokenizer.check_same(stream, tokenizer_dir, tokenizer_hash)
        task.check(vocabulary)
        if stream.labelled and config.model.task not in OF_EXAMPLES:
            raise DataError(f"data: {folder} holds labelled examples, {config.model.task} learns from text")
        if stream.labelled or config.model.task not in OF_TEXT:
            config.check_examples()
            return examples.open_part(stream, task, vocabulary, config, world.device, names)
        config.check_text()
        how = config.train.sequence_length, config.data.mlm_probability, config.run.seed, config.data.attention
        source = batches.Source(stream, task, vocabulary, *how)
        batches.require(source, 1, f"{folder}: a run needs at least")
    return source


def check_same_run(config, source, state):
    """Refuse to continue a run whose data, model or order the run file has changed since."""
    saved = state.get("config")
    if saved is None:
        return
    now = config.model_dump(exclude_none=True)
    fixed = (
        ("run", "seed"),
        ("model", "task"),
        ("model", "config"),
        ("train", "sequence_length"),
        ("train", "optimizer"),
        *(("lora", key) for key in Lora.model_fields),
    )
    for section, key in fixed:
        was, is_ = saved.get(section, {}).get(key), now.get(section, {}).get(key)
        if was != is_:
            raise DataError(f"--resume: {section}.{key} was {was} when the checkpoint was written and is {is_} now")
    if state["data_digest"] != source.stream.digest:
        raise DataError(
            f"--resume: the shards of {config.data.train} are not those of the checkpoint "
            f"(digest {source.stream.digest[:12]}, checkpoint {state['data_digest'][:12]})"
        )
