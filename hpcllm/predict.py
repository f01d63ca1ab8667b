"""Ask a model about rows of text, on all ranks: what is asked is in `questions`, who answers which rows in `rows`.

A unit's rows are encoded together, and computed in batches of about as many padded tokens each, the longest first. How
they are put together depends on the rows alone, so that answers are the same bytes at any number of ranks.
"""

import inspect
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from . import checkpoint, files, lora, model
from .data import shards, tokenizer
from .data.documents import Documents
from .data.examples import filled
from .errors import DataError, MissingInput, UsageError
from .evaluate import arithmetic
from .metrics import written
from .mpi import on_root, together
from .questions import QUESTIONS
from .quicken import quicken
from .rows import Example, Prepared, answer_all
from .run_folder import run_config

_BATCH_TOKENS = {"cpu": 2048}  # more is no quicker there, and takes memory
_BATCH_TOKENS_GPU = 16384
# What a model folder is for, by the end of its class's name.
_ENDINGS = {
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForConditionalGeneration": "seq2seq_lm",
}
# What else than its own texts a model for a task may be asked.
_ALSO = {"causal_lm": ("dialogue",), "dialogue": ("causal_lm",)}


def what_is(path, question=None):
    """(folder of the model, what it is asked, arithmetic) of a checkpoint, a run or a folder in Hugging Face's layout.

    question: of questions.QUESTIONS, None: by what the model is for. Root only. Raises MissingInput, DataError (a
    checkpoint is verified), and UsageError where the model does not tell.
    """
    folder, precision = Path(path), "fp32"
    if (folder / "config.json").is_file() and not (folder / "trainer_state.json").is_file():
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
        own = next((task for ending, task in _ENDINGS.items() if names[0].endswith(ending)), None)
    else:
        config, folder = run_config(path)
        own, precision = config.model.task, config.train.precision
    if question is None and own is None:
        raise UsageError(f"{folder}: its config.json does not say what this model is for; say --task")
    if question not in (None, own, "embedding", *_ALSO.get(own, ())):
        raise UsageError(
            f"--task {question}: {folder} is a model for {own or 'no task'}; its texts may have an embedding"
        )
    return folder, question or own, precision


