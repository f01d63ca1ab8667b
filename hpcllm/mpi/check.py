"""Checking mode, HPCLLM_CHECK=1: before a collective, its ranks compare what they are about to call.

Finds calls that do not fit together (another operation, shape, dtype, reduction or root) before they hang or give
nonsense, and names both lines of code. Costs a small all-gather for every collective.
"""

import hashlib
import os
import sys
import time

import numpy as np
import torch

from .progress import BETWEEN_TWO

# What a rank sends: a digest of what must agree, then the call and its place in the code in words, cut to fit.
_DIGEST, _BYTES = 16, 512


class MismatchedCalls(RuntimeError):
    """The ranks of a group have called different things; every rank raises this with the same words."""


def wanted(environ=os.environ):
    """True where the user has switched the checking on."""
    return environ.get("HPCLLM_CHECK", "") not in ("", "0")


def _spell(tensors):
    """Shapes and dtypes of tensors in lists of lists."""
    if isinstance(tensors, (list, tuple)):
        return f"[{', '.join(map(_spell, tensors))}]"
    return f"{str(tensors.dtype).removeprefix('torch.')}{list(tensors.shape)}"


def _kinds(tensors):
    """Dtypes alone, where shapes may differ between ranks."""
    while isinstance(tensors, (list, tuple)):
        if not tensors:
            return "nothing"
        tensors = tensors[0]
    return str(tensors.dtype).removeprefix("torch.")


# What must be the same on all ranks: argument (counted from 0) -> how much of it. An all-gather or a gather may have
# inputs of uneven sizes, what is scattered and gathered is known to root alone, all-to-all is as uneven as can be.
_COMPARED = {
    "broadcast": {0: _spell},
    "all_reduce": {0: _spell},
    "reduce": {0: _spell},
    "all_gather": {0: _spell},
    "all_gather_coalesced": {0: _spell},
    "all_gather_into_tensor": {0: _spell, 1: _spell},
    "gather": {1: _spell},
    "scatter": {0: _spell},
    "reduce_scatter": {1: _spell},
    "reduce_scatter_tensor": {0: _spell, 1: _spell},
    "all_to_all": {1: _kinds},
    "all_to_all_single": {1: _kinds},
    "barrier": {},
}


def describe(op, arguments):
    """The part of a call that must be the same on all ranks, in words."""
    parts = [op]
    for index, spell in _COMPARED.get(op, {}).items():
        parts.append(spell(arguments[index]))
    options = arguments[-1] if arguments else None
    reduction = getattr(options, "reduceOp", None)
    if reduction is not None:
        from .reduce import kind_of

        parts.append(kind_of(reduction)[0])
    if op in ("broadcast", "reduce", "gather", "scatter"):
        parts.append(f"root {options.rootRank}")
    return " ".join(parts)


def call_site():
    """File and line of the nearest caller that is neither torch's nor this package's."""
    inside = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep, "<")
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(inside):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "no line of Python (autograd's own thread)"


def fingerprint(op, sequence, arguments, place):
    """What `compare` wants of each rank: `_BYTES` bytes."""
    what = describe(op, arguments)
    digest = hashlib.blake2b(f"{sequence} {what}".encode(), digest_size=_DIGEST).digest()
    where = place.encode()[-200:]
    room = _BYTES - _DIGEST - len(where) - 32
    words = what if len(what) <= room else what[: room - 3] + "..."
    return (digest + f"#{sequence} {words}\0".encode() + where).ljust(_BYTES, b"\0")[:_BYTES]


def compare(fingerprints):
    """The sentence for ranks that have called different things, None where all agree. fingerprints: by group rank."""
    calls = {}
    for rank, one in enumerate(fingerprints):
        what, where = (part.decode(errors="replace") for part in one[_DIGEST:].split(b"\0")[:2])
        calls.setdefault(one[:_DIGEST], []).append((rank, what, where))
    if len(calls) == 1:
        return None
    told = []
    for same in list(calls.values())[:4]:
        ranks = ", ".join(str(rank) for rank, *_ in same[:8]) + (", ..." if len(same) > 8 else "")
        told.append(f"rank{'s' if len(same) > 1 else ''} {ranks}: {same[0][1]} at {same[0][2]}")
    more = f"\n  and {len(calls) - 4} other calls" if len(calls) > 4 else ""
    return "the ranks of a group call different collectives:\n  " + "\n  ".join(told) + more


class Checker:
    """Compares the calls of one group. Made by its ranks with their first collective (collective)."""

    def __init__(self, comm):
        self._comm, self._sequence = comm.Dup(), 0

    def check(self, op, arguments):
        """Raise MismatchedCalls on every rank where the ranks do not call the same. Collective."""
        self._sequence += 1
        mine = np.frombuffer(fingerprint(op, self._sequence, arguments, call_site()), dtype=np.uint8)
        everybody = np.empty((self._comm.size, _BYTES), dtype=np.uint8)
        request = self._comm.Iallgather(mine, everybody)
        pause = 1e-5
        while not request.Test():
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)
        sentence = compare([row.tobytes() for row in everybody])
        if sentence:
            raise MismatchedCalls(sentence)

    def free(self):
        """Free the communicator (collective)."""
        if self._comm:
            self._comm.Free()


def check(group, op, arguments):
    """What `work.timed` calls for each operation of `group` when the checking is on."""
    if op in BETWEEN_TWO:
        return
    if group.checker is None:
        group.checker = Checker(group.comm)
    group.checker.check(op, arguments)
