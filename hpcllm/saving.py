"""Checkpoints that are written while training goes on: it waits until they are copied, or not at all.

What a checkpoint holds changes only where the optimizer steps, so the copy is made while the next step's forward and
backward run, and the optimizer waits for what is left of it (as in CheckFreq, Mohan et al. 2021, and DataStates-LLM,
Maurya et al. 2024). Then each rank writes its pieces into files that are there at their full length. Ranks tell each
other that they are done with the sums at the edge of a step (`monitor.Clock.collect`); then they share out the reading
of what was written, for its digests, and root gives the folder its name. The threads here never call MPI.

Older checkpoints are deleted only when all of the new one has been read back, which the ranks share out too: digests
are mostly taken from memory, and what a disk has made of it is known to nobody before. (What went through the page
cache may come from there.)

What is not finite is never kept: where a rank finds such a number in what it has to write, there is no checkpoint of
that step.
"""

import contextlib
import itertools
import math
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import blocks, checkpoint, files
from .errors import Refusal
from .mpi import agree, on_root, together

# What a rank tells the others of what it has in hand.
_READY, _UNFIT, _BUSY, _FAILED = 0, 1, 2, 3


class Saver:
    """Writes checkpoints of `placed` (parallel.apply.Placed) and its optimizer below `output_dir`, one at a time.

    comm: of all ranks; tokenizer_dir, keep: as in the run file; newest: path of the newest checkpoint that is complete;
    completed: called for each with (step, path, seconds that this rank worked at it, how many its training waited);
    unfit: called with the step of one that is not written, since not all numbers are finite; doubted: called with an
    error, the same on all ranks, and the path of one that a rank could not read back, or has not read as it was
    written, or whose elders could not be deleted.
    Every method but `hold`, `report` and `abandon` is collective.
    """

    def __init__(
        self, comm, placed, optimizer, output_dir, tokenizer_dir, keep, newest=None, completed=None, unfit=None,
        doubted=None,
    ):  # fmt: skip
        self._comm, self._output, self._placed, self._optimizer = comm, Path(output_dir), placed, optimizer
        self._keep, self.newest = keep, newest
        with together(comm):  # now: the folder may be gone by the time it is wanted
            self._words = checkpoint.tokenizer_files(tokenizer_dir) if comm.rank == 0 else None
        self._completed, self._unfit, self._doubted = completed, unfit, doubted
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hpcllm-save")
        # Of what is under way, the same on all ranks: its path as long as it is not complete, and where in `_course` it
        # is, None when that is over. `_at_work`: what this rank's thread has to do for it.
        self._path = self._course = self._stage = self._at_work = None
        self._whole, self._settling_s = True, 0.0
        self._copied, self._memory = threading.Event(), blocks.Memory()

    def begin(self, step, state, best=None, copy=True):
        """Start to write `checkpoint-<step>`, once what is under way is settled; returns while that goes on.

        state: JSON-able dict that `checkpoint.read_state` gives back; best: step of a checkpoint that is kept in any
        case; copy: False writes from the model itself, in whose way `hold` then is until all is written, without the
        memory for a copy of what this rank writes. Raises IOFailure, the same on every rank, where the disk has no
        room; what was there stays.
        """
        self.settle()
        began, self._worked_s = time.monotonic(), 0.0
        self._placed.reshard()
        contents = checkpoint.contents(self._placed, self._optimizer)
        outlines = {file: checkpoint.outline(self._placed, held) for file, held in contents.items()}
        # After what is collective above: where ranks die there, nothing is under way.
        self._path, self._step, self._state, self._best = self._output / f"checkpoint-{step}", step, state, best
        self._copied.clear()
        ready = self._pool.submit(self._timed, self._gather, contents, outlines, copy)  # while root makes the files
        try:
            self._hidden = on_root(self._comm, checkpoint.begin, self._path, outlines)
        except BaseException:
            ready.exception()  # waits: what a copy is made of may change from now on
            self._path = None
            raise
        self._course = self._stages(ready, outlines)
        self._go_on()
        self._waited_s, self._settling_s = self._settling_s + time.monotonic() - began, 0.0

    def _stages(self, ready, outlines):
        """What becomes of a checkpoint: yields (stage, what this rank does in it, None for nothing), and is sent what
        came of that when all ranks have done theirs. Collective in between."""
        known = yield "write", (self._timed, self._write, ready, outlines)
        del ready, outlines  # which may hold tensors
        left = _unread(self._comm, self._hidden, known)
        known = yield "digest", (self._timed, self._digest, known, left)
        known = self._comm.gather(known, root=0)
        is_root = self._comm.rank == 0
        yield "commit", (self._timed, self._commit, known) if is_root else None
        self.newest, self._path, self._whole = self._path, None, True
        yield "complete", None
        yield "read", (checkpoint.verify, self.newest, (self._comm.rank, self._comm.size))
        yield "delete", (checkpoint.delete_older, self._output, self._keep, self._best) if is_root else None

    def _go_on(self, done=None):
        self._stage, work = self._course.send(done)
        self._at_work = work and self._pool.submit(*work)

    @property
    def under_way(self):
        """True while a checkpoint is being written, or read back."""
        return self._stage is not None

    def hold(self):
        """Wait until what is being saved may change: to be called before the optimizer's step."""
        if self._path is not None:
            began = time.monotonic()
            self._copied.wait()
            self._waited_s += time.monotonic() - began

    def report(self):
        """A number for how far this rank is, the largest of all ranks' being for `advance`."""
        if self._at_work is None:
            return _READY
        if not self._at_work.done():
            return _BUSY
        if self._at_work.exception():
            return _FAILED
        return _UNFIT if self._at_work.result() is False else _READY

    def advance(self, largest):
        """Go on where all ranks are ready. Raises what failed on any, on all; the checkpoints that were there stay."""
        if not self.under_way or largest == _BUSY:
            return
        if largest == _FAILED:
            try:
                agree(self._comm, self._at_work and self._at_work.exception())  # which waits for those still at work
            except Refusal as error:
                complete, reading = self._path is None, self._stage == "read"
                self._drop()
                if not complete:
                    raise
                self._doubt(error, reading)
        elif largest == _UNFIT:
            self._drop()
            if self._unfit:
                self._unfit(self._step)
        else:
            try:
                self._go_on(self._at_work and self._at_work.result())
            except StopIteration:
                self._course = self._stage = self._at_work = None
            except Refusal:
                self._drop()
                raise
            # Only now, as it may fail on one rank alone: all are at the same stage.
            if self._stage == "complete" and self._completed:
                self._completed(self._step, self.newest, self._worked_s, self._waited_s)

    def _drop(self):
        """Give up what is under way, nobody being at work at it."""
        if self._path is not None and self._comm.rank == 0:
            shutil.rmtree(self._hidden, ignore_errors=True)
        self._path = self._course = self._stage = self._at_work = None

    def _doubt(self, error, reading):
        """Something is wrong with the newest checkpoint, seen while `reading` it, or with older ones."""
        doubted = self.newest
        if reading:
            self.newest, self._whole = on_root(self._comm, checkpoint.doubt, doubted)
            if self._whole:  # to root, who has read all of it
                with contextlib.suppress(Refusal):  # on all ranks
                    on_root(self._comm, checkpoint.delete_older, self._output, self._keep, self._best)
        if self._doubted:
            self._doubted(error, doubted)

    def skip_reading(self):
        """As `finish`, and what has not begun to be read back is not; the next start reads it."""
        self.finish()
        if self._stage == "complete":
            self._drop()

    def settle(self):
        """As `finish`, and wait until what is complete has been read back and older ones are gone.

        Returns whether the newest that was written reads as it was written.
        """
        self.finish()
        began = time.monotonic()
        while self.under_way:
            self.advance(self._waited_for())
        self._settling_s += time.monotonic() - began
        return self._whole

    def finish(self):
        """Wait for what is being written, if anything is; `newest` is that then. Raises as `advance`."""
        began = time.monotonic()
        while self._path is not None:
            largest = self._waited_for()
            self._waited_s += time.monotonic() - began
            began = time.monotonic()
            self.advance(largest)

    def _waited_for(self):
        """The largest of all ranks' `report`, when each has done what it has in hand."""
        if self._at_work is not None:
            self._at_work.exception()  # waits
        return max(self._comm.allgather(self.report()))

    def abandon(self):
        """Give up what is under way, ranks having died: returns its path, None where nothing is. Not collective.

        A checkpoint of which root has all the pieces is completed. Who owns the folder next removes the rest.
        """
        self._pool.shutdown(wait=False)
        if self._path is not None:
            self._copied.wait()  # what a copy is made of may change from now on
        if self._stage in ("commit", "delete") and self._at_work is not None:
            self._at_work.exception()  # waits: who comes next must not meet what is half done
        path, self._path, self._course, self._stage = self._path, None, None, None
        return path

    def _timed(self, work, *arguments):
        began = time.monotonic()
        try:
            return work(*arguments)
        finally:
            self._worked_s += time.monotonic() - began

    def _gather(self, contents, outlines, copy):
        """{file: what this rank has of it}, as Segments, and where they are to be copied {file: the copies}."""
        wanted = {
            file: blocks.segments(checkpoint.stretches(self._placed, held, outlines[file]))
            for file, held in contents.items()
        }
        copies = {}
        if copy:
            copied = iter(self._memory.take([one for segments in wanted.values() for one in segments]))
            copies = {file: list(itertools.islice(copied, len(wanted[file]))) for file in wanted}
            self._copied.set()
        return wanted, copies

    def _write(self, ready, outlines):
        """Write what `_gather` returns. False, the rest being left out, where a number is not finite."""
        try:
            with files.failing_as_io(self._path):
                (wanted, copies), known = ready.result(), {}
                for file, segments in wanted.items():
                    fit = _finite_bytes if outlines[file].dtypes == {torch.float32} else None
                    known[file] = blocks.write(self._hidden / file, segments, copies.get(file), fit)
                    if known[file] is None:
                        return False
                return known
        finally:
            self._copied.set()

    def _digest(self, known, left):
        with files.failing_as_io(self._path):
            return _with_digests(self._hidden, known, left)

    def _commit(self, known):
        """What is not made of pieces, and the name. Root's."""
        where = self._hidden, self._path, self._step, self._placed
        checkpoint.finish(*where, self._words, self._state, known)