class Model:
    """A model that answers batches of rows on this rank."""

    def __init__(self, folder, question, device, *, precision="fp32", batch_tokens=None, **options):
        """question: of QUESTIONS; batch_tokens: padded tokens of a batch, about; options: of the question.

        Raises a Refusal for what cannot be used.
        """
        words = tokenizer.load(folder)
        asked = QUESTIONS[question]
        net = model.load_as(folder, asked.model_class(), unused=asked.unused).to(device).eval()
        quicken(net, device)
        self._folder, self._name = folder, question
        self._device, self._precision = device, precision
        self._batch_tokens = batch_tokens or _BATCH_TOKENS.get(device.type, _BATCH_TOKENS_GPU)
        self.decides = {
            "device": device.type,
            "batch tokens": self._batch_tokens,
            "tokenizer": tokenizer.tokenizer_hash(words),
            "configuration": files.digest(Path(folder) / "config.json"),
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

    def answer(self, rows, advance=lambda done: None):
        """[dict] for each of `rows` (Row or Example of rows): its fields, and what was asked as "prediction"."""
        question = self._question
        # One row may take several documents.
        documents = [row.documents if isinstance(row, Example) else question.documents(row) for row in rows]
        asked = [(number, document) for number, some in enumerate(documents) for document in some]
        lengths = np.array([question.size(ids) for _, (ids, *_) in asked], np.int64)
        longest_first = np.argsort(-lengths, kind="stable")
        found, left = [[] for _ in rows], np.bincount([number for number, _ in asked], minlength=len(rows))
        with torch.inference_mode():
            for group in filled(lengths[longest_first], self._batch_tokens):
                some, began = [asked[at] for at in longest_first[group]], time.perf_counter()
                with arithmetic(self._precision, self._device):
                    answers = list(question.ask([document for _, document in some], self._device))
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


def fingerprint(folder, question, precision, options):
    """What decides answers, in words, for a run that goes on where another was killed. Root only."""
    said = folder / checkpoint.COMPLETE
    if said.is_file():
        which = json.loads(said.read_text(encoding="utf-8"))["files"][lora.weights_file(folder).name]["sha256"]
    else:
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise MissingInput(f"{folder} has no weights in safetensors files")
        which = ", ".join(f"{file.name} {file.stat().st_size} bytes of {file.stat().st_mtime_ns}" for file in found)
    return {"model": which, "question": question, "precision": precision} | options


def predict_file(
    world,
    path,
    inputs,
    output,
    *,
    question=None,
    precision=None,
    overwrite=False,
    format=None,
    reference=None,
    **options,
):
    """Answers to all rows of `inputs` in the file `output`; returns a summary. Collective.

    path, question: as `what_is`; inputs: paths and globs, or a folder of shards; precision: "fp32" or "bf16", None:
    that of training; format: of rows.FORMATS; reference: of texts that are written, the column of what was wanted, for
    "scores" of the summary; options: of Model.
    """
    folder, question, usual = on_root(world.comm, what_is, path, question)
    precision = precision or usual
    if reference is not None:
        on_root(world.comm, _check_reference, question)
    asked = on_root(world.comm, fingerprint, folder, question, precision, options)
    with together(world.comm):
        asker = Model(folder, question, world.device, precision=precision, **options)
    prepared = on_root(world.comm, _shards, inputs, format, options)
    if prepared is not None:
        stream = shards.open_folder(prepared, comm=world.comm)
        with together(world.comm):
            inputs = asker.prepared(stream)
    how = {"format": format, "overwrite": overwrite, "columns": asker.columns, "fingerprint": asked | asker.decides}
    summary = answer_all(world, inputs=inputs, output=output, answer=asker.answer, **how)
    summary["batch_seconds"] = _percentiles(world.comm.allgather(asker.seconds))
    if reference is not None:
        summary["scores"] = on_root(world.comm, _scores, output, QUESTIONS[question].told, reference)
    return {"model": str(folder), "question": question, **summary}


def _shards(inputs, format, options):
    """The folder of shards that `inputs` are, None for files. Root only.

    Raises UsageError for other inputs beside it, and for what says how to read files.
    """
    folders = [path for path in inputs if os.path.isfile(os.path.join(path, shards.MANIFEST))]
    if not folders:
        return None
    if len(inputs) > 1:
        raise UsageError(f"input: {folders[0]} is a folder of shards; give it alone, and not {len(inputs)} inputs")
    columns = zip(("text-column", "pair-column"), options.get("columns", ()), strict=False)
    given = {"format": format, **dict(columns), "ask": options.get("ask")}
    useless = [name for name, value in given.items() if value is not None]
    if useless:
        raise UsageError(f"--{useless[0]} is for files, and {folders[0]} is a folder of shards")
    return os.path.normpath(folders[0])


def _percentiles(everybody):
    """Of the seconds that all ranks' batches took: {"count", "p50", "p95", "p99", "max"}; None without any."""
    seconds = np.concatenate([np.asarray(each, float) for each in everybody])
    if not len(seconds):
        return None
    found = {f"p{share}": round(float(np.percentile(seconds, share)), 4) for share in (50, 95, 99)}
    return {"count": len(seconds), **found, "max": round(float(seconds.max()), 4)}


def _check_reference(question):
    if not hasattr(QUESTIONS[question], "told"):
        raise UsageError(f"--reference-column: scores are of texts that a model writes, and {question} writes none")
    written.check()


def _scores(output, told, reference):
    """metrics.written.scores of the answers in the file `output`; a row has one text that was wanted, or a list."""
    pairs = []
    with open(output, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            answer = json.loads(line)
            wanted = answer.get(reference)
            wanted = [wanted] if isinstance(wanted, str) else wanted
            if not isinstance(wanted, list) or not wanted or not all(isinstance(text, str) for text in wanted):
                raise DataError(f'{output} line {number}: no text in "{reference}" to compare the answer with')
            pairs.append((wanted, answer["prediction"][told]))
    return written.scores(pairs)


class _Said:
    """A text of the command line, as a row."""

    def __init__(self, number, text):
        self.number, self.fields, self.offset = number, {"text": text}, number

    def refusal(self, why):
        return DataError(f"text {self.number + 1}: {why}")


def predict_texts(world, path, texts, *, question=None, precision=None, **options):
    """Answers to `texts` (list of str) in their order, on root; None on the other ranks. Collective.

    As predict_file; each text is a batch of its own, so its answer does not depend on the others'.
    """
    folder, question, usual = on_root(world.comm, what_is, path, question)
    with together(world.comm):
        asker = Model(folder, question, world.device, precision=precision or usual, **options)
        rows = [_Said(number, text) for number, text in enumerate(texts)]
        mine = [asker.answer([row])[0] for row in rows[world.rank :: world.size]]
    gathered = world.comm.gather(mine, root=0)
    if gathered is None:
        return None
    return [gathered[i % world.size][i // world.size] for i in range(len(texts))]


def show(answer):
    """An answer to a text as a person reads it."""
    text, said = answer["text"], answer["prediction"]
    if "continuation" in said:
        return f"{text} | {said['continuation']}"
    if "written" in said:
        return f"{text}\n    {said['written']}"
    if "masks" in said:
        told = "; ".join(
            ", ".join(f"{one['token']} {one['score']:.3f}" for one in guesses) for guesses in said["masks"]
        )
    elif "entities" in said:
        told = (
            ", ".join(f"{one['text']} ({one['type']}, {one['score']:.3f})" for one in said["entities"]) or "no entity"
        )
    elif "tags" in said:
        told = " ".join(f"{word}/{tag}" for word, tag in zip(said["words"], said["tags"], strict=True))
    elif "answer" in said:
        told = f"{said['answer'] or 'no answer'} ({said['score']:.3f})"
    elif "labels" in said:
        told = ", ".join(f"{one['label']} {one['score']:.3f}" for one in said["labels"])
    else:
        told = json.dumps(said)
    return f"{text}\n    {told}"
