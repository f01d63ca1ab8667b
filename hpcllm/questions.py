"""What can be asked of a model about a text: one class a question, each of which says how rows become batches of tokens
and what a model says of a batch.

    model_class()           the transformers class to load
    columns                 columns of the input that hold the text
    documents(row)          what of a row is computed: [(token ids, ...)], at least one
    ask(documents, device)  what the model says of a batch of documents, one thing each
    join(row, answers)      the answer to a row, from those to its documents: a dict for JSON

A row is whatever has `fields` (dict), `offset` (int) and `refusal(why)` (the error to raise), as rows.Row.
"""

import functools
import math
import os
import zlib

import numpy as np
import tokenizers
import torch

from .data import order
from .data.encode import Words
from .data.labels import is_chunk
from .data.spans import Windows
from .data.turns import chat, messages
from .errors import UsageError
from .metrics import tags as schemes
from .tasks import TASKS, question_answering

BLANK = "[MASK]"  # what a user writes, whatever the tokenizer calls its mask token
MESSAGES = "messages"  # the field that has the turns of a dialogue
_DIGITS = 6  # of scores
_WINDOW_TOKENS = 512  # of a text that is asked about, if the model has room for more


class _Question:
    """What the questions have in common. options: `columns`, and of each question its own.

    columns: names of the columns of the text and of a second one, None for those in `usual`.
    """

    usual = ("text", None)
    unused = ()  # what of the class's weights it can do without: beginnings of names

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

    def cut(self, row):
        """The one document of a row whose end may be missing; says third whether it is."""
        found = self.encoder.encode(*self.texts(row))
        return found.ids, found.type_ids, bool(found.overflowing)

    def join(self, row, answers):
        return answers[0]


class FillMask(_Question):
    """The likeliest tokens for each [MASK] of a text: {"masks": [[{"token", "score"}, ...top_k] for each]}."""

    def __init__(self, net, words, *, top_k=5, **common):
        super().__init__(net, words, **common)
        _check_top_k(top_k, len(words))
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


class Continue(_Question):
    """What comes next: {"continuation"}. Greedy, or drawn (temperature above 0), or by beams.

    What is drawn for a row depends on seed, file name and place of the row in it: it is the likeliest token after a
    Gumbel number for each was added to its logit, which draws from the softmax (Gumbel 1954; Maddison et al. 2014).
    """

    def __init__(
        self, net, words, *, max_new_tokens=40, temperature=0.0, top_k=None, top_p=1.0, beams=1, seed=0, **common
    ):
        super().__init__(net, words, **common)
        if max_new_tokens < 1 or beams < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise UsageError(
                f"--max-new-tokens ({max_new_tokens}) and --beams ({beams}) count from 1, "
                f"--temperature ({temperature}) from 0, --top-p ({top_p}) is above 0 and at most 1"
            )
        if beams > 1 and temperature > 0:
            raise UsageError("--beams look for the likeliest text, --temperature draws one; give one of them")
        if top_k is not None:
            _check_top_k(top_k, len(words))
        if not net.config.is_encoder_decoder:  # there what is written has places of its own
            self.places -= max_new_tokens
        self._new, self._beams, self._seed = max_new_tokens, beams, seed
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p

    model_class = staticmethod(TASKS["causal_lm"].model_class)
    told, strips = "continuation", ""  # what the answer is called, and what may stand around it

    def size(self, ids):
        return (len(ids) + self._new) * self._beams

    def documents(self, row):
        source = getattr(row, "source", None)
        name = zlib.crc32(os.path.basename(source.path).encode()) if source else 0
        return [(*self.whole(row), order.key(self._seed, name, row.offset))]

    def ask(self, documents, device):
        encodes = self.net.config.is_encoder_decoder
        given = self.inputs(documents, device, left=not encodes)
        given.pop("token_type_ids", None)
        start = 1 if encodes else given["input_ids"].shape[1]
        how = {"do_sample": False, "num_beams": self._beams, "max_new_tokens": self._new, "pad_token_id": self.pad}
        if self._temperature:
            keys = np.array([key for *_, key in documents], np.uint64)
            how["logits_processor"] = [self._draw(keys, start)]
        made = self.net.generate(**given, **how)
        for ids in made[:, start:].tolist():
            yield {self.told: self.words.decode(ids, skip_special_tokens=True).strip(self.strips)}

    def _draw(self, keys, start):
        """Draws, where `start` places of what a model wrote were there before it."""
        from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

        likely = LogitsProcessorList()
        if self._top_k is not None:
            likely.append(TopKLogitsWarper(self._top_k))
        if self._top_p < 1:
            likely.append(TopPLogitsWarper(self._top_p))

        def draw(tokens, logits):
            logits = likely(tokens, logits.float() / self._temperature)
            uniform = order.uniform(order.key(keys, tokens.shape[1] - start), logits.shape[1])
            gumbel = -np.log(-np.log(np.clip(uniform, 2.0**-53, 1 - 2.0**-53)))
            return logits + torch.from_numpy(gumbel).to(logits)

        return draw


