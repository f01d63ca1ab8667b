"""A label for each word: named entities, parts of speech, chunks.

As in Devlin et al. 2019, section 5.3: a layer on what the model says of each word's first token; cross entropy.
"""

from itertools import pairwise

import numpy as np
import torch
from torch.nn import functional

from ..data.encode import NO_LABEL
from ..metrics import classes, entities
from . import labelled

KINDS = ("tags",)


def model_class():
    """The transformers class that builds and loads models for this task."""
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification


def check(vocabulary):
    """Any tokenizer will do."""


def head(meaning):
    """What a model's configuration says of its labels, {argument: value}; meaning: of the data (data.labels)."""
    labelled.require(meaning, KINDS, "token_classification")
    return labelled.named(meaning["names"], len(meaning["names"]))


def labels(columns, width, meaning):
    """Targets of a micro-batch from its examples' columns: int64 [B, width], -100 where there is no label."""
    found = np.full((len(columns), width), NO_LABEL, np.int64)
    for row, column in enumerate(columns):
        found[row, : len(column)] = column
    return found


def weight(targets, class_weights):
    """What the loss of a micro-batch is divided by: its words, each as its class weighs."""
    targets = targets[targets != NO_LABEL]
    return float(len(targets) if class_weights is None else class_weights[targets].double().sum())


collate, inputs, target_fraction = labelled.collate(labels), labelled.inputs, labelled.target_fraction


def loss_sum(model, given, targets, score=False, *, class_weights=None, label_smoothing=0.0):
    """(sum of the words' losses, with `score` the number of the likeliest tag of each token, int64 [B, L]: else None).

    class_weights: float32 [tags]; label_smoothing: of Szegedy et al. 2016.
    """
    logits = model(**given).logits.float()
    rows = (targets.flatten() != NO_LABEL).nonzero().squeeze(1)
    of_words, wanted = logits.flatten(0, 1).index_select(0, rows), targets.flatten().index_select(0, rows)
    how = {"weight": class_weights, "label_smoothing": label_smoothing, "reduction": "sum"}
    return functional.cross_entropy(of_words, wanted, **how), logits.argmax(-1) if score else None


def answers(batch, found, examples):
    """[(right, found)] of each example of a micro-batch: int16 arrays of its words' tags."""
    words = batch.labels != NO_LABEL
    counts = words.sum(1).tolist()
    right, found = (of[words].to(torch.int16).split(counts) for of in (batch.labels, found))
    return [(one.numpy(), other.numpy()) for one, other in zip(right, found, strict=True)]


def whole(answers, examples):
    """Of the answers of all examples (data.examples.Examples) those of whole sentences, split ones being joined."""
    return [tuple(map(np.concatenate, zip(*answers[a:b], strict=True))) for a, b in pairwise(examples.borders.tolist())]


def scores(answers, meaning):
    """({metric: number}, text tables, confusion matrix) of all sentences' answers, in the sentences' order.

    Of entities precision, recall and F1 count whole ones, as conlleval does; the tables are seqeval's, a row a type of
    entity, and sklearn's, a row a tag. Of other tags they count words.
    """
    names = np.array(meaning["names"])
    right, found = (np.concatenate(side) for side in zip(*answers, strict=True))
    matrix = classes.confusion(right, found, len(names))
    tags = classes.report(matrix, meaning["names"])
    if not meaning["chunks"]:
        return classes.scores(matrix), tags, matrix
    right, found = ([names[one].tolist() for one in side] for side in zip(*answers, strict=True))
    counts = entities.count(right, found)
    text = f"entities\n\n{entities.report(counts)}\n\ntags of words\n\n{tags}"
    return entities.scores(counts), text, matrix


def metrics(meaning):
    """Names of the numbers in `scores`."""
    return list(scores([(np.zeros(1, np.int16), np.zeros(1, np.int16))], meaning)[0])


def check_loss(meaning, class_weights, label_smoothing):
    """Tags take both."""
