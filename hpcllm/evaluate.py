"""How good a model is on held-out samples: each counted once, at any number of ranks."""

import contextlib
import importlib.util
import itertools
import math
from pathlib import Path

import torch
import torch.distributed as dist

from . import attention, files
from .metrics import picture
from .parallel import context
from .parallel.runner import Work


def arithmetic(precision, device):
    """Context in which forward runs: autocast to bfloat16, or plain fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def of_task(source, placed, precision, score=False):
    """The Work (parallel.runner) of the task of a data.batches.Source or data.examples.Examples on its micro-batches.

    placed: parallel.apply.Placed that it is for, whose ranks may have parts of the sequences.

    Its loss is the task's `loss_sum`'s first value; with `score` it is both.
    """
    task, device, mesh = source.task, placed.device, placed.mesh
    # What is measured is the plain loss, however training weighs it.
    options = {} if score else source.loss_options
    options = _on(device, options)

    def inputs(batch):
        given = _on(device, task.inputs(batch.inputs, batch.labels, placed.config))
        return context.inputs(attention.inputs(given, batch.positions, device), mesh)

    def loss(net, batch):
        found = task.loss_sum(net, inputs(batch), context.part(batch.labels.to(device), mesh), score, **options)
        return found if score else found[0]

    return Work(inputs, loss, lambda batch: None if score else batch.seed, lambda: arithmetic(precision, device))


def _on(device, values):
    """A dict's tensors on `device`, the rest as it is."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in values.items()}


def evaluate(placed, source, width, precision, prefix="eval", between=None):
    """How good `placed` (parallel.apply.Placed) is on all of `source`, {f"{prefix}_{metric}": number}, and a report.

    width: samples per forward. The report is (text table, confusion matrix or None) of tasks that have scores of their
    own, None where answers are text, of which there are mean loss per target (nats), perplexity and accuracy.
    between: called after every few batches, by all ranks after the same ones; what it raises breaks this off.
    Collective.
    """
    placed.train(False)
    work = _labelled if hasattr(source.task, "scores") else _text
    try:
        scores, report = work(placed, source, _results(placed, source, width, precision, between))
    finally:
        placed.train()
        placed.reshard()
    return {f"{prefix}_{name}": value for name, value in scores.items()}, report


def _results(placed, source, width, precision, between):
    """Yield (batch, what the task says of it, on ranks of the last stage) for this rank's part of `source`."""
    data, nothing = placed.mesh.data, source.nothing()
    work = of_task(source, placed, precision, score=True)
    batches = source.validation(data.rank, data.size, width)
    # Enough at a time to keep a pipeline full.
    windows = iter(lambda: list(itertools.islice(batches, 4 * placed.mesh.layout.pipeline)), [])
    for number, window in enumerate(windows):
        if between and number:
            between()
        window = [batch if batch.samples else nothing for batch in window if batch.samples or placed.divided]
        results = placed.runner.run(window, work)
        yield from itertools.zip_longest(window, results)  # no results but of the last stage


def _text(placed, source, results):
    """Sums of the batches meet at the end, and are added up and rounded once: the same at any number of ranks."""
    once = placed.mesh.place["context"] == 0  # what a batch counts, not its parts
    losses, counts = [], torch.zeros(3, dtype=torch.int64)  # right, targets, samples
    for batch, result in results:
        if result is not None and batch.samples:
            losses.append(result[0].item())
            counts += torch.tensor([int(result[1]), once * int(batch.targets), once * batch.samples])
    dist.all_reduce(counts, group=placed.mesh.losses)
    right, targets, samples = counts.tolist()
    mean = _sum(_everybodys(losses, placed)) / max(targets, 1)
    scores = {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "accuracy": right / max(targets, 1),
        "targets": targets,
        "samples": samples,
    }
    return scores, None


def _everybodys(value, placed):
    """What each rank that has losses gave as `value`, in their order. Collective over these."""
    everybody = [None] * dist.get_world_size(placed.mesh.losses)
    dist.all_gather_object(everybody, value, group=placed.mesh.losses)
    return everybody


def _sum(numbers):
    """The sum of lists of numbers, rounded once, so that it does not matter which list has which."""
    return math.fsum(number for each in numbers for number in each)


def _labelled(placed, source, results):
    """Answers meet, and metrics are of all of them in the examples' order: the same at any number of ranks."""
    mine, losses = {}, []
    for batch, result in results:
        if result is not None and batch.samples:
            losses.append((result[0].item(), source.task.weight(batch.labels, None)))
            found = source.task.answers(batch, result[1].cpu(), source)
            mine.update(zip(batch.numbers.tolist(), found, strict=True))
    everybody = _everybodys((mine, losses), placed)
    answers = {number: answer for each, _ in everybody for number, answer in each.items()}
    answers = source.task.whole([answers[number] for number in range(len(source))], source)
    numbers, text, matrix = source.task.scores(answers, source.meaning)
    loss, targets = (_sum([one[side] for one in some] for _, some in everybody) for side in (0, 1))
    scores = {"loss": loss / (targets or 1), **numbers, "samples": len(answers)}
    return scores, (text, matrix)


def write(folder, prefix, scores, report, meaning):
    """`prefix`_results.json, and of a report _report.txt and, where matplotlib is, _confusion.png. Root only."""
    files.write_json(Path(folder) / f"{prefix}_results.json", scores)
    if report is None:
        return
    text, matrix = report
    files.write_text(Path(folder) / f"{prefix}_report.txt", text + "\n")
    if matrix is not None and importlib.util.find_spec("matplotlib"):
        picture.confusion_picture(matrix, meaning["names"], str(Path(folder) / f"{prefix}_confusion.png"))