def finite(values):
    """True where every number of a tensor is finite. A sum, as fast as memory, tells it, unless it overflows."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _unread(comm, hidden, known):
    """{file: numbers of blocks} that this rank is to read, `known` being those it knows. Collective."""
    numbers = comm.allgather({file: list(found) for file, found in known.items()})
    with together(comm), files.failing_as_io(hidden):
        return checkpoint.unread(hidden, numbers, comm.rank, comm.size)


def _with_digests(hidden, known, left):
    """`known` with the digests of the blocks that are `left`."""
    return {file: known[file] | blocks.digests(hidden / file, left[file]) for file in known}


def _finite_bytes(memory):
    return finite(memory.view(torch.float32))


def save(comm, output_dir, step, placed, optimizer, tokenizer_dir, state, keep, best=None):
    """Write `checkpoint-<step>` below `output_dir`, then delete all but the newest `keep`, and that of step `best`.

    Returns its path once it is complete and read back, None where it does not read as it was written. See `Saver`.
    Collective over `comm`.
    """
    saver = Saver(comm, placed, optimizer, output_dir, tokenizer_dir, keep)
    saver.begin(step, state, best, copy=False)
    return saver.newest if saver.settle() else None


def salvage(comm, output_dir, step, placed, optimizer, tokenizer_dir, state):
    """Write a checkpoint by those that are left of the ranks that `placed` is for.

    Returns its path, None where they do not hold all of it. Older ones stay. comm: of these ranks, whose weights and
    moments are of the same step. Not for pipelines, whose stages would have to tell each other what they have.
    Collective over `comm`.
    """
    placed.reshard()
    contents = checkpoint.contents(placed, optimizer)
    outlines = {file: checkpoint.outline(placed, held) for file, held in contents.items()}
    mine = {
        (file, entry, tuple((part.start, part.stop) for part in box)): (box, values)
        for file, held in contents.items()
        for entry, (_, piece, tensor) in held.items()
        for box, values in placed.boxes(piece, tensor.detach())
    }
    everybody = comm.allgather({key: values.numel() for key, (_, values) in mine.items()})
    sizes = {key: size for each in everybody for key, size in each.items()}
    there = Counter()
    for (file, entry, _), size in sizes.items():
        there[file, entry] += size
    whole = all(there[file, entry] >= math.prod(shape) for file, one in outlines.items()
                for entry, (_, shape) in one.tensors.items())  # fmt: skip
    if not whole or not all(comm.allgather(all(finite(values) for _, values in mine.values()))):
        return None
    before = {key for each in everybody[: comm.rank] for key in each}  # others write what they have too
    path = Path(output_dir) / f"checkpoint-{step}"
    hidden = on_root(comm, checkpoint.begin, path, outlines)
    known = {}
    with together(comm), files.failing_as_io(path):
        for file, outline in outlines.items():
            parts = [(key[1], *held) for key, held in mine.items() if key[0] == file and key not in before]
            stretches = itertools.chain(*(outline.stretches(*part) for part in parts))
            known[file] = blocks.write(hidden / file, blocks.segments(stretches))
    left = _unread(comm, hidden, known)
    with together(comm), files.failing_as_io(path):
        known = _with_digests(hidden, known, left)
    known = comm.gather(known, root=0)
    words = on_root(comm, checkpoint.tokenizer_files, tokenizer_dir)
    on_root(comm, checkpoint.finish, hidden, path, step, placed, words, state, known)
    return path
