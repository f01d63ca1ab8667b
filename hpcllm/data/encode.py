"""Examples to token ids, with the columns that stand beside them in a shard. The tokenizers library does the tokens.

Policies, by name. An example of more than `max_tokens` tokens is cut ("cut": its end is lost, of a pair the longer
text's), left out ("drop"), refused ("error"), or, where words have labels, goes on in another document ("split"). Of a
word's tokens the first has its label, the others none (-100), as in Devlin et al. 2019, section 5.3. A word without
tokens (of characters that the tokenizer removes) is an unknown one, so that each has its label.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from . import text
from .shards import Column

TRUNCATION = ("cut", "drop", "error", "split")
NO_LABEL = -100


@dataclass(frozen=True)
class Encoding:
    """How examples become documents. encoder: tokenizers.Tokenizer; labels: labels.Labels; truncation: a policy."""

    encoder: Any
    labels: Any
    max_tokens: int
    truncation: str

    def __post_init__(self):
        if self.truncation == "split" and self.labels.kind != "tags":
            raise UsageError('truncation: "split" is for words with tags; take "cut", "drop" or "error"')
        least = self.encoder.num_special_tokens_to_add(True) + 2
        if self.max_tokens < least:
            raise UsageError(f"max-tokens: {self.max_tokens} leaves no room for text; the least is {least}")

    @property
    def columns(self):
        """The shards.Column of these examples, in order.

        second: where the second text of a pair begins; labels: numbers of names, 0 or 1 for each name, or the value;
        of tags one a token; continues: 1 where a sentence goes on that was split.
        """
        kind, count = self.labels.kind, len(self.labels.names)
        if kind == "tags":
            return [Column("labels", "token", "<i2"), Column("continues", "document", "|u1")]
        dtype, width = {"single": ("<i4", 1), "multi": ("|u1", count), "value": ("<f4", 1)}[kind]
        return [Column("second", "document", "<i4"), Column("labels", "document", dtype, width)]

    def documents(self, batch, counts):
        """Yield (ids, {column: numbers}) for a list of (labelled.Example, its unit).

        counts: a Counter of what becomes of examples: read, empty, cut, dropped, split, wordless.
        """
        counts["read"] += len(batch)
        kept = []
        for example, unit in batch:
            numbers = self.labels.numbers(example, unit)
            if example.text and (not isinstance(example.text, str) or not example.text.isspace()):
                kept.append((example, unit, numbers))
            else:
                counts["empty"] += 1
        if kept:
            yield from (self._words if self.labels.kind == "tags" else self._texts)(kept, counts)

    def _texts(self, kept, counts):
        self.encoder.enable_truncation(self.max_tokens)
        texts = [e.text if e.pair is None else (e.text, e.pair) for e, *_ in kept]
        for (example, unit, numbers), found in zip(kept, self.encoder.encode_batch(texts), strict=True):
            if found.overflowing and not self._too_long(example, unit, counts):
                continue
            second = found.type_ids.index(1) if 1 in found.type_ids else len(found.ids)
            yield found.ids, {"second": second, "labels": numbers}

    def _words(self, kept, counts):
        words = self._sentences
        found = words.pieces([example.text for example, *_ in kept])
        for (example, unit, numbers), (pieces, wordless) in zip(kept, found, strict=True):
            counts["wordless"] += wordless
            windows = list(words.windows(pieces))
            if len(windows) > 1 and not self._too_long(example, unit, counts):
                continue
            at = 0
            for number, (ids, firsts) in enumerate(windows if self.truncation == "split" else windows[:1]):
                labels = [NO_LABEL] * len(ids)
                for first in firsts:
                    labels[first], at = numbers[at], at + 1
                yield ids, {"labels": labels, "continues": number > 0}

    @functools.cached_property
    def _sentences(self):
        return Words(self.encoder, self.max_tokens)

    def _too_long(self, example, unit, counts):
        """Whether an example that is too long stays, in what way it may."""
        if self.truncation == "error":
            why = f"more than {self.max_tokens} tokens; say what to do with such: --truncation cut, drop or split"
            raise text.refusal(unit, example.offset, why)
        counts["dropped" if self.truncation == "drop" else self.truncation] += 1
        return self.truncation != "drop"


class Words:
    """Sentences of words as documents of at most `max_tokens` tokens, special ones included."""

    def __init__(self, encoder, max_tokens):
        """encoder: tokenizers.Tokenizer; which stays as it is.

        Byte-level ones, of GPT-2 and its kin, tell a word after a blank from the same one at the beginning. Words of a
        sentence are encoded as those after blanks.
        """
        told = json.loads(encoder.to_str())
        before = told["pre_tokenizer"] or {}
        for one in (before, *before.get("pretokenizers", ())):
            if one.get("type") == "ByteLevel":
                one["add_prefix_space"] = True
        self._encoder = type(encoder).from_str(json.dumps(told))
        self._encoder.encode_special_tokens = True
        self._before, self._after = self._around()
        self._room = max_tokens - len(self._before) - len(self._after)
        token = getattr(encoder.model, "unk_token", None)
        unknown = None if token is None else encoder.token_to_id(token)
        self._unknown = [0 if unknown is None else unknown]

    def pieces(self, sentences):
        """For each list of words (tokens of each word: lists of ids; how many words have none but the unknown one)."""
        self._encoder.no_truncation()
        found = self._encoder.encode_batch(sentences, is_pretokenized=True, add_special_tokens=False)
        for words, encoding in zip(sentences, found, strict=True):
            pieces = [[] for _ in words]
            for token, word in zip(encoding.ids, encoding.word_ids, strict=True):
                pieces[word].append(token)
            yield [piece or self._unknown for piece in pieces], pieces.count([])

    def windows(self, pieces):
        """Cut a sentence before words: yield (ids, where the first token of each word is). A longer word is cut."""
        ids, firsts = list(self._before), []
        for piece in pieces:
            piece = piece[: self._room]
            if len(ids) - len(self._before) + len(piece) > self._room:
                yield ids + self._after, firsts
                ids, firsts = list(self._before), []
            firsts.append(len(ids))
            ids += piece
        yield ids + self._after, firsts

    def _around(self):
        """The special tokens before and after one text: two lists of ids."""
        bare, whole = (self._encoder.encode("a", add_special_tokens=them).ids for them in (False, True))
        begin = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return whole[:begin], whole[begin + len(bare) :]


def summary(counts):
    """Of the Counter that `documents` filled, what a user wants to know, zeros included."""
    names = ("read", "empty", "cut", "dropped", "split", "wordless")
    return {name: counts[name] for name in names}
