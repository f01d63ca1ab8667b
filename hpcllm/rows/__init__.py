"""Millions of rows in, one answer a row out, in order, exactly once: the engine under `hpcllm predict`.

It knows nothing of models. `read` finds rows in files, `prepared` in shards, `queue` hands units of them to the ranks
that are free, `spool` keeps answers through a kill, and `engine` puts these in order.
"""

from .engine import answer_all
from .prepared import Example, Prepared
from .read import FORMATS, Row

__all__ = ["FORMATS", "Example", "Prepared", "Row", "answer_all"]
