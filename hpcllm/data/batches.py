"""Samples to micro-batches: which rows a rank computes in a step, made one step ahead in a thread.

A global batch is a fixed list of micro-batches, whatever the number of ranks; rank r of n takes every n-th, starting
with the r-th. So each micro-batch, with its masking and its dropout, is the same computation at any rank count.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from . import order

_VALIDATION = -1  # the "epoch" of evaluation: its masking never changes


@dataclass(frozen=True)
class MicroBatch:
    """One forward's input. input_ids, labels: int64 tensors [B, sequence_length]; seed: for dropout.

    samples: how many of the rows count; all that there are, or none; positions: int64 [B, sequence_length], of each
    token in its document where attention stays within it; None where it does not.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    seed: int
    samples: int
    positions: torch.Tensor | None = None

    @property
    def inputs(self):
        return {"input_ids": self.input_ids}

    @property
    def targets(self):
        return int((self.labels != -100).sum())

    @property
    def tokens(self):
        return self.input_ids.numel()

    @property
    def pairs(self):
        """How many pairs of tokens attend, either to the other: of a row, or of the documents in it."""
        if self.positions is None:
            return self.input_ids.numel() * self.input_ids.shape[1]
        return int((2 * self.positions + 1).sum())  # the sum over a document of n tokens is n * n


@dataclass(frozen=True)
class Source:
    """The samples that a task sees in one set of shards.

    stream: data.shards.TokenStream; task: module of hpcllm.tasks; vocabulary: model.Vocabulary; attention: as in the
    run file.
    """

    stream: Any
    task: Any
    vocabulary: Any
    sequence_length: int
    mlm_probability: float
    seed: int
    attention: str = "row"

    @property
    def loss_options(self):
        """What the task's loss takes beside inputs and targets."""
        return {}

    def __len__(self):
        """Whole samples in the stream; the tokens after the last one are not used."""
        taken, stride = self.task.span(self.sequence_length, self.mlm_probability)
        return max(0, (self.stream.token_count - taken) // stride + 1)

    def micro_batch(self, samples, epochs):
        """Rows for int64 arrays [B] of sample numbers and their epochs."""
        taken, stride = self.task.span(self.sequence_length, self.mlm_probability)
        keys = order.key(self.seed, epochs, samples)
        tokens = self.stream.gather(samples * stride, taken)
        input_ids, labels = self.task.rows(tokens, keys, self.vocabulary, self.mlm_probability)
        seed = int(order.key(keys[0], 4)) >> 1 if len(keys) else 0
        return self._made(input_ids, labels, seed, len(samples))

    def nothing(self):
        """A row without targets, for ranks that have no sample left but must call what the others call."""
        input_ids = np.zeros((1, self.sequence_length), dtype=np.int64)
        return self._made(input_ids, np.full_like(input_ids, -100), 0, 0)

    def _made(self, input_ids, labels, seed, samples):
        parts = [input_ids, labels]
        if self.attention == "document":
            parts.append(positions(input_ids, self.stream.separator_id))
        input_ids, labels, *places = map(torch.from_numpy, parts)
        return MicroBatch(input_ids, labels, seed, samples, *places)

    def training_step(self, position, rank, size, train):
        """This rank's micro-batches of the global batch that starts after `position` consumed samples."""
        samples, epochs = order.samples(position, train.global_batch_size, len(self), self.seed)
        width = train.micro_batch_size
        starts = range(rank * width, train.global_batch_size, size * width)
        return [self.micro_batch(samples[s : s + width], epochs[s : s + width]) for s in starts]

    def validation(self, rank, size, width):
        """Yield this rank's micro-batches of one pass, each sample on exactly one rank, in equal numbers of calls.

        The last ones may be short or empty, so that collective readers are called equally often everywhere.
        """
        for start in range(0, len(self), size * width):
            first = start + rank * width
            samples = np.arange(min(first, len(self)), min(first + width, len(self)), dtype=np.int64)
            yield self.micro_batch(samples, np.full(len(samples), _VALIDATION, dtype=np.int64))


def positions(input_ids, separator_id):
    """Where each token of the rows `input_ids` (int64 [B, S]) stands in its document, int64 [B, S].

    A document ends with its separator, which text never becomes; the first of a row may have begun before it.
    """
    places = np.arange(input_ids.shape[1])
    begins = np.zeros_like(input_ids)
    begins[:, 1:] = np.where(input_ids[:, :-1] == separator_id, places[1:], 0)
    return places - np.maximum.accumulate(begins, axis=1)


def require(source, wanted, what):
    """Raise DataError when `source` has fewer than `wanted` samples; `what` says who wants them."""
    if len(source) < wanted:
        raise DataError(
            f"{what} {wanted} samples of {source.sequence_length} tokens, but the shards hold {len(source)} "
            f"({source.stream.token_count} tokens in {source.stream.document_count} documents)"
        )


def ahead(load, items, threaded=True):
    """Yield load(item) for each item, the next one being loaded in a thread meanwhile. Errors arrive in order."""
    if not threaded:
        yield from map(load, items)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="hpcllm-data") as pool:
        coming = None
        for item in items:
            ready, coming = coming, pool.submit(load, item)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
