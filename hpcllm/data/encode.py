"""Examples to token ids, with the columns that stand beside them in a shard. The tokenizers library does the tokens.

Policies, by name. An example of more than `max_tokens` tokens is cut ("cut": its end is lost, of a pair the longer
text's), left out ("drop"), refused ("error"), or, where words have labels or a question is asked, goes on in another
document ("split"). Of a word's tokens the first has its label, the others none (-100), as in Devlin et al. 2019,
section 5.3. A word without tokens (of characters that the tokenizer removes) is an unknown one, so that each has its
label.

Each kind of labels has a class, of which `Encoding` is the base: `encoding` makes the right one.
"""

import functools
import json

import numpy as np

from ..errors import UsageError
from . import spans, text, texts, turns
from .shards import Column

TRUNCATION = ("cut", "drop", "error", "split")
NO_LABEL = -100


def encoding(encoder, labels, max_tokens, truncation, separator_id=None, template=None, stride=None):
    """The Encoding of a kind of labels.

    encoder: tokenizers.Tokenizer; labels: labels.Labels; truncation: a policy; separator_id: the token that ends a text
    that a model writes ("text"); template: of dialogues (turns.Template); stride: of spans.Windows. Raises UsageError.
    """
    own = {"tags": Tags, "span": Spans, "text": Targets, "turns": Turns}.get(labels.kind, Encoding)
    more = {"span": {"stride": stride}, "text": {"end": separator_id}, "turns": {"template": template}}
    more = more.get(labels.kind, {})
    return own(encoder, labels, max_tokens, truncation, **more)


class Encoding:
    """How examples become documents: texts, or pairs of them, with a label.

    Columns: second: where the second text of a pair begins; labels: numbers of names, 0 or 1 for each name, or the
    value.

    counted: of what `documents` counts, what a user wants to know; says: what a manifest says of this encoding alone;
    with_lines: beside a document is a "line" of `texts`.
    """

    counted = ("read", "empty", "cut", "dropped", "split", "wordless")
    says, with_lines = {}, False

    def __init__(self, encoder, labels, max_tokens, truncation):
        self.encoder, self.labels, self.max_tokens, self.truncation = encoder, labels, max_tokens, truncation
        if truncation == "split" and labels.kind not in ("tags", "span"):
            raise UsageError('truncation: "split" is for words with tags and questions; take "cut", "drop" or "error"')
        least = encoder.num_special_tokens_to_add(True) + 2
        if max_tokens < least:
            raise UsageError(f"max-tokens: {max_tokens} leaves no room for text; the least is {least}")

    @property
    def columns(self):
        """The shards.Column of these examples, in order."""
        kinds = {"single": ("<i4", 1), "multi": ("|u1", len(self.labels.names)), "value": ("<f4", 1)}
        return [Column("second", "document", "<i4"), Column("labels", "document", *kinds[self.labels.kind])]

    def documents(self, batch, counts):
        """Yield (ids, {column: numbers}) for a list of (labelled.Example, its unit).

        counts: a Counter of what becomes of examples: read, empty, cut, dropped, split, wordless, documents; their
        "longest", and how often each label is there, ("label", its number).
        """
        for ids, beside in self._kept(batch, counts):
            counts["documents"] += 1
            counts["longest"] = max(counts["longest"], self.length(ids, beside))
            for number in self.numbers(beside):
                counts["label", number] += 1
            yield ids, beside

    def length(self, ids, beside):
        """Tokens that a model reads at once, of a document."""
        return len(ids)

    def numbers(self, beside):
        """The numbers of the names in a document's columns."""
        if self.labels.kind == "multi":
            return np.flatnonzero(beside["labels"]).tolist()
        return [beside["labels"]] if self.labels.kind == "single" else []

    def _kept(self, batch, counts):
        counts["read"] += len(batch)
        kept = []
        for example, unit in batch:
            numbers = self.labels.numbers(example, unit)
            if self.empty(example):
                counts["empty"] += 1
            else:
                kept.append((example, unit, numbers))
        if kept:
            yield from self._encode(kept, counts)

    def empty(self, example):
        """Whether there is nothing in an example to learn from."""
        return not example.text or example.text.isspace()

    def _encode(self, kept, counts):
        self.encoder.enable_truncation(self.max_tokens)
        texts = [e.text if e.pair is None else (e.text, e.pair) for e, *_ in kept]
        for (example, unit, numbers), found in zip(kept, self.encoder.encode_batch(texts), strict=True):
            if found.overflowing and not self._too_long(example, unit, counts):
                continue
            second = found.type_ids.index(1) if 1 in found.type_ids else len(found.ids)
            yield found.ids, {"second": second, "labels": numbers}

    def _too_long(self, example, unit, counts):
        """Whether an example that is too long stays, in what way it may."""
        if self.truncation == "error":
            others = "cut, drop or split" if self.labels.kind in ("tags", "span") else "cut or drop"
            why = f"more than {self.max_tokens} tokens; say what to do with such: --truncation {others}"
            raise text.refusal(unit, example.offset, why)
        counts["dropped" if self.truncation == "drop" else self.truncation] += 1
        return self.truncation != "drop"


class Tags(Encoding):
    """Words with a tag each.

    Columns: labels: of the first token of a word the number of its tag; continues: 1 where a sentence goes on that was
    split.
    """

    columns = (Column("labels", "token", "<i2"), Column("continues", "document", "|u1"))

    def numbers(self, beside):
        return [number for number in beside["labels"] if number != NO_LABEL]

    def empty(self, example):
        return not example.text

    def _encode(self, kept, counts):
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


