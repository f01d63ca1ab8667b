"""Masked language modelling (Devlin et al. 2019, arXiv 1810.04805): predict hidden tokens from both sides.

The rows are full sentences in the sense of RoBERTa (Liu et al. 2019): [CLS], a slice of the token stream, which may
run across documents (each ends with [SEP]), [SEP]. No padding, no next-sentence prediction.
"""

import numpy as np

from ..data import order
from ..errors import UsageError
from ..parallel import head

_MASKED_AS_MASK, _MASKED_AS_ITSELF = 0.8, 0.9  # [MASK] below, itself from the second on, a random token between


def model_class():
    """The transformers class that builds and loads models for this task."""
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM


def check(vocabulary):
    """Raise UsageError for a tokenizer that lacks what this task needs."""
    missing = [name for name in ("cls", "sep", "mask") if getattr(vocabulary, name) is None]
    if missing:
        raise UsageError(
            f"masked_lm needs a tokenizer with cls, sep and mask tokens; this one has no {', '.join(missing)} "
            "(hpcllm prepare --tokenizer-kind wordpiece makes one)"
        )


def span(sequence_length, fraction):
    """(tokens that a sample takes from the stream, distance between the starts of two samples).

    fraction: of the tokens that are hidden, data.mlm_probability.
    """
    return sequence_length - 2, sequence_length - 2


def rows(tokens, keys, vocabulary, mlm_probability):
    """Model inputs and targets of a micro-batch: (input_ids, labels), int64 [B, sequence_length].

    tokens: int64 [B, span]. keys: uint64 [B], all randomness of a sample comes from its key. Labels are -100
    where there is no target. Special tokens are never targets.
    """
    count, length = tokens.shape
    chosen = order.uniform(order.key(keys, 1), length) < mlm_probability
    chosen &= ~np.isin(tokens, vocabulary.special)
    how = order.uniform(order.key(keys, 2), length)
    random = (order.uniform(order.key(keys, 3), length) * len(vocabulary.ordinary)).astype(np.int64)
    shown = np.where(how < _MASKED_AS_MASK, vocabulary.mask, np.take(vocabulary.ordinary, random))
    shown = np.where(how >= _MASKED_AS_ITSELF, tokens, shown)
    input_ids = np.empty((count, length + 2), dtype=np.int64)
    input_ids[:, 0], input_ids[:, -1] = vocabulary.cls, vocabulary.sep
    input_ids[:, 1:-1] = np.where(chosen, shown, tokens)
    labels = np.full((count, length + 2), -100, dtype=np.int64)
    labels[:, 1:-1] = np.where(chosen, tokens, -100)
    return input_ids, labels


def target_fraction(data):
    """Fraction of the tokens that are targets. data: the run file's [data] section."""
    return data.mlm_probability


def inputs(given, labels, config):
    """The model's keyword arguments. given: those of the micro-batch, {"input_ids": int64 [B, S]}.

    labels: the targets; config: transformers' configuration of the model.
    """
    return given


loss_sum = head.loss_sum
