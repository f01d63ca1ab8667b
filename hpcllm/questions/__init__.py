"""What can be asked of a model about a text: one class a question, each of which says how rows become batches of tokens
and what a model says of a batch.

`question` has what all have in common, `analyse` what is told of a text (labels, tags, answers in it, embeddings),
`generate` what is written.
"""

from .analyse import ClassifySequence, Embed, FillMask, FindAnswer, TagWords
from .generate import Continue, Reply, Write

QUESTIONS = {
    "masked_lm": FillMask,
    "causal_lm": Continue,
    "seq2seq_lm": Write,
    "dialogue": Reply,
    "sequence_classification": ClassifySequence,
    "token_classification": TagWords,
    "question_answering": FindAnswer,
    "embedding": Embed,
}
