"""Dialogues: turns as JSON has them, and the text that a tokenizer's chat template makes of them.

A template is Jinja, which transformers runs in its sandbox. Which parts of the text the assistant says the template
tells itself, by {% generation %} as transformers has it; else an answer is what a dialogue that ends with it has more
than the one before it, which ends with the call to answer (add_generation_prompt).
"""

import re

import numpy as np

from ..errors import DataError, MissingInput, UsageError
from ..files import failing_as_io, sync_files
from . import text, tokenizer

ASSISTANT = "assistant"
PLAIN = "plain"
# For tokenizers without a template, as those of base models are. What ends an answer ends a document, too.
_PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_ROLES = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT}  # as ShareGPT's files call them
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read(record, reading, unit, offset):
    """(what each turn says, None, who says it) of a line of JSON.

    It has a list of turns, {"role", "content"} or {"from", "value"} each, in the field of the text ("messages"), or two
    strings in those of text and label that `reading` (labelled.Reading) names, else in "prompt" and "completion".
    """
    field, _, answer = reading.named("jsonl")
    if reading.label is None and reading.text is None and field not in record and "prompt" in record:
        field = "prompt"
    value = text.field(record, field, unit, offset)
    if isinstance(value, str):
        return [value, text.string_field(record, answer, unit, offset)], None, ["user", ASSISTANT]
    try:
        said, roles = messages(value)
    except ValueError as error:
        raise text.refusal(unit, offset, f'"{field}": {error}') from None
    return said, None, roles


def messages(value):
    """(what each turn says, who says it) of a list of turns. Raises ValueError for anything else."""
    if not isinstance(value, list) or not value:
        raise ValueError("not a list of turns")
    said, roles = [], []
    for turn in value:
        names = ("role", "content") if isinstance(turn, dict) and "role" in turn else ("from", "value")
        role, content = (turn.get(name) for name in names) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f'turn {len(said) + 1} has no strings "role" and "content", nor "from" and "value"')
        said.append(content)
        roles.append(_ROLES.get(role, role))
    return said, roles


def chat(said, roles):
    """What `messages` said, as chat templates take it."""
    return [{"role": role, "content": one} for role, one in zip(roles, said, strict=True)]


def choose(folder, given=None):
    """What makes a Template, {"template": Jinja, "specials": {name: token}, "every": special tokens}; the tokenizer in
    `folder` then has it.

    given: "plain", or a file of Jinja, None: the tokenizer's own. Root only.
    """
    words = tokenizer.load(folder)
    if given is None and words.chat_template is None:
        raise UsageError(
            "chat-template: the tokenizer has none; name a file of Jinja, or plain for lines of User: and Assistant:"
        )
    if given is not None:
        words.chat_template = _PLAIN if given == PLAIN else _file(given)
        with failing_as_io(folder):
            words.save_pretrained(folder)
            sync_files(folder)
    specials = {name: str(token) for name, token in words.special_tokens_map.items() if isinstance(token, str)}
    if "eos_token" not in specials and given == PLAIN:
        raise UsageError("chat-template: plain ends an answer with the tokenizer's eos token, and it has none")
    every = sorted(str(token) for token in words.added_tokens_decoder.values() if token.special)
    return {"template": words.get_chat_template(), "specials": specials, "every": every}


def _file(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise MissingInput(f"chat-template: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat-template: {path} cannot be read: {error}") from None


class Template:
    """A chat template at work."""

    def __init__(self, encoder, template, specials, every):
        """encoder: tokenizers.Tokenizer; template, specials, every: as `choose` found them."""
        from transformers import PreTrainedTokenizerFast

        self._words = PreTrainedTokenizerFast(tokenizer_object=encoder, chat_template=template, **specials)
        self._marked = bool(_MARKED.search(template))
        self._every = re.compile("|".join(map(re.escape, every))) if every else None

    def encode(self, example, unit):
        """(token ids of a dialogue, for each whether it is of what the assistant says: 0 or 1).

        example: labelled.Example, of `unit`. Raises DataError where turns spell what the template's tokens stand for,
        or where the template cannot write them.
        """
        for number, content in enumerate(example.text, 1):
            spelt = self._every and self._every.search(content)
            if spelt:
                why = f"turn {number} spells the special token {spelt[0]}, which would be one"
                raise text.refusal(unit, example.offset, why)
        turns = chat(example.text, example.label)
        try:
            return self._by_marks(turns) if self._marked else self._by_beginnings(turns)
        except Exception as error:  # Jinja's, and what templates raise of themselves
            raise text.refusal(unit, example.offset, f"the chat template cannot write this dialogue: {error}") from None

    def _by_marks(self, turns):
        how = {"return_dict": True, "return_assistant_tokens_mask": True}
        found = self._words.apply_chat_template(turns, **how)
        return found["input_ids"], found["assistant_masks"]

    def _by_beginnings(self, turns):
        whole, answers = self._write(turns), []
        for number, turn in enumerate(turns):
            if turn["role"] == ASSISTANT:
                before = self._write(turns[:number], add_generation_prompt=True)
                after = self._write(turns[: number + 1]) if number + 1 < len(turns) else whole
                if not (after.startswith(before) and whole.startswith(after)):
                    raise ValueError(
                        f"it does not write turn {number + 1} behind what it writes of those before; have it mark "
                        "answers by {% generation %}"
                    )
                answers.append((len(before), len(after)))
        found = self._words(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], within(found["offset_mapping"], answers)

    def _write(self, turns, **how):
        return self._words.apply_chat_template(turns, tokenize=False, **how)


def within(offsets, parts):
    """For each token, [(begin, end)] in characters, 1 where its end lies within one of `parts`, else 0: uint8 [n].

    So a token of a blank and a word counts where the blank belongs to what the template writes.
    """
    begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    found = np.zeros(len(ends), np.uint8)
    for begin, end in parts:
        found |= ((begins < ends) & (begin < ends) & (ends <= end)).astype(np.uint8)
    return found
