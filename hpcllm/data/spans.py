"""Questions and texts as rows of tokens: windows over texts that are too long, and the tokens of an answer.

As in Devlin et al. 2019 (arXiv 1810.04805), section 4.2, and the code that goes with it: [CLS] question [SEP] text
[SEP], by the tokenizer's own template of pairs; windows of a text overlap; a window without the answer has it at the
first token, [CLS].
"""

import re
from typing import NamedTuple

import numpy as np

from ..errors import UsageError

QUESTION_TOKENS = 64  # of a longer question the end is cut, as in that code
STRIDE = 128  # tokens that a window has in common with the one before it


class Window(NamedTuple):
    """ids, segments: list of int [L]; begins, ends: int32 [L], of the text's tokens the characters of it that each
    stands for, -1 of all others."""

    ids: list
    segments: list
    begins: np.ndarray
    ends: np.ndarray

    @property
    def inside(self):
        """Numbers of the tokens that are of the text: int64 [n]."""
        return np.flatnonzero(self.begins >= 0)

    def tokens(self, first, end):
        """(first, last token) of the characters [first, end) of the text; (0, 0) where the window does not hold all."""
        inside = self.inside
        begins, ends = self.begins[inside], self.ends[inside]
        if not len(inside) or first < begins[0] or end > ends[-1]:
            return 0, 0
        # Characters of several tokens (of bytes) belong to all of them.
        one, other = np.searchsorted(ends, first, "right"), np.searchsorted(begins, end, "left") - 1
        return (int(inside[one]), int(inside[other])) if one <= other else (0, 0)


class Windows:
    """Pairs of a question and a text as windows of at most `max_tokens` tokens, special ones included."""

    def __init__(self, encoder, max_tokens, stride=None):
        """encoder: tokenizers.Tokenizer, whose truncation is set anew for each call; stride: tokens of the text that a
        window shares with the one before it, None: 128, or half of what is sure to have room."""
        room = max_tokens - encoder.num_special_tokens_to_add(True)
        self._encoder, self._max_tokens = encoder, max_tokens
        self._longest = min(QUESTION_TOKENS, room // 2)
        most = room - self._longest - 1
        self.stride = min(STRIDE, most // 2) if stride is None else stride
        if not 0 <= self.stride <= most:
            raise UsageError(f"stride: windows of {max_tokens} tokens share 0 to {most} of a text, not {self.stride}")

    def of(self, pairs):
        """Yield ([Window, ...], whether the question was cut) for each (question, text)."""
        self._encoder.no_truncation()
        alone = self._encoder.encode_batch([question for question, _ in pairs], add_special_tokens=False)
        short = [self._short(question, found) for (question, _), found in zip(pairs, alone, strict=True)]
        self._encoder.enable_truncation(self._max_tokens, stride=self.stride, strategy="only_second")
        whole = self._encoder.encode_batch([(one, text) for one, (_, text) in zip(short, pairs, strict=True)])
        for one, (question, _), found in zip(short, pairs, whole, strict=True):
            yield [_window(part) for part in (found, *found.overflowing)], one != question

    def _short(self, question, found):
        """As much of the beginning of a question as there is room for. found: its tokens."""
        if len(found.ids) <= self._longest:
            return question
        for last in range(self._longest, 0, -1):  # the end of a word may become other tokens, and more
            begin = question[: found.offsets[last - 1][1]]
            if len(self._encoder.encode(begin, add_special_tokens=False).ids) <= self._longest:
                return begin
        return ""


def _window(found):
    offsets = np.array(found.offsets, np.int32).reshape(-1, 2)
    offsets[[number != 1 for number in found.sequence_ids]] = -1
    return Window(found.ids, found.type_ids, *offsets.T)


def place(text, answer, start):
    """(first character, end) of an answer that begins at character `start` of a text; None where it does not stand
    there. Blanks at its ends and their number within it, and whether letters are large, do not matter."""
    if not 0 <= start < len(text):
        return None
    if text.startswith(answer, start) and answer == answer.strip():
        return start, start + len(answer)
    words = r"\s+".join(map(re.escape, answer.split()))
    found = re.compile(rf"\s*({words})", re.IGNORECASE).match(text, start)
    return found and found.span(1)
