"""What is learnt, one file a task.

A task of plain text has the functions that `masked_lm` documents, one of labelled data those of
`sequence_classification`; `scores` those alone whose answers are not text.
"""

from .. import names
from . import causal_lm, dialogue, masked_lm, seq2seq_lm, sequence_classification, token_classification

_MODULES = (masked_lm, causal_lm, seq2seq_lm, sequence_classification, token_classification, dialogue)
TASKS = {module.__name__.rpartition(".")[2]: module for module in _MODULES}
assert TASKS.keys() == set(names.TASKS)
