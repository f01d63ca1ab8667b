"""Ask a model about rows of text, on all ranks: what is asked is in `questions`, who answers which rows in `rows`.

A unit's rows are encoded together, and computed in batches of about as many padded tokens each, the longest first. How
they are put together depends on the rows alone, so that answers are the same bytes at any number of ranks.
"""

import json
import os
from pathlib import Path

import numpy as np

from . import checkpoint, files, lora, model
from .data import shards
from .errors import DataError, MissingInput, UsageError
from .metrics import written
from .mpi import on_root, teams, together
from .questions import QUESTIONS
from .questions.asker import Asker
from .rows import answer_all
from .run_folder import run_config

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
        names = model.read_config(folder).get("architectures") or [""]
        own = next((task for ending, task in _ENDINGS.items() if str(names[0]).endswith(ending)), None)
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


def fingerprint(folder, question, precision, options):
    """What decides answers, in words, for a run that goes on where another was killed. Root only."""
    with files.failing_as_io(folder):
        return {"model": _weights(folder), "question": question, "precision": precision} | options


def _weights(folder):
    said = folder / checkpoint.COMPLETE
    if said.is_file():
        return json.loads(said.read_text(encoding="utf-8"))["files"][lora.weights_file(folder).name]["sha256"]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise MissingInput(f"{folder} has no weights in safetensors files")
    return ", ".join(f"{file.name} {file.stat().st_size} bytes of {file.stat().st_mtime_ns}" for file in found)


def predict_file(
    world,
    path,
    inputs,
    output,
    *,
    question=None,
    precision=None,
    tensor=1,
    overwrite=False,
    format=None,
    reference=None,
    **options,
):
    """Answers to all rows of `inputs` in the file `output`; returns a summary. Collective.

    path, question: as `what_is`; inputs: paths and globs, or a folder of shards; precision: "fp32" or "bf16", None:
    that of training; tensor: so many ranks in a row hold the model between them; format: of rows.FORMATS; reference: of
    texts that are written, the column of what was wanted, for "scores" of the summary; options: of Asker.
    """
    folder, question, usual = on_root(world.comm, what_is, path, question)
    precision = precision or usual
    if reference is not None:
        on_root(world.comm, _check_reference, question)
    asked = on_root(world.comm, fingerprint, folder, question, precision, options)
    team, leaders = teams(world, tensor)
    with together(world.comm):
        asker = Asker(folder, question, team, precision=precision, **options)
    prepared = on_root(world.comm, _shards, inputs, format, options)
    if prepared is not None:
        stream = shards.open_folder(prepared, comm=world.comm)
        with together(world.comm):
            inputs = asker.prepared(stream)
    how = {"format": format, "overwrite": overwrite, "columns": asker.columns, "fingerprint": asked | asker.decides}
    summary = asker.lead(lambda: answer_all(leaders, inputs=inputs, output=output, answer=asker.answer, **how))
    summary = world.comm.bcast(summary)
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


def predict_texts(world, path, texts, *, question=None, precision=None, tensor=1, **options):
    """Answers to `texts` (list of str) in their order, on root; None on the other ranks. Collective.

    As predict_file; each text is a batch of its own, so its answer does not depend on the others'.
    """
    folder, question, usual = on_root(world.comm, what_is, path, question)
    team, leaders = teams(world, tensor)
    rows = [_Said(number, text) for number, text in enumerate(texts)][leaders.rank :: leaders.size]
    with together(world.comm):
        asker = Asker(folder, question, team, precision=precision or usual, **options)
    with together(world.comm):
        mine = asker.lead(lambda: [asker.answer([row])[0] for row in rows])
    gathered = leaders.comm.gather(mine, root=0)
    if not world.is_root:
        return None
    return [gathered[i % leaders.size][i // leaders.size] for i in range(len(texts))]


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
