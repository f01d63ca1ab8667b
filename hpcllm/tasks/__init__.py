"""What is learnt, one file a task. A task module has the functions that `masked_lm` documents."""

from . import causal_lm, masked_lm

TASKS = {
    "masked_lm": masked_lm,
    "causal_lm": causal_lm,
}
