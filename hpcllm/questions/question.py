"""What all questions have in common: the text of a row as tokens, documents as the model's arguments.

    model_class()           the transformers class to load
    columns                 columns of the input that hold the text
    documents(row)          what of a row is computed: [(token ids, ...)], at least one
    ask(documents, device)  what the model says of a batch of documents, one thing each
    join(row, answers)      the answer to a row, from those to its documents: a dict for JSON

Of shards with labels of one of `kinds`, whose examples are tokens already:

    example(found, first, documents)  (fields of a row, what is computed) of an example; found: [(token ids, {column:
                                      its rows})] of its documents, `first` being its first of all data.documents

A row is whatever has `fields` (dict), `offset` (int) and `refusal(why)` (the error to raise), as rows.Row.
"""

import functools
import itertools

import numpy as np
import tokenizers
import torch

from ..errors import UsageError


class Question:
    """A question to a model. options: `columns`, and of each question its own.

    columns: names of the columns of the text and of a second one, None for those in `usual`.
    """

    usual = ("text", None)
    unused = ()  # what of the class's weights it can do without: beginnings of names
    kinds = ()

    def __init__(self, net, words, *, columns=(None, None)):
        self.net, self.words = net, words
        names = (given or usual for given, usual in zip((*columns, None), self.usual, strict=False))
        self.columns = tuple(name for name in names if name)
        limits = [getattr(net.config, "max_position_embeddings", None), getattr(words, "model_max_length", None)]
        # transformers says "no limit" by an enormous number.
        self.places = min(limit for limit in (*limits, 1 << 30) if limit)
        pads = (words.pad_token_id, words.eos_token_id)
        self.pad = net.config.pad_token_id = next((number for number in pads if number is not None), 0)

    def size(self, ids):
        """Tokens that a document of these ids takes room for."""
        return len(ids)

    def texts(self, row):
        """The row's text, or two of them."""
        texts = [row.fields[name] for name in self.columns]
        if not texts[0].strip():
            raise row.refusal("the text is empty")
        return texts

    @functools.cached_property
    def encoder(self):
        """The tokenizer, cutting what the model has no room for; texts about [MASK] hold the word, not the token."""
        encoder = tokenizers.Tokenizer.from_str(self.words.backend_tokenizer.to_str())
        encoder.enable_truncation(self.places)
        encoder.no_padding()
        encoder.encode_special_tokens = True
        return encoder

    def inputs(self, documents, device, left=False):
        """The model's arguments for documents that begin with (ids, segments or None): int64 [B, L] each."""
        width = max(len(ids) for ids, *_ in documents)
        names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (
            "token_type_ids" in self.words.model_input_names
        )
        given = {name: np.full((len(documents), width), self.pad if name == "input_ids" else 0) for name in names}
        for row, (ids, segments, *_) in enumerate(documents):
            where = slice(width - len(ids), None) if left else slice(len(ids))
            given["input_ids"][row, where], given["attention_mask"][row, where] = ids, 1
            if "token_type_ids" in given and segments is not None:
                given["token_type_ids"][row, where] = segments
        return {name: torch.from_numpy(values).to(device) for name, values in given.items()}

    def whole(self, row):
        """The one document of a row that must not be cut."""
        found = self.words(*self.texts(row), verbose=False)
        return self.fitting(row, found["input_ids"]), found.get("token_type_ids")

    def fitting(self, row, ids):
        """`ids`, for which there is room."""
        if not ids:
            raise row.refusal("the text is empty")
        if len(ids) > self.places:
            raise row.refusal(f"{len(ids)} tokens, more than the {self.places} that this model leaves room for")
        return ids

    def spelt(self, ids):
        """The texts that tokens (int64 [n]) stand for, cut at special ones, as far as tokens tell: a list of str."""
        parts = itertools.groupby(ids.tolist(), self._around.__contains__)
        return [self.words.decode(list(part)) for special, part in parts if not special]

    @functools.cached_property
    def _around(self):
        """Ids of the special tokens that stand around texts."""
        return {getattr(self.words, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep", "pad")}

    def join(self, row, answers):
        return answers[0]


def check_top_k(top_k, most):
    if not 1 <= top_k <= most:
        raise UsageError(f"--top-k {top_k} must be 1 to {most}")
