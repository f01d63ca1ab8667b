"""What the tasks of labelled data have in common."""

import numpy as np

from ..data.encode import NO_LABEL
from ..errors import DataError, UsageError


def require(meaning, kinds, task):
    """Raise DataError for data that have no labels, or labels of another kind than the task's."""
    if meaning is None:
        raise DataError(f"data: these shards are plain text, {task} needs labels: hpcllm prepare --task {task}")
    if meaning["kind"] not in kinds:
        raise DataError(
            f'data: these shards have labels of the kind "{meaning["kind"]}", {task} takes {", ".join(kinds)}'
        )


def named(names, count):
    """Names of labels as a model's configuration has them."""
    names = names or [f"LABEL_{number}" for number in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def inputs(given, labels, config):
    """The model's keyword arguments. given: those of the micro-batch."""
    return given


def target_fraction(data):
    """Fraction of the tokens that reach the output layer, at most."""
    return 1.0


# --- micro-batches -----------------------------------------------------------------------------------------------


def width(rows, examples):
    """Tokens that rows are filled up to: of the longest, rounded up as `examples` (data.examples.Examples) wants it."""
    longest = max(map(len, rows))
    return min(-(-longest // examples.multiple) * examples.multiple, max(longest, examples.sequence_length))


def padded(rows, examples, seconds=None):
    """{"input_ids", "attention_mask", "token_type_ids" where models get them: int64 [B, L]} of arrays of token ids.

    seconds: of each row, where its second text begins.
    """
    input_ids = np.full((len(rows), width(rows, examples)), examples.vocabulary.padding, np.int64)
    mask, segments = np.zeros_like(input_ids), np.zeros_like(input_ids)
    for row, tokens in enumerate(rows):
        input_ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        if seconds is not None:
            segments[row, seconds[row] : len(tokens)] = 1
    given = {"input_ids": input_ids, "attention_mask": mask}
    return {**given, "token_type_ids": segments} if examples.vocabulary.segments else given


def collate(labels):
    """The `collate` of a task whose `labels` are of texts, or of a text's tokens."""

    def collated(found, examples):
        seconds = [int(beside["second"][0]) for _, beside in found] if "second" in found[0][1] else None
        given = padded([tokens for tokens, _ in found], examples, seconds)
        return given, labels([beside["labels"] for _, beside in found], given["input_ids"].shape[1], examples.meaning)

    return collated


# --- targets that are tokens -------------------------------------------------------------------------------------


def words(targets, class_weights=None):
    """What the loss of a micro-batch is divided by: its tokens that are to be written."""
    return float((targets != NO_LABEL).sum())


def metrics_of_words(meaning):
    """Names of the numbers that an evaluation has beside the loss."""
    return ["perplexity", "accuracy"]


def check_loss_of_words(meaning, class_weights, label_smoothing):
    """Raise UsageError for what this loss has none of."""
    if class_weights is not None or label_smoothing:
        raise UsageError("train: class_weights and label_smoothing are for labels that have names, not for text")