class Spans(Encoding):
    """A question and a text that may hold its answer, in windows where it is too long; each window is a document.

    Columns: labels: the first and the last token of the answer, of the first one where there are several, 0 and 0 where
    the window has none; begins, ends: as spans.Window has them; text: of texts.line: the question's name, text and
    answers.
    """

    columns = (
        Column("second", "document", "<i4"),
        Column("labels", "document", "<i4", 2),
        Column("text", "document", "<i8", 2),
        Column("begins", "token", "<i4"),
        Column("ends", "token", "<i4"),
    )
    counted = (*Encoding.counted, "shortened", "unanswerable", "lost")
    with_lines = True

    def __init__(self, *common, stride):
        super().__init__(*common)
        self._windows = spans.Windows(self.encoder, self.max_tokens, stride)
        self.says = {"stride": self._windows.stride}

    def empty(self, example):
        return super().empty(example) or not example.pair or example.pair.isspace()

    def _encode(self, kept, counts):
        found = self._windows.of([(example.pair, example.text) for example, *_ in kept])
        for (example, unit, asked), (windows, shortened) in zip(kept, found, strict=True):
            places = [self._place(example, unit, number) for number in range(len(asked.answers))]
            if not len(windows[0].inside):
                counts["empty"] += 1  # of characters that the tokenizer removes
                continue
            if len(windows) > 1 and not self._too_long(example, unit, counts):
                continue
            windows = windows if self.truncation == "split" else windows[:1]
            labels = [window.tokens(*places[0]) if places else (0, 0) for window in windows]
            counts["shortened"] += shortened
            counts["unanswerable"] += not places
            counts["lost"] += bool(places) and not any(last for _, last in labels)
            told = {"id": asked.name, "context": example.text, "answers": [answer for answer, _ in asked.answers]}
            line, about = texts.line(told)
            for window, label in zip(windows, labels, strict=True):
                beside = {"begins": window.begins, "ends": window.ends, "labels": label, "second": window.inside[0]}
                yield window.ids, beside | {"text": about, "line": line}
                line, about = b"", (0, 0)

    def _place(self, example, unit, number):
        """Characters of the text that are an answer. Raises DataError where it does not stand where it should."""
        answer, start = example.label.answers[number]
        found = spans.place(example.text, answer, start)
        if found is None:
            there = example.text[start : start + len(answer)] if 0 <= start < len(example.text) else None
            there = f'the text has "{there[:40]}"' if there else f"the text has {len(example.text)} characters"
            why = f'answer {number + 1}, "{answer[:40]}", is not at character {start}: {there}'
            raise text.refusal(unit, example.offset, f'{why} (question "{example.label.name}")')
        return found


class Targets(Encoding):
    """A text to read and another to write: both in one document, each of at most `max_tokens` tokens.

    Column: second: where the text to write begins, whose last token is `end` (cut ones excepted).
    """

    columns = (Column("second", "document", "<i4"),)

    def __init__(self, *common, end):
        super().__init__(*common)
        self._end = end

    def length(self, ids, beside):
        return max(beside["second"], len(ids) - beside["second"])

    def empty(self, example):
        return super().empty(example) or not example.label or example.label.isspace()

    def _encode(self, kept, counts):
        self.encoder.no_truncation()
        texts = [text for example, *_ in kept for text in (example.text, example.label)]
        found = [self._whole(one.ids) for one in self.encoder.encode_batch(texts)]
        for (example, unit, _), source, target in zip(kept, found[::2], found[1::2], strict=True):
            if max(len(source), len(target)) > self.max_tokens:
                if not self._too_long(example, unit, counts):
                    continue
                source, target = self._cut(source), target[: self.max_tokens]
            yield source + target, {"second": len(source)}

    def _whole(self, ids):
        return ids if ids[-1:] == [self._end] else [*ids, self._end]

    def _cut(self, ids):
        return ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], self._end]


class Turns(Encoding):
    """A dialogue as its template writes it down, of which what the assistant says is learnt.

    Column: learnt: 1 for tokens that end in what the assistant says, and in what ends it.
    """

    columns = (Column("learnt", "token", "|u1"),)

    def __init__(self, *common, template):
        super().__init__(*common)
        self._template = template

    def empty(self, example):
        return turns.ASSISTANT not in example.label

    def _encode(self, kept, counts):
        for example, unit, _ in kept:
            ids, learnt = self._template.encode(example, unit)
            if len(ids) > self.max_tokens:
                if not self._too_long(example, unit, counts):
                    continue
                ids, learnt = ids[: self.max_tokens], learnt[: self.max_tokens]
            if any(learnt[1:]):
                yield ids, {"learnt": learnt}
            else:
                counts["empty"] += 1


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

    def apart(self, ids, firsts):
        """The tokens of each word (lists of ids) of a document of `windows`, a list of ids."""
        ends = [*firsts[1:], len(ids) - len(self._after)]
        return [ids[first:end] for first, end in zip(firsts, ends, strict=True)]

    def _around(self):
        """The special tokens before and after one text: two lists of ids."""
        bare, whole = (self._encoder.encode("a", add_special_tokens=them).ids for them in (False, True))
        begin = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return whole[:begin], whole[begin + len(bare) :]
