"""What a model tells of a text: what [MASK] stands for, a label, a tag for each word, where an answer is, a vector."""

import math

import numpy as np
import torch

from ..data.encode import NO_LABEL, Words
from ..data.labels import in_words, is_chunk
from ..data.spans import Window, Windows
from ..errors import UsageError
from ..metrics import tags as schemes
from ..tasks import TASKS, question_answering
from .question import Question, check_top_k

BLANK = "[MASK]"  # what a user writes, whatever the tokenizer calls its mask token
_DIGITS = 6  # of scores
_WINDOW_TOKENS = 512  # of a text that is asked about, if the model has room for more


class FillMask(Question):
    """The likeliest tokens for each [MASK] of a text: {"masks": [[{"token", "score"}, ...top_k] for each]}."""

    def __init__(self, net, words, *, top_k=5, **common):
        super().__init__(net, words, **common)
        check_top_k(top_k, len(words))
        self._top_k = top_k

    model_class = staticmethod(TASKS["masked_lm"].model_class)

    def texts(self, row):
        return [text.replace(BLANK, self.words.mask_token) for text in super().texts(row)]

    def documents(self, row):
        document = self.whole(row)
        if self.words.mask_token_id not in document[0]:
            raise row.refusal(f"there is no {BLANK} to fill")
        return [document]

    def ask(self, documents, device):
        given = self.inputs(documents, device)
        logits = self.net(**given).logits
        for row in range(len(documents)):
            places = (given["input_ids"][row] == self.words.mask_token_id).nonzero().squeeze(1)
            values, tokens = logits[row, places].float().softmax(-1).topk(self._top_k)
            pairs = zip(tokens.tolist(), values.tolist(), strict=True)
            yield {"masks": [[self._guess(*one) for one in zip(*pair, strict=True)] for pair in pairs]}

    def _guess(self, token, score):
        return {"token": self.words.decode([token]).strip(), "score": round(score, _DIGITS)}


class _WholeText(Question):
    """What is asked of a text or pair whose end may not be seen: its one document says third whether it is not."""

    kinds = ("single", "multi", "value")

    def documents(self, row):
        found = self.encoder.encode(*self.texts(row))
        return [(found.ids, found.type_ids, bool(found.overflowing))]

    def example(self, found, first, documents):
        [(ids, beside)] = found
        [second] = beside["second"].tolist()
        texts = zip(("text", "pair"), self.spelt(ids[:second]) + self.spelt(ids[second:]), strict=False)
        fields = {"text": "", **dict(texts), "label": in_words(documents.meaning, beside["labels"])}
        return fields, [(ids, np.arange(len(ids)) >= second, False)]


class ClassifySequence(_WholeText):
    """The label of a text or pair: {"label", "score"}, of any of several {"labels": [{"label", "score"}]} from 0.5 on,
    of numbers {"value"}; with `top_k` the likeliest as "labels" in any case. Of a text too long for the model the end
    is not seen: {"truncated": true}."""

    def __init__(self, net, words, *, top_k=None, **common):
        super().__init__(net, words, **common)
        self._top_k, self._kind = top_k, net.config.problem_type
        if top_k is not None:
            check_top_k(top_k, net.config.num_labels)

    model_class = staticmethod(TASKS["sequence_classification"].model_class)

    def ask(self, documents, device):
        logits = self.net(**self.inputs(documents, device)).logits.float()
        names = self.net.config.id2label
        several = self._kind == "multi_label_classification"
        scores = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
        for (*_, truncated), values, raw in zip(documents, scores, logits.tolist(), strict=True):
            ranked = sorted(range(len(values)), key=lambda number: (-values[number], number))
            told = [{"label": names[number], "score": round(values[number], _DIGITS)} for number in ranked]
            if self._kind == "regression":
                answer = {"value": round(raw[0], _DIGITS)}
            elif self._top_k is not None:
                answer = {"labels": told[: self._top_k]}
            elif several:
                answer = {"labels": [one for one in told if one["score"] > 0.5]}
            else:
                answer = told[0]
            yield answer | ({"truncated": True} if truncated else {})


