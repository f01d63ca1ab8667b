"""A label for a text, or for a pair of texts: one name of several, any of several names, or a number (regression).

As in Devlin et al. 2019, section 4.1: a layer on what the model says of the text's first token, or for decoders of its
last. Losses are transformers': cross entropy, binary cross entropy (mean over the names), squared error.
"""

import numpy as np
import torch
from torch.nn import functional

from ..errors import UsageError
from ..metrics import classes, regression
from . import labelled

KINDS = {"single": "single_label_classification", "multi": "multi_label_classification", "value": "regression"}


def model_class():
    """The transformers class that builds and loads models for this task."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification


def check(vocabulary):
    """Any tokenizer will do."""


def head(meaning):
    """What a model's configuration says of its labels, {argument: value}; meaning: of the data (data.labels)."""
    labelled.require(meaning, KINDS, "sequence_classification")
    count = 1 if meaning["kind"] == "value" else len(meaning["names"])
    return {"problem_type": KINDS[meaning["kind"]], **labelled.named(meaning["names"], count)}


def labels(columns, width, meaning):
    """Targets of a micro-batch from its examples' columns: int64 [B], or float32 [B, names] or [B] of a value."""
    found = np.stack(columns)
    if meaning["kind"] == "multi":
        return found.astype(np.float32)
    return found[:, 0].astype(np.int64 if meaning["kind"] == "single" else np.float32)


def weight(targets, class_weights):
    """What the loss of a micro-batch is divided by: its examples, each as its class weighs."""
    if class_weights is None or targets.dtype != torch.int64:
        return float(len(targets))
    return float(class_weights[targets].double().sum())


collate, inputs, target_fraction = labelled.collate(labels), labelled.inputs, labelled.target_fraction


def loss_sum(model, given, targets, score=False, *, class_weights=None, label_smoothing=0.0):
    """(sum of the examples' losses, with `score` what the model says of them: else None).

    class_weights: float32 [names], of each name; label_smoothing: of Szegedy et al. 2016. What it says: int64 [B], bool
    [B, names] or float32 [B].
    """
    logits = model(**given).logits.float()
    if targets.dtype == torch.int64:
        how = {"weight": class_weights, "label_smoothing": label_smoothing, "reduction": "sum"}
        return functional.cross_entropy(logits, targets, **how), logits.argmax(-1) if score else None
    if targets.dim() == 2:
        if class_weights is not None:
            class_weights = class_weights.expand_as(targets)
        losses = functional.binary_cross_entropy_with_logits(logits, targets, class_weights, reduction="sum")
        return losses / logits.shape[-1], logits > 0 if score else None
    values = logits.squeeze(-1)
    return functional.mse_loss(values, targets, reduction="sum"), values if score else None


def answers(batch, found, examples):
    """[(right, found)] of each example of a micro-batch (data.examples.ExampleBatch), as numpy numbers or arrays.

    found: what `loss_sum` says; examples: the data.examples.Examples that they are of.
    """
    return list(zip(batch.labels.numpy(), found.numpy(), strict=True))


def whole(answers, examples):
    """The answers of whole examples: an example is one document."""
    return answers


def scores(answers, meaning):
    """({metric: number}, text table, confusion matrix or None) of all examples' answers, in the examples' order."""
    right, found = (np.array(side) for side in zip(*answers, strict=True))
    if meaning["kind"] == "value":
        numbers = regression.scores(right.astype(np.float64), found.astype(np.float64))
        return numbers, "\n".join(f"{name:>10} {number:10.4f}" for name, number in numbers.items()), None
    names = meaning["names"]
    if meaning["kind"] == "multi":
        counts = classes.multilabel_counts(right > 0, found)
        return classes.multilabel_scores(counts), classes.multilabel_report(counts, names), None
    matrix = classes.confusion(right, found, len(names))
    return classes.scores(matrix), classes.report(matrix, names), matrix


def metrics(meaning):
    """Names of the numbers in `scores`."""
    answer = np.zeros(len(meaning["names"]), bool) if meaning["kind"] == "multi" else np.int64(0)
    return list(scores([(answer, answer)], meaning)[0])


def check_loss(meaning, class_weights, label_smoothing):
    """Raise UsageError for what the loss of these labels has none of."""
    if meaning["kind"] == "value" and (class_weights is not None or label_smoothing):
        raise UsageError("train: a value has neither class_weights nor label_smoothing")
    if meaning["kind"] == "multi" and label_smoothing:
        raise UsageError("train: label_smoothing is for one name of several, these texts have any number of names")
