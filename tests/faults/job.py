"""A rank of a training job in which something goes wrong; what `matrix` starts. Not a test.

    python job.py FAULT [name=value ...] -- arguments of hpcllm

Faults happen on rank `rank` (all: -1) in its step number `step` since the start of the process (each: 0).
"""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from hpcllm import imports

imports.remember()
with imports.undisturbed():  # as quickly as hpcllm's own command
    import torch

    from hpcllm import __main__, blocks, evaluate, mpi, train
    from hpcllm.data import batches


def kill(placed, given):
    """The process is gone."""
    note(given)
    os.kill(os.getpid(), signal.SIGKILL)


def vanish(placed, given):
    """Somebody removes the folder of the run."""
    note(given)
    while Path(given["folder"]).exists():  # others write into it meanwhile
        shutil.rmtree(given["folder"], ignore_errors=True)


def flip(placed, given):
    """A bit of a weight is another one, and no error says so."""
    name, parameter = next(iter(placed.named_parameters()))
    parameter.detach().view(-1).view(torch.int32)[0] ^= 1 << 10
    Path(given["note"]).write_text(name)


IN_STEPS = {"kill": kill, "vanish": vanish, "flip": flip, "nan": None}


def note(given):
    """Tell when it happened, for whoever measures how long it takes to be noticed."""
    Path(given["note"]).write_text(str(time.time()))


def in_steps(fault, given, world):
    """Have `fault` happen in a step of training."""
    one_step, of_task, numbers, now = train.one_step, evaluate.of_task, itertools.count(1), [0]

    def hit():
        return int(given["rank"]) in (-1, world.rank) and int(given["step"]) in (0, now[0])

    def stepping(placed, *arguments):
        now[0] = next(numbers)
        if IN_STEPS[fault] and hit():
            IN_STEPS[fault](placed, given)
        return one_step(placed, *arguments)

    def poisoned(*arguments, **options):
        work = of_task(*arguments, **options)
        if options or not hit():
            return work
        return dataclasses.replace(work, loss=lambda net, batch: work.loss(net, batch) * float("nan"))

    train.one_step = stepping
    if fault == "nan":
        evaluate.of_task = poisoned


def paced(given, world):
    """Each rank computes for a time of its own in each step, as if the model was larger and some processors slower."""
    one_step, seconds = train.one_step, float(given["seconds"].split(",")[world.rank])

    def stepping(*arguments):
        time.sleep(seconds)
        return one_step(*arguments)

    train.one_step = stepping


def noting_samples(given, world):
    """Write down which samples this rank has rows made of, and of which epochs."""
    made = batches.Source.micro_batch

    def noting(self, samples, epochs):
        with open(f"{given['note']}-{world.rank}", "a", encoding="utf-8") as file:
            file.write(json.dumps([[int(s), int(e)] for s, e in zip(samples, epochs, strict=True) if e >= 0]) + "\n")
        return made(self, samples, epochs)

    batches.Source.micro_batch = noting


def no_disk(given, world):
    """From the second checkpoint on the disk of one rank answers with an error, `times` times."""
    write, files, left = blocks._write, itertools.count(1), itertools.count(1)

    def failing(*arguments):
        if next(files) > 2 and world.rank == int(given["rank"]) and next(left) <= int(given["times"]):
            if not Path(given["note"]).exists():
                note(given)
            raise OSError(5, "Input/output error")
        return write(*arguments)

    blocks._write = failing


def main():
    at = sys.argv.index("--")
    fault, given = sys.argv[1], dict(word.split("=", 1) for word in sys.argv[2:at])
    world = mpi.join()
    if fault == "samples":
        noting_samples(given, world)
    elif fault == "no_disk":
        no_disk(given, world)
    elif fault == "paced":
        paced(given, world)
    else:
        in_steps(fault, given, world)
    __main__.main(sys.argv[at + 1 :])


if __name__ == "__main__":
    main()
