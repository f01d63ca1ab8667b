"""Labelled examples to micro-batches: those of like length together, so that rows need little padding.

A global batch is the samples that `order` says, whatever the number of ranks. Sorted by length it is cut into as many
micro-batches as global_batch_size / micro_batch_size, of about equal padded size: short examples come many at a time,
long ones few, and all ranks have as much to do. What a micro-batch holds depends on the global batch alone.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import DataError, UsageError
from . import order
from .documents import Documents


@dataclass(frozen=True)
class Examples(Documents):
    """A part of labelled data for a run, each document an example.

    task: module of hpcllm.tasks; vocabulary: model.Vocabulary; sequence_length: the longest example that the model
    takes; multiple: padded lengths are multiples of it; class_weights: float32 of each label's name, None: all 1;
    label_smoothing: as in the run file.
    """

    task: Any
    vocabulary: Any
    sequence_length: int
    seed: int
    multiple: int = 1
    class_weights: Any = None
    label_smoothing: float = 0.0

    @property
    def loss_options(self):
        """What the task's loss takes beside inputs and targets, as far as it was asked for."""
        asked = {"class_weights": self.class_weights, "label_smoothing": self.label_smoothing or None}
        return {name: value for name, value in asked.items() if value is not None}

    def training_step(self, position, rank, size, train):
        """This rank's micro-batches of the global batch that starts after `position` consumed samples."""
        numbers, epochs = order.samples(position, train.global_batch_size, len(self), self.seed)
        groups = grouped(self.lengths(numbers), train.global_batch_size // train.micro_batch_size)
        return [self.micro_batch(numbers[rows], epochs[rows]) for rows in groups[rank::size]]

    def validation(self, rank, size, width):
        """Yield this rank's micro-batches of one pass, each example on exactly one rank, in equal numbers of calls."""
        longest_first = np.argsort(-self.lengths(np.arange(len(self))), kind="stable")
        groups = filled(self.lengths(longest_first), width * self.sequence_length)
        groups += [np.arange(0)] * (-len(groups) % size)
        for rows in groups[rank::size]:
            numbers = longest_first[rows]
            yield self.micro_batch(numbers, np.full(len(numbers), -1)) if len(numbers) else self.nothing()

    def micro_batch(self, numbers, epochs):
        """ExampleBatch of int64 arrays [B] of example numbers and their epochs."""
        found = list(self.rows(numbers))
        given, labels = self.task.collate(found, self)
        seed = int(order.key(order.key(self.seed, epochs[0], numbers[0]), 4)) >> 1
        given = {name: torch.from_numpy(value) for name, value in given.items()}
        labels = torch.from_numpy(labels)
        weight = self.task.weight(labels, self.class_weights)
        lengths = [len(tokens) for tokens, _ in found]
        pairs = sum(length * length for length in lengths)
        return ExampleBatch(given, labels, seed, len(found), numbers, weight, sum(lengths), pairs)

    def nothing(self):
        """A row that counts nothing, for ranks that have none left but must call what the others call."""
        one = self.micro_batch(np.arange(1), np.full(1, -1))
        return dataclasses.replace(one, samples=0, numbers=one.numbers[:0], targets=0.0, tokens=0, pairs=0)


@dataclass(frozen=True)
class ExampleBatch:
    """One forward's input. inputs: {the model's argument: int64 [B, L]}; labels: as the task has them.

    seed: for dropout; samples: examples in it; numbers: int64 [B], which; targets: what its loss is divided by, a sum
    of labels, or of their classes' weights; tokens: without padding; pairs: how many of them attend, either to the
    other, also without.
    """

    inputs: dict
    labels: torch.Tensor
    seed: int
    samples: int
    numbers: np.ndarray
    targets: float
    tokens: int
    pairs: int

    positions = None


def open_part(stream, task, vocabulary, config, device, names=None):
    """The Examples of `stream`, checked against the run file `config` and the labels (kind, `names`) it must have.

    Raises DataError for other labels, and for examples longer than train.sequence_length.
    """
    meaning, train = stream.labelled, config.train
    task.head(meaning)  # that there are labels, and the task's
    task.check_loss(meaning, train.class_weights, train.label_smoothing)
    if names is not None and labels_of(stream) != names:
        theirs, ours = (
            f"{kind} " + ", ".join(some[:8]) + ", ..." * (len(some) > 8) for kind, some in (labels_of(stream), names)
        )
        raise DataError(f"data: {stream.folder} has the labels {theirs}, the model {ours}; prepare all data in one go")
    longest = meaning["became"]["longest"]
    if longest > train.sequence_length:
        raise DataError(
            f"data: {stream.folder} has examples of {longest} tokens, more than train.sequence_length "
            f"({train.sequence_length}); raise that, or prepare with --max-tokens {train.sequence_length}"
        )
    multiple = 8 if device.type != "cpu" else 1  # as kernels of GPUs like it
    weights = class_weights(meaning, train.class_weights)
    how = train.sequence_length, config.run.seed, multiple, weights, train.label_smoothing
    return Examples(stream, task, vocabulary, *how)


def labels_of(stream):
    """(kind, names) of the labels of a labelled stream."""
    return stream.labelled["kind"], stream.labelled["names"]


def class_weights(meaning, asked):
    """float32 tensor of a weight for each name, None for none. Raises UsageError for another number of them.

    "balanced": examples / (names x examples of the name), as scikit-learn has it; 1 for a name without any.
    """
    if asked is None:
        return None
    counts = torch.tensor(list(meaning["label_counts"].values()), dtype=torch.float64)
    if asked == "balanced":
        return torch.where(counts > 0, counts.sum() / (len(counts) * counts.clamp(min=1)), 1.0).float()
    if len(asked) != len(counts):
        raise UsageError(f"train: class_weights has {len(asked)} numbers, the data have {len(counts)} names of labels")
    return torch.tensor(asked, dtype=torch.float32)


def grouped(lengths, count):
    """Cut rows of so many tokens (int64 [n], n >= count) into `count` groups: a list of index arrays.

    Sorted by length, so that what pads them to each group's longest is little, and so that the largest group, in padded
    tokens, is as small as can be.
    """
    rows = np.argsort(lengths, kind="stable")
    ordered = lengths[rows].tolist()
    low, high = max(ordered), max(ordered) * len(ordered)
    while low < high:  # the least bound under which `count` groups hold all
        bound = (low + high) // 2
        low, high = (low, bound) if len(_cuts(ordered, bound)) <= count else (bound + 1, high)
    cuts = _cuts(ordered, low)
    while len(cuts) < count:
        ends = [*cuts[1:], len(ordered)]
        begin, end = max(
            zip(cuts, ends, strict=True),
            key=lambda cut: (cut[1] - cut[0] > 1) * ordered[cut[1] - 1] * (cut[1] - cut[0]),
        )
        cuts = sorted([*cuts, (begin + end) // 2])
    return np.split(rows, cuts[1:])


def _cuts(ordered, bound):
    """Where groups begin that hold at most `bound` padded tokens, as few as there can be; lengths ascend."""
    cuts = [0]
    for row, length in enumerate(ordered):
        if (row + 1 - cuts[-1]) * length > bound and row > cuts[-1]:
            cuts.append(row)
    return cuts


def filled(lengths, bound):
    """Cut rows, the longest first, into groups of at most `bound` padded tokens: a list of index arrays."""
    groups, begin = [], 0
    while begin < len(lengths):
        end = min(len(lengths), begin + max(1, bound // max(1, int(lengths[begin]))))
        groups.append(np.arange(begin, end))
        begin = end
    return groups
