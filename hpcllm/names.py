"""Names of tasks and of what their labels are, where neither torch nor transformers is needed. `tasks` does them."""

# Tasks that learn from text as `hpcllm prepare` wrote it, and from examples as `hpcllm prepare --task` did.
OF_TEXT = ("masked_lm", "causal_lm", "seq2seq_lm")
OF_EXAMPLES = ("sequence_classification", "token_classification", "question_answering", "seq2seq_lm", "dialogue")
TASKS = tuple(dict.fromkeys((*OF_TEXT, *OF_EXAMPLES)))

# Kinds of labels by task; those of sequence_classification are of three kinds, which the user says.
KIND = {"token_classification": "tags", "question_answering": "span", "seq2seq_lm": "text", "dialogue": "turns"}
