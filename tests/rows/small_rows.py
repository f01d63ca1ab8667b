"""Small inputs for the tests of rows, a model that is none, and a script that runs it as a job. Not a test."""

import json
import os
import random
import sys
import time
from pathlib import Path


def make_inputs(folder):
    """Four files, one of each format; returns their paths. Row numbers run through all of them."""
    rng = random.Random(1)
    texts = [f"{number} " + "é" * min(int(rng.paretovariate(0.9)), 3000) for number in range(800)]
    names = [folder / name for name in ("a.jsonl", "b.tsv", "c.csv", "d.txt")]
    names[0].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:200]))
    names[1].write_text("\n".join(["text\tmore", *(f"{text}\tx" for text in texts[200:400])]))
    names[2].write_text("\n".join(["more,text", *(f'1,"{text}"' for text in texts[400:600])]))
    names[3].write_text("\n".join(texts[600:]))
    return [str(name) for name in names]


class Model:
    """answer(rows, advance): the length of each text, some seconds a row later; what it began is in a log."""

    def __init__(self, log=None, seconds=0.0):
        self.log, self.seconds, self.asked = log, seconds, []

    def __call__(self, rows, advance):
        answers = []
        for number, row in enumerate(rows):
            name = row.fields["text"].split()[0]
            self.asked.append(int(name))
            if self.log:
                os.write(self.log, f"{name}\n".encode())
            time.sleep(self.seconds * (1 + 20 * (int(name) % 37 == 0)))
            answers.append({"id": int(name), "length": len(row.fields["text"]), "é": row.fields["text"][:9]})
            advance(number + 1)
        return answers


def main(folder, log, seconds, *inputs):
    import hpcllm.mpi
    from hpcllm.rows import answer_all

    world = hpcllm.mpi.join()
    Path(f"{log}.{os.getpid()}").touch()  # the test kills these
    world.comm.Barrier()
    model = Model(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), float(seconds))
    summary = answer_all(
        world,
        inputs=inputs,
        output=Path(folder) / "out.jsonl",
        answer=model,
        fingerprint={"model": "none"},
        columns=["text"],
        unit_bytes=400,
    )
    if world.is_root:
        print(json.dumps(summary))


if __name__ == "__main__":
    main(*sys.argv[1:])
