"""Dialogue and instruction tuning: of a conversation what the assistant says is learnt, as Ouyang et al. 2022 (arXiv
2203.02155), section 3.4, fine-tune. The rest is read, and is no target.

`hpcllm prepare --task dialogue` writes conversations down by the tokenizer's chat template, one a document.
"""

import numpy as np

from ..data.encode import NO_LABEL
from . import causal_lm, labelled

KINDS = ("turns",)

model_class, check = causal_lm.model_class, causal_lm.check
inputs, loss_sum, target_fraction = causal_lm.inputs, causal_lm.loss_sum, causal_lm.target_fraction
weight, metrics, check_loss = labelled.words, labelled.metrics_of_words, labelled.check_loss_of_words


def head(meaning):
    """What a model's configuration says of labels: nothing."""
    labelled.require(meaning, KINDS, "dialogue")
    return {}


def collate(found, examples):
    """({model's argument: int64 [B, L]}, targets: int64 [B, L]) of [(tokens, columns)]: labels[:, t] is the token after
    input_ids[:, t] where the assistant says it, else -100."""
    given = labelled.padded([tokens for tokens, _ in found], examples)
    given.pop("token_type_ids", None)
    targets = np.full_like(given["input_ids"], NO_LABEL)
    for row, (tokens, beside) in enumerate(found):
        targets[row, : len(tokens) - 1] = np.where(beside["learnt"][1:], tokens[1:], NO_LABEL)
    return given, targets
