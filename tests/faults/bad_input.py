"""What users, disks and strangers give to hpcllm that is no good: refused in a sentence, with nothing written over.

    python -m tests.faults.bad_input [1 4 ...] [--fuzz N]

Prints a table and ends with 1 where something does not hold. `--fuzz N`: instead, N random cases of each kind of file,
with how many there were, how many ended a process, and how many were taken for good though they are not.
"""

import argparse
import sys
import tempfile

from . import bad_data, bad_models, bad_runs, bad_samples  # noqa: F401 (they fill the table)
from .rows import ROWS, Place

SAID = {True: "yes", False: "NO", None: "does not apply"}
NO_SERVER = "nothing listens: hpcllm has no server"
NOT_HERE = {34: ("a request: empty, huge, not UTF-8, slow", NO_SERVER), 35: ("an endpoint without a token", NO_SERVER)}
COUNT = 36


def told(place, number):
    """(what the input is, whether it holds, sentence or figure) of a row."""
    if number in NOT_HERE:
        what, why = NOT_HERE[number]
        return what, None, why
    what, _ = ROWS[number]
    return what, *place.do(number)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", type=int, metavar="ROW", help="all by default")
    parser.add_argument("--fuzz", type=int, metavar="N", help="random cases of each kind of file")
    args = parser.parse_args()
    if args.fuzz:
        from . import fuzz

        sys.exit(fuzz.report(args.fuzz))
    print("| | input | holds | sentence or figure |\n|---|---|---|---|", flush=True)
    broken = 0
    with tempfile.TemporaryDirectory() as base:
        place = Place(base)
        for number in args.rows or range(1, COUNT + 1):
            what, holds, says = told(place, number)
            broken += holds is False
            print(f"| {number} | {what} | {SAID[holds]} | {says.replace(base, '').replace('|', '/')} |", flush=True)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
