"""Text to text with an encoder and a decoder (T5: Raffel et al. 2020, arXiv 1910.10683; BART: Lewis et al. 2020).

From pairs of texts (`hpcllm prepare --task seq2seq_lm`) the second is learnt from the first: translation, summaries,
answers. From plain text the model learns to fill in spans, section 3.1.4 of the paper on T5: of each row 15 % of the
tokens (data.mlm_probability) are hidden in spans of three on average; a sentinel stands for each, and the targets are
the sentinels, each before what it hides.
"""

import numpy as np

from ..data import order
from ..data.encode import NO_LABEL
from ..errors import UsageError
from ..parallel import head as heads
from . import labelled

KINDS = ("text",)
_MEAN_SPAN = 3


def model_class():
    """The transformers class that builds and loads models for this task."""
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM


def check(vocabulary):
    """Raise UsageError for a tokenizer without a token that ends a text."""
    if vocabulary.eos is None:
        raise UsageError("seq2seq_lm needs a tokenizer with an eos token, which ends what is written")


def head(meaning):
    """What a model's configuration says of labels: nothing."""
    labelled.require(meaning, KINDS, "seq2seq_lm")
    return {}


def target_fraction(data):
    """Fraction of the tokens that are targets, at most."""
    return 1.0


def inputs(given, labels, config):
    """The model's keyword arguments; labels: int64 [B, T], -100 behind the end of a text.

    The decoder reads the targets one place later (teacher forcing), from the model's decoder_start_token_id on.
    """
    shifted = labels.new_full(labels.shape, config.decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1].where(labels[:, :-1] != NO_LABEL, config.pad_token_id or 0)
    return {**given, "decoder_input_ids": shifted, "use_cache": False}


loss_sum = heads.loss_sum


# --- pairs of texts ------------------------------------------------------------------------------------------------

weight, metrics, check_loss = labelled.words, labelled.metrics_of_words, labelled.check_loss_of_words


def collate(found, examples):
    """({model's argument: int64 [B, L]}, targets: int64 [B, T]) of [(tokens, columns)]."""
    seconds = [int(beside["second"][0]) for _, beside in found]
    given = labelled.padded([tokens[:at] for (tokens, _), at in zip(found, seconds, strict=True)], examples)
    given.pop("token_type_ids", None)
    targets = [tokens[at:] for (tokens, _), at in zip(found, seconds, strict=True)]
    labels = np.full((len(found), labelled.width(targets, examples)), NO_LABEL, np.int64)
    for row, target in enumerate(targets):
        labels[row, : len(target)] = target
    return given, labels


# --- plain text ----------------------------------------------------------------------------------------------------


def _sizes(length, fraction):
    """(tokens hidden, spans) of `length` tokens, as random_spans_noise_mask of the paper's code has them."""
    hidden = min(max(round(length * fraction), 1), length - 1)
    return hidden, min(max(round(hidden / _MEAN_SPAN), 1), hidden, length - hidden)


def span(sequence_length, fraction):
    """(tokens that a sample takes from the stream, distance between the starts of two samples).

    As many as leave at most `sequence_length` for the encoder, sentinels and the end counted.
    """
    taken = sequence_length
    while _read(taken + 1, fraction) <= sequence_length:
        taken += 1
    while taken > 1 and _read(taken, fraction) > sequence_length:
        taken -= 1
    return taken, taken


def _read(length, fraction):
    hidden, spans = _sizes(length, fraction)
    return length - hidden + spans + 1


def rows(tokens, keys, vocabulary, fraction):
    """(input_ids, labels), int64 [B, L] and [B, T], the same lengths for each row.

    tokens: int64 [B, span]; keys: uint64 [B], all randomness of a sample comes from its key. Text comes first, then the
    first hidden span; where spans begin and end is drawn evenly. Raises UsageError where there are too few sentinels.
    """
    count, length = tokens.shape
    hidden, spans = _sizes(length, fraction)
    if spans > len(vocabulary.sentinels):
        raise UsageError(
            f"seq2seq_lm hides {spans} spans of {length} tokens, and the tokenizer has {len(vocabulary.sentinels)} "
            "sentinels (<extra_id_0>, <extra_id_1>, ...); `hpcllm prepare --tokenizer-kind t5` makes one that has 100"
        )
    sentinels = np.broadcast_to(vocabulary.sentinels[:spans], (count, spans))
    lengths = np.empty((count, 2 * spans), np.int64)  # of text and hidden spans in turns
    lengths[:, 0::2] = _pieces(order.key(keys, 1), length - hidden, spans)
    lengths[:, 1::2] = _pieces(order.key(keys, 2), hidden, spans)
    ends = np.cumsum(lengths, axis=1)
    piece = (np.arange(length)[None, :, None] >= ends[:, None, :]).sum(-1)  # which one each token belongs to
    shown = piece % 2 == 0
    end = np.full((count, 1), vocabulary.eos)
    read = _with(sentinels, ends[:, 0::2], tokens, shown, length - hidden)
    written = _with(sentinels, ends[:, 0::2], tokens, ~shown, hidden)
    return np.concatenate([read, end], axis=1), np.concatenate([written, end], axis=1)


def _pieces(keys, total, count):
    """Lengths, int64 [B, count], that add up to `total`, each at least 1; all such are as likely."""
    cuts = np.argsort(order.uniform(keys, total - 1), axis=1, kind="stable")[:, : count - 1] + 1
    borders = np.full((len(keys), count + 1), total)
    borders[:, 0], borders[:, 1:-1] = 0, np.sort(cuts, axis=1)
    return np.diff(borders, axis=1)


def _with(sentinels, begins, tokens, kept, count):
    """Of each row the `count` tokens that are `kept`, and a sentinel before where each span begins, [B, spans]."""
    length = tokens.shape[1]
    places = np.where(kept, np.arange(length), length)  # of what is not kept: behind everything
    keyed = np.concatenate([2 * places + 1, 2 * begins], axis=1)
    every = np.concatenate([tokens, sentinels], axis=1)
    in_order = np.take_along_axis(every, np.argsort(keyed, axis=1, kind="stable"), axis=1)
    return in_order[:, : count + sentinels.shape[1]]
