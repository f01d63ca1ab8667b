"""What is learnt, one file a task.

A task of plain text has the functions that `masked_lm` documents, one of labelled data those of
`sequence_classification`.
"""

from . import causal_lm, masked_lm, sequence_classification, token_classification

TASKS = {
    "masked_lm": masked_lm,
    "causal_lm": causal_lm,
    "sequence_classification": sequence_classification,
    "token_classification": token_classification,
}
