"""What is learnt, one file a task.

A task of plain text has the functions that `masked_lm` documents, one of labelled data those of
`sequence_classification`; `scores` those alone whose answers are not text.
"""

from .. import names
from . import (
    causal_lm,
    dialogue,
    masked_lm,
    question_answering,
    seq2seq_lm,
    sequence_classification,
    token_classification,
)

_OF_LABELS = (sequence_classification, token_classification, question_answering, dialogue)
_MODULES = (masked_lm, causal_lm, seq2seq_lm, *_OF_LABELS)
TASKS = {module.__name__.rpartition(".")[2]: module for module in _MODULES}
assert TASKS.keys() == set(names.TASKS)
