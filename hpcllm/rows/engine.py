"""All rows answered by all ranks: cut, go on where a killed run stopped, hand out, spool, and write one output file.

The output is the same bytes for any number of ranks and of kills: units are a function of the input, a unit's answers
are spooled once, and what lies where in the output follows from their lengths.
"""

import json
import os
import time
from contextlib import closing
from itertools import groupby

import numpy as np

from ..data import text
from ..data.progress import Progress, meet
from ..errors import CannotCreate, DataError
from ..files import failing_as_io, write_at
from ..mpi import agree, on_root, together
from . import read, spool
from .prepared import Prepared
from .queue import Queue


class _Stopped(BaseException):
    """Another rank has failed. Not an Exception, so that it passes through the caller's `answer`."""


def answer_all(
    world,
    *,
    inputs,
    output,
    answer,
    fingerprint,
    columns=(),
    format=None,
    unit_bytes=None,
    overwrite=False,
    what="predict",
):
    """Write to the file `output` a JSON line for each row of `inputs`, in their order; collective.

    inputs: paths and globs, or a Prepared. output: a path; `.NAME.partial` beside it holds what is done until all is.
    answer: called as answer(rows, advance) with the rows (list of read.Row or prepared.Example) of a unit; returns a
    list of as many dicts. It depends on the rows alone, calls no collective of this world, and calls advance(n), n of
    its rows being done, between its batches: there root hands out work and a failure of another rank ends this one's.
    fingerprint: flat dict of what else decides the answers (the model, options), in words for the user: a run that was
    killed is gone on with only if it had the same. columns: names that every row has, a string each.
    format: one of read.FORMATS; None goes by each file's name. unit_bytes: of a unit; by default 16 KiB to 1 MiB.
    overwrite: replace an output that exists, in the last moment, and answers of a killed run that was another one.
    what: word for the lines of progress.

    Returns a summary (dict), the same on every rank: output, rows, units, reused_units (of killed runs), seconds,
    rows_per_s (of this run's own rows), ranks: for each {rows, units, busy_s, idle_s}.
    Raises a Refusal, the same on every rank: DataError (65) for the input, CannotCreate (73), IOFailure (74); units
    that are done stay for a restart.
    """
    comm, began, partial = world.comm, time.monotonic(), spool.Partial(output)
    source = inputs if isinstance(inputs, Prepared) else _Files(inputs, tuple(columns), format)
    files, step, plan = on_root(comm, _plan, source, partial.output, unit_bytes, fingerprint, overwrite)
    units = source.cut(comm, files, step)
    try:
        run, spools = on_root(comm, partial.claim, plan, overwrite)
        done, missing = _look(comm, spools, units)
        # The longest first, so that no rank begins one when the others end; otherwise in order, as files are read.
        order = sorted(missing, key=lambda unit: -(units[unit].size // step))
        with together(comm):
            spooled = partial.spool(run, comm.rank)
        mine = _answer_units(comm, units, order, source.reader(), answer, spooled, what)
        on_root(comm, source.require_same)
        rows = _write(comm, partial, run, done | spooled.records, len(units))
        on_root(comm, partial.publish, _part(partial, run), overwrite)
    finally:
        partial.release()
    seconds = time.monotonic() - began
    ranks = comm.allgather(mine)
    own_rows = sum(rank["rows"] for rank in ranks)
    return comm.bcast(
        {
            "output": os.fspath(output),
            "rows": rows,
            "units": len(units),
            "reused_units": len(units) - len(missing),
            "seconds": round(seconds, 3),
            "rows_per_s": round(own_rows / seconds, 3),
            "ranks": ranks,
        },
        root=0,
    )


class _Files:
    """Rows of files, each of a format of `read`. Prepared has the same methods."""

    def __init__(self, patterns, columns, format):
        self._patterns, self._columns, self._format = patterns, columns, format

    def plan(self):
        """([(path, format)], bytes of a unit, what of the input decides the answers: {name: str}). Root only."""
        paths = text.find_inputs(map(os.fspath, self._patterns))
        files = [(path, read.format_of(path, self._columns, self._format)) for path in paths]
        said = {"columns": ", ".join(self._columns)}
        for number, (path, format) in enumerate(files, 1):
            said[f"input {number}"] = f"{os.path.abspath(path)}: {format}, {_stamp(path)}"
        self._stamps = {path: _stamp(path) for path in paths}
        return files, read.unit_bytes(paths), said

    def require_same(self):
        """Raise DataError where a file is not what it was for `plan`. Root only."""
        for path, stamp in self._stamps.items():
            with failing_as_io(path):
                now = _stamp(path)
            if now != stamp:
                raise DataError(
                    f"input: {path} was changed while it was answered ({now}, before {stamp}); --overwrite starts anew"
                )

    def cut(self, comm, files, step):
        """The units of all files, in order, on every rank; ranks cut files in turn."""
        cut = []
        with together(comm):
            try:
                mine = files[comm.rank :: comm.size]
                cut = [read.cut(path, format, self._columns, step) for path, format in mine]
            finally:
                meet(comm)  # reading a large compressed file through takes a while
        gathered = comm.allgather(cut)
        units = [unit for index in range(len(files)) for unit in gathered[index % comm.size][index // comm.size]]
        if not units:
            raise DataError(f"input: there is no row in it (first file: {files[0][0]})").known_to_all()
        return units

    def reader(self):
        return read.Reader(self._columns)


def _stamp(path):
    status = os.stat(path)
    changed = f"{time.strftime('%F %T', time.gmtime(status.st_mtime))}.{status.st_mtime_ns % 10**9:09d}"
    return f"{status.st_size} bytes of {changed}"


def _plan(source, output, unit_bytes, fingerprint, overwrite):
    """Check what can be checked without reading; returns ([(path, format)], bytes of a unit, the plan's words)."""
    files, usual, said = source.plan()
    if os.path.lexists(output):
        if not overwrite:
            raise CannotCreate(f"output: {output} exists; give another name or --overwrite")
        if not os.path.isfile(output):
            raise CannotCreate(f"output: {output} is not a file that can be overwritten")
        if os.path.realpath(output) in [os.path.realpath(path) for path, _ in files]:
            raise CannotCreate(f"output: --overwrite would replace the input {output}")
    step = unit_bytes or usual
    plan = {"bytes of a unit": str(step)} | {name: str(value) for name, value in fingerprint.items()} | said
    return files, step, plan


def _look(comm, spools, units):
    """({unit: Record} that this rank found in the spools of runs before, numbers of units that nobody found)."""
    found = {}
    with together(comm):
        for path in spools[comm.rank :: comm.size]:
            found |= spool.records(path)
    everywhere = comm.allgather(list(found))
    for earlier in everywhere[: comm.rank]:
        for unit in earlier:
            found.pop(unit, None)
    done = set().union(*everywhere)
    return found, [unit for unit in range(len(units)) if unit not in done]


def _answer_units(comm, units, order, reader, answer, spooled, what):
    """Answer into this rank's spool until no unit of `order` is left; returns this rank's part of the summary."""
    queue = Queue(comm, order)
    progress = Progress(comm, what, sum(units[unit].size for unit in order), counted=("rows", 1))
    error, began, busy, size, count = None, time.monotonic(), 0.0, 0, 0

    def advance(rows_done):
        queue.serve()
        share = rows_done / len(rows) if rows else 1
        if not progress.advance(size + int(share * units[unit].size), count + rows_done):
            raise _Stopped

    try:
        with closing(reader), closing(spooled):
            while (unit := queue.next()) is not None:
                started = time.monotonic()
                rows = reader.rows(units[unit])
                spooled.append(unit, len(rows), _lines(rows, answer(rows, advance) if rows else []))
                advance(len(rows))
                size, count = size + units[unit].size, count + len(rows)
                busy += time.monotonic() - started
    except _Stopped:
        pass
    except Exception as caught:
        error = caught
    queue.finish(progress, failed=error is not None)
    agree(comm, error)
    idle = time.monotonic() - began - busy
    return {"rows": count, "units": len(spooled.records), "busy_s": round(busy, 3), "idle_s": round(idle, 3)}


def _lines(rows, answers):
    """JSON lines (UTF-8 bytes) of the answers to `rows`."""
    if len(answers) != len(rows):
        raise ValueError(f"{len(answers)} answers to {len(rows)} rows")
    return b"".join(_line(row, answer) for row, answer in zip(rows, answers, strict=True))


def _line(row, answer):
    try:
        line = json.dumps(answer, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise row.refusal(f"its answer cannot be JSON ({error})") from None
    try:
        return line.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which the input spelled as an escape: so does the output
        return json.dumps(answer, allow_nan=False).encode() + b"\n"


def _part(partial, run):
    return os.path.join(partial.folder, f"output-{run:04d}")


def _write(comm, partial, run, records, unit_count):
    """All ranks write the answers they have `records` of at their places in one new file; returns the rows in it."""
    table = np.zeros((unit_count, 3), np.int64)
    for unit, record in records.items():
        table[unit] = record.size, record.rows, 1
    table = comm.allreduce(table)
    if not (table[:, 2] == 1).all():
        raise RuntimeError("a unit was not answered exactly once")
    begins = np.cumsum(table[:, 0]) - table[:, 0]
    path = _part(partial, run)
    on_root(comm, _create, path, int(table[:, 0].sum()))
    with together(comm), failing_as_io(path), open(path, "r+b", buffering=0) as file:
        by_place = sorted(records.items(), key=lambda item: item[1])
        for source_path, group in groupby(by_place, key=lambda item: item[1].path):
            with open(source_path, "rb") as source:
                for unit, record in group:
                    write_at(file.fileno(), spool.payload(source, unit, record), int(begins[unit]))
        os.fsync(file.fileno())
    return int(table[:, 1].sum())


def _create(path, size):
    with failing_as_io(path), open(path, "wb") as file:
        file.truncate(size)