class Write(Continue):
    """A text from a text, by a model with encoder and decoder: {"written"}."""

    told = "written"
    model_class = staticmethod(TASKS["seq2seq_lm"].model_class)


class Reply(Continue):
    """What an assistant says next: {"reply"}. A row has turns in its field `messages`, or a text, which a user says."""

    told, strips = "reply", " \n"

    def __init__(self, net, words, **options):
        super().__init__(net, words, **options)
        if words.chat_template is None:
            raise UsageError("the tokenizer of this model has no chat template; --task causal_lm goes on with texts")
        self._column, self.columns = self.columns[0], ()  # a row has it, or messages

    def whole(self, row):
        said = row.fields.get(MESSAGES, [{"role": "user", "content": row.fields.get(self._column)}])
        try:
            turns = chat(*messages(said))
            prompt = self.words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # Jinja's, and what templates raise of themselves, are among them
            raise row.refusal(f'"{MESSAGES}" or the text "{self._column}": {error}') from None
        return self.fitting(row, self.words(prompt, add_special_tokens=False, verbose=False)["input_ids"]), None


class ClassifySequence(_Question):
    """The label of a text or pair: {"label", "score"}, of any of several {"labels": [{"label", "score"}]} from 0.5 on,
    of numbers {"value"}; with `top_k` the likeliest as "labels" in any case. Of a text too long for the model the end
    is not seen: {"truncated": true}."""

    def __init__(self, net, words, *, top_k=None, **common):
        super().__init__(net, words, **common)
        self._top_k, self._kind = top_k, net.config.problem_type
        if top_k is not None:
            _check_top_k(top_k, net.config.num_labels)

    model_class = staticmethod(TASKS["sequence_classification"].model_class)

    def documents(self, row):
        return [self.cut(row)]

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


class TagWords(_Question):
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

    def _said(self, row):
        text = row.fields.get(self._column)
        words = row.fields.get("tokens", text.split() if isinstance(text, str) else None)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or not words:
            raise row.refusal(f'there are no words in it, neither a list "tokens" nor a text "{self._column}"')
        return words

    def documents(self, row):
        [(pieces, _)] = self._words.pieces([self._said(row)])
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


class FindAnswer(_Question):
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


class Embed(_Question):
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

    def documents(self, row):
        return [self.cut(row)]

    def ask(self, documents, device):
        given = self.inputs(documents, device)
        hidden = self.net(**given).last_hidden_state.float()
        mask = given["attention_mask"].unsqueeze(-1)
        found = (hidden * mask).sum(1) / mask.sum(1) if self._mean else hidden[:, 0]
        found = torch.nn.functional.normalize(found, dim=-1)
        for (*_, truncated), values in zip(documents, found.tolist(), strict=True):
            answer = {"embedding": [round(value, _DIGITS) for value in values]}
            yield answer | ({"truncated": True} if truncated else {})


QUESTIONS = {
    "masked_lm": FillMask,
    "causal_lm": Continue,
    "seq2seq_lm": Write,
    "dialogue": Reply,
    "sequence_classification": ClassifySequence,
    "token_classification": TagWords,
    "question_answering": FindAnswer,
    "embedding": Embed,
}


def _check_top_k(top_k, most):
    if not 1 <= top_k <= most:
        raise UsageError(f"--top-k {top_k} must be 1 to {most}")
