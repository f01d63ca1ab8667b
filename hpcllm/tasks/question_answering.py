"""Where in a text the answer to a question stands (SQuAD 1.1: Rajpurkar et al. 2016, arXiv 1606.05250; 2.0: Rajpurkar,
Jia and Liang 2018, arXiv 1806.03822).

As in Devlin et al. 2019 (arXiv 1810.04805), sections 4.2 and 4.3: two numbers for each token, how likely it is an
answer's first and its last one; the answer is the span of the text with the largest sum. That of the first token
([CLS]) stands for no answer. Of a text in windows the best window counts.
"""

from itertools import pairwise

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.nn import functional

from ..errors import UsageError
from ..metrics.answers import squad1, squad2
from . import labelled

KINDS = ("span",)
ANSWER_TOKENS = 30  # of the longest answer that is looked for, as in the code of Devlin et al.


def model_class():
    """The transformers class that builds and loads models for this task."""
    from transformers import AutoModelForQuestionAnswering

    return AutoModelForQuestionAnswering


def check(vocabulary):
    """Any tokenizer will do."""


def head(meaning):
    """What a model's configuration says of its two numbers a token, {argument: value}."""
    labelled.require(meaning, KINDS, "question_answering")
    return labelled.named(["start", "end"], 2)


def labels(columns, width, meaning):
    """Targets of a micro-batch from its examples' columns: int64 [B, 2], first and last token."""
    return np.stack(columns).astype(np.int64)


def weight(targets, class_weights):
    """What the loss of a micro-batch is divided by: its windows."""
    return float(len(targets))


collate, inputs, target_fraction = labelled.collate(labels), labelled.inputs, labelled.target_fraction


def loss_sum(model, given, targets, score=False):
    """(sum of the windows' losses, with `score` what the model says of each token, float32 [B, 2, L]: else None).

    A window's loss is the mean of the cross entropies of first and last token over all of its tokens, special ones and
    the question's included, as transformers has it; but padding is none of them, or it would depend on the batch.
    """
    output = model(**given)
    logits = torch.stack([output.start_logits, output.end_logits], 1).float()
    logits = logits.masked_fill(given["attention_mask"].unsqueeze(1) == 0, -torch.inf)
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 2
    return loss, logits if score else None


def best(first, last, inside):
    """(sum of the two numbers, first, last token) of the likeliest answer among the tokens `inside` (int [n], n >= 1).

    first, last: float [L], of each token. Of all spans of at most ANSWER_TOKENS; of equals the earliest, then the
    shortest.
    """
    first, last = (one[inside].astype(np.float64) for one in (first, last))
    reach = sliding_window_view(np.append(last, np.full(ANSWER_TOKENS - 1, -np.inf)), ANSWER_TOKENS)
    sums = first[:, None] + reach
    begin, more = divmod(int(sums.argmax()), ANSWER_TOKENS)
    return float(sums[begin, more]), int(inside[begin]), int(inside[begin + more])


def nothing(first, last):
    """What the model says of there being no answer, to compare with the sum of the likeliest."""
    return float(first[0]) + float(last[0])


def answers(batch, found, examples):
    """[(sum of the likeliest answer, that of none, its text, gold answers)] of each window of a micro-batch."""
    told = []
    rows = zip(batch.numbers.tolist(), found.numpy(), examples.rows(batch.numbers), strict=True)
    for number, logits, (_, beside) in rows:
        asked = examples.texts.of(number)
        total, one, other = best(*logits, np.flatnonzero(beside["begins"] >= 0))
        said = asked["context"][beside["begins"][one] : beside["ends"][other]]
        told.append((total, nothing(*logits), said, asked["answers"]))
    return told


def whole(answers, examples):
    """[(answer, how much surer the model is that there is none, gold answers)] of the questions, windows being joined.

    What says of there being none that it is unlikely, in any window, is believed.
    """
    return [_joined(answers[begin:end]) for begin, end in pairwise(examples.borders.tolist())]


def _joined(windows):
    total, _, said, golds = max(windows, key=lambda window: window[0])  # the first of equals
    return said, min(none for _, none, *_ in windows) - total, golds


def scores(answers, meaning):
    """({metric: number}, text table, None) of all questions' answers, as SQuAD's evaluation scripts count.

    Where some question of the data has no answer these are those of SQuAD 2.0, for which nothing is said where the
    model is surer of that, else those of 1.1.
    """
    said, surer, golds = zip(*answers, strict=True)
    if meaning["version"] == 1:
        numbers = squad1(golds, said)
        shown = [("all", numbers["exact_match"], numbers["f1"], len(golds))]
    else:
        numbers = squad2(golds, said, surer, threshold=0.0)
        parts = {"all": "", "with an answer": "HasAns_", "without one": "NoAns_"}
        parts = {text: prefix for text, prefix in parts.items() if f"{prefix}total" in numbers}
        shown = [(text, *(numbers[prefix + key] for key in ("exact", "f1", "total"))) for text, prefix in parts.items()]
    rows = [f"{text:>14} {exact:9.2f} {f1:9.2f} {count:9,}" for text, exact, f1, count in shown]
    return numbers, "\n".join([f"{'':14} {'exact':>9} {'f1':>9} {'questions':>9}", *rows]), None


def metrics(meaning):
    """Names of the numbers in `scores` that there are for any questions."""
    found, *_ = scores([("", 0.0, ["a"])], meaning)
    return [name for name in found if not name.startswith("HasAns_")]


def check_loss(meaning, class_weights, label_smoothing):
    """Raise UsageError for what this loss has none of."""
    if class_weights is not None or label_smoothing:
        raise UsageError("train: class_weights and label_smoothing are for labels that have names, not for answers")
