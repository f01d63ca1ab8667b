"""The table of bad inputs, and a place with good ones to spoil. Not a command: see `bad_input`."""

import contextlib
import copy
import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from hpcllm import config, mpi
from hpcllm.errors import Refusal

ROOT = Path(__file__).parent.parent.parent
ROWS = {}
NOT_HERE = {}

RUN = {
    "run": {"seed": 7},
    "model": {
        "task": "masked_lm",
        "config": {
            "model_type": "bert",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
    },
    "train": {
        "max_steps": 4,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "sequence_length": 32,
        "learning_rate": 1e-3,
    },
    "checkpoint": {"every_steps": 2},
}


def row(number, what):
    """Puts a function in the table: it is given a Place and returns (what holds: bool, sentence or figure: str)."""

    def take(function):
        ROWS[number] = what, function
        return function

    return take


def refusal(function, *arguments, **more):
    """(exit code, sentence) of what `function` is refused with; (0, "") where it is not. Anything else is raised."""
    try:
        function(*arguments, **more)
    except Refusal as refused:
        return refused.code, str(refused)
    return 0, ""


def all_refused(cases):
    """cases: (exit code, words of the sentence, function, arguments...). Returns what a row does: whether all hold,
    and what is wrong, or else the first sentence and how many there are."""
    told = []
    for number, (code, words, *call) in enumerate(cases, 1):
        found, sentence = refusal(*call)
        if found != code or words not in sentence:
            return False, f"case {number}: code {found} ({code} wanted), {sentence!r} without {words!r}"
        told.append(f"{found}: {sentence}")
    return True, told[0] + (f" (and {len(told) - 1} more)" if len(told) > 1 else "")


class Place:
    """A folder with what is good: shards of text in `data`, a run of four steps in `run`; and one for each row.

    Rows spoil copies, in `here`, and let nothing be written to `out`, which the driver looks at.
    """

    def __init__(self, base):
        self.base, self.world = Path(base), mpi.init(device="cpu")
        self.here = self.base / "here"
        draw = random.Random(1)
        words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(200)]
        lines = [" ".join(draw.choices(words, k=30)) for _ in range(300)]
        (self.base / "text.txt").write_text("\n".join(lines) + "\n")
        self.prepare(self.base / "data")
        self.run = self.base / "run"
        self.train(output=self.run)
        self.good = digests(self.base)

    @property
    def data(self):
        return self.base / "data"

    @property
    def train_data(self):
        return self.data / "train"

    @property
    def out(self):
        return self.here / "out"

    def prepare(self, output, **changes):
        from hpcllm.data.prepare import prepare

        how = {"inputs": [str(self.base / "text.txt")], "vocab_size": 300, "shard_tokens": 4000}
        return prepare(self.world, output=str(output), **how | changes)

    def settings(self, output=None, data=None, **changes):
        """The Config of a run of four steps; changes: "section.key" with __ for the point, as `train__max_steps=5`."""
        values = copy.deepcopy(RUN)
        values["run"]["output_dir"] = str(output or self.out)
        values["data"] = {"train": str(data or self.train_data), "tokenizer": str(self.data / "tokenizer")}
        return config.load(values, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])

    def train(self, output=None, data=None, resume=False, overwrite=False, **changes):
        """Train in this process."""
        from hpcllm import train

        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return train.train(self.settings(output, data, **changes), self.world, resume=resume, overwrite=overwrite)

    def command(self, *arguments, cwd=None):
        """`hpcllm ARGUMENTS` in a process; returns its CompletedProcess (text)."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HPCLLM_PROGRESS": "lines"}
        env = {name: value for name, value in env.items() if not name.startswith(("OMPI_", "PMIX_", "PRTE_", "PMI_"))}
        how = {"capture_output": True, "text": True, "errors": "replace", "stdin": subprocess.DEVNULL, "timeout": 120}
        return subprocess.run(
            [sys.executable, "-m", "hpcllm", *map(os.fspath, arguments)], env=env, cwd=cwd or self.base, **how
        )

    def shards(self, name="data"):
        """A copy of the training shards, to be spoilt."""
        return Path(shutil.copytree(self.train_data, self.here / name / "train"))

    def model(self, name="model"):
        """A copy of the run's last checkpoint, to be spoilt."""
        return Path(shutil.copytree(self.run / "checkpoint-4", self.here / name))

    def a_run(self, name="run"):
        """A copy of the run, to be spoilt."""
        return Path(shutil.copytree(self.run, self.here / name))

    def do(self, number):
        """Do a row in a folder of its own; returns (holds, what it says)."""
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir()
        holds, says = ROWS[number][1](self)
        if self.out.exists():
            return False, f"something was written to the output; {says}"
        shutil.rmtree(self.here)
        if digests(self.base) != self.good:
            return False, f"good input was changed; {says}"
        return holds, says


def digests(folder):
    """{path: SHA-256} of every file below `folder`."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def flip(path, offset, bit=1):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bit]))


def cut(path, count=1):
    os.truncate(path, path.stat().st_size - count)
