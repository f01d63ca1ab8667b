"""What of torch.distributed works over this backend, and with which dtypes: tried, compared with one process, counted.

    mpirun -np 3 python tests/mpi/coverage.py [--output docs/coverage.md]

prints a Markdown table, a row an operation and a column a group of dtypes, or writes it to a file. Each operation
of `operations` is done with each dtype, sync and async, on all ranks; what it gives must equal, in every bit, what
one process computes. Counted are answers that are right; refusals by design, which are a TypeError or ValueError of
hpcllm; refusals of torch, which come before it asks the backend; wrong answers; and failures with any other error.
Exit code 1 where one is wrong, fails, or is not what `operations` says it should be. It is no measure of speed.
"""

import argparse
import collections
import platform
import sys
import traceback
import warnings
from pathlib import Path

import torch
from operations import FLOAT8, OPERATIONS_THAT_MOVE, Attempt
from operations_on_groups import OPERATIONS_ON_GROUPS
from operations_that_sum import OPERATIONS_THAT_SUM
from rank_tensors import COMPLEX, INTEGERS, UNSIGNED, same

import hpcllm.mpi

PACKAGE = str(Path(hpcllm.__file__).parent)
RIGHT, REFUSED, TORCH, WRONG, FAILED = "right", "refused", "torch", "wrong", "failed"
OPERATIONS = (*OPERATIONS_THAT_MOVE, *OPERATIONS_THAT_SUM, *OPERATIONS_ON_GROUPS)
COLUMNS = {
    "bool": (torch.bool,),
    "int8 to int64, uint8": INTEGERS,
    "uint16 to uint64": UNSIGNED,
    "fp16, bf16": (torch.float16, torch.bfloat16),
    "fp32, fp64": (torch.float32, torch.float64),
    "complex": COMPLEX,
    "float8": FLOAT8,
    "no dtype": (None,),
}
SIGNS = {RIGHT: "✓", REFUSED: "–", TORCH: "t", WRONG: "**WRONG**", FAILED: "**FAILED**"}


def equal(got, expected):
    return same(got, expected) if isinstance(got, torch.Tensor) else got == expected


def outcome_here(operation, attempt):
    """(outcome, words about it) of one attempt on this rank."""
    try:
        pairs = operation.attempt(attempt)
        unequal = [pair for pair in pairs if not equal(*pair)]
        return (WRONG, f"{unequal[0][0]} instead of {unequal[0][1]}") if unequal else (RIGHT, "")
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if any(file.startswith(PACKAGE) for file in files):
            return (REFUSED if isinstance(error, TypeError | ValueError) else FAILED), words
        by_torch = files[-1].startswith(str(Path(torch.__file__).parent))
        return (TORCH if by_torch and isinstance(error, TypeError | ValueError | RuntimeError) else FAILED), words


def combined(everywhere):
    """The outcome of all ranks: theirs if they agree, else the worst of them and the words of the first that has it."""
    for worst in (FAILED, WRONG):
        for rank, (found, words) in enumerate(everywhere):
            if found == worst:
                return found, f"rank {rank}: {words}"
    if len({found for found, _ in everywhere}) > 1:
        return FAILED, f"ranks disagree: {everywhere}"
    return everywhere[0]


def measure(world, operations=OPERATIONS):
    """({(operation's name, dtype, async_op): outcome}, sentences about outcomes that should be others). Collective."""
    outcomes, complaints = {}, []
    for operation in operations:
        cases = [(dtype, asynchronous) for dtype in operation.dtypes for asynchronous in operation.modes]
        here = [outcome_here(operation, Attempt(world, *case)) for case in cases]
        for (dtype, asynchronous), *everywhere in zip(cases, *world.comm.allgather(here), strict=True):
            found, words = combined(everywhere)
            outcomes[operation.name, dtype, asynchronous] = found
            if found != operation.answer(dtype):
                how = f"{operation.name}, {dtype}, {'async' if asynchronous else 'sync'}"
                complaints.append(f"{how}: {found} instead of {operation.answer(dtype)} ({words})")
    return outcomes, complaints


def cell(found):
    """One mark where all is alike, else each with its number; nothing where nothing was tried."""
    counts = collections.Counter(found)
    return " ".join(SIGNS[each] + (f" {n}" if len(counts) > 1 else "") for each, n in counts.most_common())


def table(outcomes):
    """Lines of Markdown."""
    rows = collections.defaultdict(lambda: collections.defaultdict(list))
    for (name, dtype, _), found in outcomes.items():
        column = next(column for column, dtypes in COLUMNS.items() if dtype in dtypes)
        rows[name][column].append(found)
    yield "| operation | " + " | ".join(COLUMNS) + " |"
    yield "|---|" + ":-:|" * len(COLUMNS)
    for name, columns in rows.items():
        yield f"| {name} | " + " | ".join(cell(columns[column]) for column in COLUMNS) + " |"


ABOUT = """# What works over this backend

Every operation of torch.distributed with every dtype, sync and async, each compared bit for bit with what one
process computes from the same numbers. Written by a run of

    mpirun -np {size} python tests/mpi/coverage.py --output docs/coverage.md

with torch {torch}, Python {python}, {library}. `tests/mpi/test_coverage.py` repeats it with every rank count
and MPI library that the tests run on.

**Of {cases} cases {right} are right, {refused} are refused by design, {by_torch} are refused by torch itself,
{wrong} are wrong and {failed} fail.**

- ✓ right, in every bit, with all dtypes of the column, sync and async where there are both
- – refused with a sentence that says why: the reduction has no meaning for the dtype (a bitwise AND of floats, the
  largest of complex numbers), or torch has no arithmetic for it (float8, some of uint16 and wider)
- t refused by torch before it asks a backend: some reductions of complex numbers; `monitored_barrier` of any
  backend not called gloo; `split_group` without a GPU
- empty: there is no such variant

float8 are e4m3fn, e5m2, e4m3fnuz, e5m2fnuz and e8m0fnu. Shapes and memory layouts (empty, zero-dimensional, strided,
channels-last) are varied by `test_collectives.py` and `test_reductions.py` beside the script.
"""


def report(world, outcomes, complaints):
    """Lines of Markdown: the counts, the table, and what is not as it should be."""
    counts = collections.Counter(outcomes.values())
    yield ABOUT.format(
        size=world.size,
        torch=torch.__version__,
        python=platform.python_version(),
        library=world.library,
        cases=len(outcomes),
        right=counts[RIGHT],
        refused=counts[REFUSED],
        by_torch=counts[TORCH],
        wrong=counts[WRONG],
        failed=counts[FAILED],
    )
    yield from table(outcomes)
    if complaints:
        yield from ("", "Not as it should be:", "", *(f"- {complaint}" for complaint in complaints))


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--output", type=Path)
    output = arguments.parse_args().output
    warnings.simplefilter("ignore", FutureWarning)  # names that torch 2.13 would rather have otherwise
    world = hpcllm.mpi.init("cpu")
    if world.size == 1:
        sys.exit("coverage.py: one rank has nobody to talk to: start it with `mpirun -np 3`")
    outcomes, complaints = measure(world)
    if world.is_root:
        text = "\n".join(report(world, outcomes, complaints)) + "\n"
        if output:
            output.write_text(text, encoding="utf-8")
        else:
            sys.stdout.write(text)
        sys.stderr.write("".join(f"{complaint}\n" for complaint in complaints))
    sys.exit(1 if complaints else 0)


if __name__ == "__main__":
    main()
