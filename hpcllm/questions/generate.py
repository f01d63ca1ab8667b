"""What a model writes: how a text goes on, a text from a text, what an assistant replies. Token by token."""

import os
import zlib

import numpy as np
import torch

from ..data import order
from ..data.turns import chat, messages
from ..errors import UsageError
from ..tasks import TASKS
from .question import Question, check_top_k

MESSAGES = "messages"  # the field that has the turns of a dialogue


class Continue(Question):
    """What comes next: {"continuation"}. Greedy, or drawn (temperature above 0), or by beams.

    What is drawn for a row depends on seed, file name and place of the row in it: it is the likeliest token after a
    Gumbel number for each was added to its logit, which draws from the softmax (Gumbel 1954; Maddison et al. 2014).
    """

    def __init__(
        self, net, words, *, max_new_tokens=40, temperature=0.0, top_k=None, top_p=1.0, beams=1, seed=0, **common
    ):
        super().__init__(net, words, **common)
        if max_new_tokens < 1 or beams < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise UsageError(
                f"--max-new-tokens ({max_new_tokens}) and --beams ({beams}) count from 1, "
                f"--temperature ({temperature}) from 0, --top-p ({top_p}) is above 0 and at most 1"
            )
        if beams > 1 and temperature > 0:
            raise UsageError("--beams look for the likeliest text, --temperature draws one; give one of them")
        if top_k is not None:
            check_top_k(top_k, len(words))
        if not net.config.is_encoder_decoder:  # there what is written has places of its own
            self.places -= max_new_tokens
        self._new, self._beams, self._seed = max_new_tokens, beams, seed
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p

    model_class = staticmethod(TASKS["causal_lm"].model_class)
    told, strips = "continuation", ""  # what the answer is called, and what may stand around it

    def size(self, ids):
        return (len(ids) + self._new) * self._beams

    def documents(self, row):
        source = getattr(row, "source", None)
        return [(*self.whole(row), self._key(source.path if source else "", row.offset))]

    def _key(self, path, place):
        """What decides what is drawn for the row at `place` of a file."""
        return order.key(self._seed, zlib.crc32(os.path.basename(path).encode()), place)

    def ask(self, documents, device):
        encodes = self.net.config.is_encoder_decoder
        given = self.inputs(documents, device, left=not encodes)
        given.pop("token_type_ids", None)
        start = 1 if encodes else given["input_ids"].shape[1]
        how = {"do_sample": False, "num_beams": self._beams, "max_new_tokens": self._new, "pad_token_id": self.pad}
        if self._temperature:
            keys = np.array([key for *_, key in documents], np.uint64)
            how["logits_processor"] = [self._draw(keys, start)]
        made = self.net.generate(**given, **how)
        for ids in made[:, start:].tolist():
            yield {self.told: self.words.decode(ids, skip_special_tokens=True).strip(self.strips)}

    def _draw(self, keys, start):
        """Draws, where `start` places of what a model wrote were there before it."""
        from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

        likely = LogitsProcessorList()
        if self._top_k is not None:
            likely.append(TopKLogitsWarper(self._top_k))
        if self._top_p < 1:
            likely.append(TopPLogitsWarper(self._top_p))

        def draw(tokens, logits):
            logits = likely(tokens, logits.float() / self._temperature)
            uniform = order.uniform(order.key(keys, tokens.shape[1] - start), logits.shape[1])
            gumbel = -np.log(-np.log(np.clip(uniform, 2.0**-53, 1 - 2.0**-53)))
            return logits + torch.from_numpy(gumbel).to(logits)

        return draw


class Write(Continue):
    """A text from a text, by a model with encoder and decoder: {"written"}."""

    told, kinds = "written", ("text",)
    model_class = staticmethod(TASKS["seq2seq_lm"].model_class)

    def example(self, found, first, documents):
        [(ids, beside)] = found
        [second] = beside["second"].tolist()
        source, target = ("".join(self.spelt(part)) for part in (ids[:second], ids[second:]))
        key = self._key(documents.stream.folder, first)
        return {"source": source, "target": target}, [(ids[:second], None, key)]


class Reply(Continue):
    """What an assistant says next: {"reply"}. A row has turns in its field `messages`, or a text, which a user says."""

    told, strips = "reply", " \n"

    def __init__(self, net, words, **options):
        super().__init__(net, words, **options)
        if words.chat_template is None:
            raise UsageError("the tokenizer of this model has no chat template; --task causal_lm goes on with texts")
        self._column, self.columns = self.columns[0], ()  # a row has it, or messages

    def whole(self, row):
        said = row.fields.get(MESSAGES, [{"role": "user", "content": row.fields.get(self._column)}])
        try:
            turns = chat(*messages(said))
            prompt = self.words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # Jinja's, and what templates raise of themselves, are among them
            raise row.refusal(f'"{MESSAGES}" or the text "{self._column}": {error}') from None
        return self.fitting(row, self.words(prompt, add_special_tokens=False, verbose=False)["input_ids"]), None