class TagWords(Question):
    """The tag of each word: {"words", "tags", "scores"}, and where tags are of entities {"entities": [{"type", "text",
    "start", "end" (words, from 0, the end not included), "score" (the least of its words')}]}.

    Words stand in the field `tokens` of a row, a list, or are what blanks separate in its text.
    """

    def __init__(self, net, words, **common):
        super().__init__(net, words, **common)
        self._words = Words(self.encoder, self.places)
        self._chunks = all(map(is_chunk, net.config.id2label.values()))
        self._column, self.columns = self.columns[0], ()  # a row has it, or words

    model_class = staticmethod(TASKS["token_classification"].model_class)
    kinds = ("tags",)

    def _said(self, row):
        text = row.fields.get(self._column)
        words = row.fields.get("tokens", text.split() if isinstance(text, str) else None)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or not words:
            raise row.refusal(f'there are no words in it, neither a list "tokens" nor a text "{self._column}"')
        return words

    def documents(self, row):
        [(pieces, _)] = self._words.pieces([self._said(row)])
        return self._windows(pieces)

    def example(self, found, first, documents):
        pieces, tags = [], []
        for ids, beside in found:
            firsts = np.flatnonzero(beside["labels"] != NO_LABEL)
            pieces += self._words.apart(ids.tolist(), firsts.tolist())
            tags += in_words(documents.meaning, beside["labels"][firsts])
        # Some tokenizers would put blanks around what is no letter.
        words = ["".join(self.words.decode(piece).split()) for piece in pieces]
        return {"tokens": words, "tags": tags}, self._windows(pieces)

    def _windows(self, pieces):
        return [(ids, None, firsts) for ids, firsts in self._words.windows(pieces)]

    def ask(self, documents, device):
        scores, found = self.net(**self.inputs(documents, device)).logits.float().softmax(-1).max(-1)
        for (*_, firsts), values, numbers in zip(documents, scores.tolist(), found.tolist(), strict=True):
            yield [(self.net.config.id2label[numbers[at]], round(values[at], _DIGITS)) for at in firsts]

    def join(self, row, answers):
        words = self._said(row)
        tags, scores = (list(side) for side in zip(*(one for part in answers for one in part), strict=True))
        told = {"words": words, "tags": tags, "scores": scores}
        if self._chunks:
            told["entities"] = [
                {"type": kind, "text": " ".join(words[a:b]), "start": a, "end": b, "score": min(scores[a:b])}
                for kind, a, b in schemes.spans(tags)
            ]
        return told


class FindAnswer(Question):
    """Where in a text (column context) the answer to a question (column question) stands: {"answer", "start", "end"
    (characters, from 0, the end not included), "score", "no_answer"}.

    score: the probability of its first token times that of its last, among the tokens of the text and the first token,
    which stands for no answer; of a long text in the window that holds it. no_answer: by how much the logits of no
    answer, in the window where they are least, exceed those of the answer; where it is above `no_answer_above` the
    answer is "". ask: the question, for texts that come without one.
    """

    usual = ("context", "question")

    def __init__(self, net, words, *, ask=None, no_answer_above=math.inf, **common):
        super().__init__(net, words, **common)
        self._asked, self._border = ask, no_answer_above
        if ask is not None:
            self.columns = self.columns[:1]
        self._windows = Windows(self.encoder, min(self.places, _WINDOW_TOKENS))

    model_class = staticmethod(TASKS["question_answering"].model_class)
    kinds = ("span",)

    def texts(self, row):
        """(question, text)"""
        text = row.fields.get(self.columns[0], row.fields.get("text", ""))
        question = row.fields.get(self.columns[1], "") if self._asked is None else self._asked
        if not text.strip():
            raise row.refusal("the text is empty")
        if not question.strip():
            raise row.refusal("there is no question")
        return question, text

    def documents(self, row):
        [(windows, _)] = self._windows.of([self.texts(row)])
        if not len(windows[0].inside):
            raise row.refusal("the text has no tokens")
        return windows

    def example(self, found, first, documents):
        [second] = found[0][1]["second"].tolist()
        question = "".join(self.spelt(found[0][0][:second]))
        return {**documents.texts.of(first), "question": question}, [
            Window(ids, np.arange(len(ids)) >= second, beside["begins"], beside["ends"]) for ids, beside in found
        ]

    def ask(self, documents, device):
        output = self.net(**self.inputs(documents, device))
        logits = torch.stack([output.start_logits, output.end_logits], 1).float().cpu().double().numpy()
        for window, both in zip(documents, logits, strict=True):
            inside = window.inside
            total, one, other = question_answering.best(*both, inside)
            none = question_answering.nothing(*both)
            seen = both[:, [0, *inside]]
            scale = float(np.logaddexp.reduce(seen, axis=1).sum())
            yield total, none, scale, int(window.begins[one]), int(window.ends[other])

    def join(self, row, answers):
        total, _, scale, start, end = max(answers, key=lambda answer: answer[0])  # the first of equals
        _, none, none_scale, *_ = min(answers, key=lambda answer: answer[1])
        score, no_answer = total - scale, none - total
        if no_answer > self._border:
            score, start, end = none - none_scale, 0, 0
        said = self.texts(row)[1][start:end]
        start += len(said) - len(said.lstrip())
        told = {"answer": said.strip(), "start": start, "end": start + len(said.strip())}
        return told | {"score": round(math.exp(score), _DIGITS), "no_answer": round(no_answer, _DIGITS)}


class Embed(_WholeText):
    """The mean of a text's last hidden states, or that of its first token: {"embedding": [...]}, of length 1."""

    unused = ("pooler.",)

    def __init__(self, net, words, *, pooling="mean", **common):
        super().__init__(net, words, **common)
        if pooling not in ("mean", "first"):
            raise UsageError(f'pooling: "{pooling}" is not one of mean, first')
        self._mean = pooling == "mean"

    @staticmethod
    def model_class():
        from transformers import AutoModel

        return AutoModel

    def ask(self, documents, device):
        given = self.inputs(documents, device)
        hidden = self.net(**given).last_hidden_state.float()
        mask = given["attention_mask"].unsqueeze(-1)
        found = (hidden * mask).sum(1) / mask.sum(1) if self._mean else hidden[:, 0]
        found = torch.nn.functional.normalize(found, dim=-1)
        for (*_, truncated), values in zip(documents, found.tolist(), strict=True):
            answer = {"embedding": [round(value, _DIGITS) for value in values]}
            yield answer | ({"truncated": True} if truncated else {})
