"""Causal language modelling: predict each token from those before it (Radford et al. 2018).

A row is a slice of the token stream, which may run across documents (each ends with the separator). Rows overlap by
one token, so that every token of the stream but the first is a target once an epoch. No padding.
"""

from ..parallel import head


def model_class():
    """The transformers class that builds and loads models for this task."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def check(vocabulary):
    """Any tokenizer will do."""


def span(sequence_length, fraction):
    """(tokens that a sample takes from the stream, distance between the starts of two samples)."""
    return sequence_length + 1, sequence_length


def rows(tokens, keys, vocabulary, mlm_probability):
    """(input_ids, labels), int64 [B, sequence_length]: labels[:, t] is the token after input_ids[:, t]."""
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def target_fraction(data):
    """Fraction of the tokens that are targets."""
    return 1.0


def inputs(given, labels, config):
    """The model's keyword arguments. The keys and values that generation would keep are of no use here."""
    return {**given, "use_cache": False}


loss_sum = head.loss_sum  # labels are shifted in `rows`, so the loss is that of any classifier of tokens
