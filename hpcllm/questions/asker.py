"""A model that is asked: batches of rows in, answers out. A rank holds it by itself, or several between them."""

import functools
import inspect
import sys
import time
from pathlib import Path

import numpy as np
import torch

from .. import files, model
from ..data import tokenizer
from ..data.documents import Documents
from ..data.examples import filled
from ..errors import DataError, Refusal, UsageError
from ..evaluate import arithmetic
from ..mpi import together
from ..parallel import tensor
from ..quicken import quicken
from ..rows import Example, Prepared
from . import QUESTIONS

_BATCH_TOKENS = {"cpu": 2048}  # more is no quicker there, and takes memory
_BATCH_TOKENS_GPU = 16384


class _Broken(BaseException):
    """A rank of a team failed in what they compute between them, where the others may wait for it: the job ends.

    Not an Exception, so that nobody goes on with the rest.
    """


class Asker:
    """A model that answers batches of rows. Of a team of ranks the first has the rows, the others compute with it."""

    def __init__(self, folder, question, team, *, precision="fp32", batch_tokens=None, **options):
        """question: of QUESTIONS; team: mpi.World of the ranks that hold the model between them, each its part of all
        layers; batch_tokens: padded tokens of a batch, about; options: of the question.

        Raises a Refusal for what cannot be used.
        """
        words = tokenizer.load(folder)
        asked = QUESTIONS[question]
        divide = None if team.size == 1 else functools.partial(tensor.split_to_ask, group=team.group)
        net = model.load_as(folder, asked.model_class(), unused=asked.unused, divide=divide)
        net = net.to(team.device).eval()
        quicken(net, team.device)
        self._folder, self._name = folder, question
        self._team, self._device, self._precision = team.comm, team.device, precision
        self._batch_tokens = batch_tokens or _BATCH_TOKENS.get(team.device.type, _BATCH_TOKENS_GPU)
        self.decides = {
            "device": team.device.type,
            "ranks of a model": team.size,
            "batch tokens": self._batch_tokens,
            "tokenizer": tokenizer.tokenizer_hash(words),
            "configuration": ", ".join(_digests(folder)),
        }
        makers = [kind.__init__ for kind in asked.__mro__ if "__init__" in vars(kind)]
        known = {name for maker in makers for name in inspect.signature(maker).parameters}
        for name in options.keys() - known:
            raise UsageError(f"--{name.replace('_', '-')} is nothing that {question} knows")
        self._question = asked(net, words, **options)
        self.seconds = []  # that batches took

    @property
    def columns(self):
        return self._question.columns

    def prepared(self, stream):
        """The examples of a folder of shards (data.stream.TokenStream) as rows.

        Raises DataError for those of other labels or of another tokenizer, and for longer ones than the model takes.
        """
        folder, labelled, question = stream.folder, stream.labelled, self._question
        kind = labelled and labelled["kind"]
        if kind not in question.kinds:
            has = f"labels of the kind {kind}" if labelled else "no labels"
            takes = f"shards with labels of the kind {' or '.join(question.kinds)}, or " if question.kinds else ""
            raise DataError(f"input: the shards of {folder} have {has}; give {self._name} {takes}files of text")
        tokenizer.check_same(stream, self._folder, self.decides["tokenizer"])
        longest = labelled["became"]["longest"]
        if longest > question.places and kind != "tags":  # sentences of words are cut anew
            raise DataError(
                f"input: {folder} has examples of {longest} tokens, the model has room for {question.places}; "
                f"prepare with --max-tokens {question.places}"
            )
        return Prepared(Documents(stream), question.example)

    def lead(self, work):
        """What `work()` returns, which asks, on the first rank of the team; the others compute meanwhile what it asks.

        None on these. What it raises all ranks of the team raise. Collective over the team.
        """
        known = False
        try:
            with together(self._team):
                if self._team.rank == 0:
                    try:
                        return work()
                    except Refusal as refusal:
                        known = refusal.agreed
                        raise
                    finally:
                        if not isinstance(sys.exception(), _Broken):
                            self._team.bcast(None)
                while (documents := self._team.bcast(None)) is not None:
                    self._compute(documents)
        except Refusal as refusal:
            # All of the team raise it. All of the job do where its leaders had agreed on it.
            refusal.agreed = self._team.bcast(known)
            raise

    def answer(self, rows, advance=lambda done: None):
        """[dict] for each of `rows` (Row or Example of rows): its fields, and what was asked as "prediction".

        Within `lead`.
        """
        question = self._question
        # One row may take several documents.
        documents = [row.documents if isinstance(row, Example) else question.documents(row) for row in rows]
        asked = [(number, document) for number, some in enumerate(documents) for document in some]
        lengths = np.array([question.size(ids) for _, (ids, *_) in asked], np.int64)
        longest_first = np.argsort(-lengths, kind="stable")
        found, left = [[] for _ in rows], np.bincount([number for number, _ in asked], minlength=len(rows))
        for group in filled(lengths[longest_first], self._batch_tokens):
            some, began = [asked[at] for at in longest_first[group]], time.perf_counter()
            documents = [document for _, document in some]
            if self._team.size > 1:
                self._team.bcast(documents)
            answers = self._compute(documents)
            self.seconds.append(time.perf_counter() - began)
            for (number, _), place, answer in zip(some, longest_first[group], answers, strict=True):
                found[number].append((place, answer))
                left[number] -= 1
            advance(int((left == 0).sum()))
        return [
            {
                **row.fields,
                "prediction": question.join(row, [answer for _, answer in sorted(answers, key=lambda one: one[0])]),
            }
            for row, answers in zip(rows, found, strict=True)
        ]

    def _compute(self, documents):
        """What the question makes of what the model says of `documents`, in a list. Collective over the team."""
        try:
            with torch.inference_mode(), arithmetic(self._precision, self._device):
                return list(self._question.ask(documents, self._device))
        except Exception as error:
            if self._team.size == 1:
                raise
            raise _Broken(f"rank {self._team.rank} of a team of {self._team.size} failed in a batch") from error


def _digests(folder):
    """ "NAME SHA-256" of what beside the weights decides answers."""
    with files.failing_as_io(folder):
        for name in ("config.json", "generation_config.json", *tokenizer.FILES):
            if (Path(folder) / name).is_file():
                yield f"{name} {files.digest(Path(folder) / name)[:16]}"
