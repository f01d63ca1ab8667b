"""Files that chance has spoiled: refused in a sentence, or read as they were written. Not a command: see `bad_input`.

A case is a list of edits of a file's bytes (`spoilt`). What it comes to is one of OUTCOMES. Files that the HDF5 library
parses are tried in a process of their own, which takes many cases and is missed if it dies.
"""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

from hpcllm import config
from hpcllm.data import shards
from hpcllm.data.manifest import digest
from hpcllm.errors import Refusal

ROOT = Path(__file__).parent.parent.parent
OUTCOMES = ("refused", "as written", "error", "silent", "crash")
GOOD = ("refused", "as written")
_PLACES = 1 << 20  # in how many an edit's place is told
SNIPPETS = [
    "\0",
    "\xff",
    "\n",
    '"',
    "[",
    "{",
    "[" * 3000,
    "-1",
    "1e999",
    "NaN",
    "true",
    "null",
    "9" * 30,
    "9" * 5000,
    "'''",
    "=",
]
SNIPPETS += [
    "\xef\xbb\xbf",
    "[run]\n",
    "[data]\nquarantine = 1\n",
    "../",
    "\\u0000",
    '{"event": "start"}\n',
    "1e5",
    "\x85",
]


def spoilt(content, edits):
    """`content` after edits: ("flip", place, bit), ("cut", place), ("drop", place, bytes), ("put", place, text),
    ("copy", from, to, bytes); places are in 2**20ths of what there is."""
    made = bytearray(content)
    for kind, place, *more in edits:
        at = place * len(made) // _PLACES
        if kind == "flip" and made:
            made[at] ^= 1 << more[0]
        elif kind == "cut":
            del made[at:]
        elif kind == "drop":
            del made[at : at + more[0]]
        elif kind == "put":
            made[at:at] = more[0].encode("latin-1")
        elif kind == "copy":
            there = more[0] * len(made) // _PLACES
            made[there:there] = made[at : at + more[1]]
    return bytes(made)


def draw_edits(draw):
    """Some edits, from a random.Random."""
    ways = (
        lambda: ("flip", draw.randrange(_PLACES), draw.randrange(8)),
        lambda: ("cut", draw.randrange(_PLACES)),
        lambda: ("drop", draw.randrange(_PLACES), draw.randint(1, 64)),
        lambda: ("put", draw.randrange(_PLACES), draw.choice(SNIPPETS)),
        lambda: ("copy", draw.randrange(_PLACES), draw.randrange(_PLACES), draw.randint(1, 200)),
    )
    return [draw.choices(ways, (6, 1, 2, 3, 1))[0]() for _ in range(draw.choice((1, 1, 1, 2, 4)))]


def outcome(read):
    """Of `read`, which returns whether what it found is what was written: one of OUTCOMES, with the error if one."""
    try:
        return "as written" if read() else "silent"
    except Refusal as refused:
        return "refused" if str(refused) else "error: a refusal without a sentence"
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"


# --- files that this process reads -------------------------------------------------------------------------------


def run_file(path, content, edits):
    """A run file that is taken is one that reads back as itself."""
    path.write_bytes(spoilt(content, edits))

    def read():
        settings = config.load(path)
        path.write_text(settings.toml(), encoding="utf-8")
        return config.load(path) == settings

    return outcome(read)


def manifest(folder, tokens, edits, fits):
    """The manifest of a folder of shards. fits: where it still is JSON, with the digest of its content."""
    path = folder / shards.MANIFEST
    content = path.read_bytes()
    try:
        made = spoilt(content, edits)
        if fits:
            try:
                said = json.loads(made)
                made = json.dumps(said | {"digest": digest(said)}).encode()
            except (ValueError, TypeError, RecursionError):
                pass
        path.write_bytes(made)
        return outcome(lambda: np.array_equal(all_tokens(folder), tokens))
    finally:
        path.write_bytes(content)


def all_tokens(folder):
    stream = shards.open_folder(folder)
    return stream.gather([0], stream.token_count)[0]


def saved(folder, name, edits):
    """A file of a checkpoint: what `verify` lets pass is what was written, or says so in other bytes."""
    from hpcllm import checkpoint

    path = folder / name
    content = path.read_bytes()
    try:
        path.write_bytes(spoilt(content, edits))

        def read():
            checkpoint.verify(folder)
            checkpoint.read_state(folder)
            return path.read_bytes() == content or name == checkpoint.COMPLETE

        return outcome(read)
    finally:
        path.write_bytes(content)


def records(folder, name, edits):
    """events.jsonl or metrics.jsonl of a run: told of as far as it goes."""
    path = folder / name
    content = path.read_bytes()
    try:
        path.write_bytes(spoilt(content, edits))
        return outcome(lambda: told_of(folder))
    finally:
        path.write_bytes(content)


def told_of(folder):
    """What reads records, reads them; True."""
    from hpcllm import card, monitor, status  # of which some import torch: the process for shards goes without

    started, fruitless, longest = monitor.history(folder)
    card.node_hours(folder / "events.jsonl", 4)
    status.show(status.status(folder))
    return fruitless <= started and 0.0 <= longest < 1e9


# --- files that HDF5 reads, in another process -------------------------------------------------------------------


def shard(folder, name, edits, fits):
    """A shard. fits: the manifest has the CRC and size that it has now, so that HDF5 parses it."""
    path, listed = folder / name, folder / shards.MANIFEST
    content, said = path.read_bytes(), listed.read_bytes()
    known = json.loads(said)
    [entry] = [one for one in known["shards"] if one["name"] == name]
    begin, end = entry["tokens_offset"], entry["tokens_offset"] + entry["tokens_bytes"]
    try:
        if fits:  # what is not tokens: the head that HDF5 has written, and what lies behind
            head, tail = content[:4096], content[end:]
            made = spoilt(head + tail, [edit for edit in edits if edit[0] == "flip"])
            made = made[:4096] + content[4096:end] + made[4096:]
            entry["crc32_without_tokens"] = zlib.crc32(made[end:], zlib.crc32(made[:begin]))
            listed.write_text(json.dumps(known | {"digest": digest(known)}))
        else:  # all but the gap before the tokens, which is most of a small shard
            made = spoilt(content[:4096] + content[begin:], edits)
            made = made[:4096] + content[4096:begin] * (len(made) > 4096) + made[4096:]
        path.write_bytes(made)
        return outcome(lambda: np.array_equal(all_tokens(folder), tokens_of(folder)))
    finally:
        path.write_bytes(content)
        listed.write_bytes(said)


@functools.cache
def tokens_of(folder):
    return np.load(folder.parent / "tokens.npy")


def in_a_process(folder, cases):
    """Outcomes of cases (name of a shard, edits, fits), tried in other processes: the one of which one dies is
    "crash"."""
    found = []
    while len(found) < len(cases):
        command = [sys.executable, "-m", "tests.faults.fuzz", str(folder)]
        given = "".join(json.dumps(case) + "\n" for case in cases[len(found) :])
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
        found += done.stdout.splitlines()
        if done.returncode < 0:
            found.append(f"crash: signal {-done.returncode}")
        elif done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        # A process that died has spoilt what it read.
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "kept", folder)
    return found


def shards_to_spoil(folder, base):
    """A copy in `base` of a folder of shards, for `in_a_process`; returns it."""
    shutil.copytree(folder, base / "kept")
    shutil.copytree(folder, base / "shards")
    np.save(base / "tokens.npy", all_tokens(folder))
    return base / "shards"


# --- many cases --------------------------------------------------------------------------------------------------


def report(count):
    """Try `count` random cases of each kind of file, print how many came to what; returns an exit code."""
    from .rows import Place

    draw, broken = random.Random(11), False
    with tempfile.TemporaryDirectory() as base:
        place = Place(Path(base))
        place.here.mkdir()
        run_content = place.settings(output=place.here / "x").toml().encode()
        folder, saved_in, run = place.shards("plain"), place.model(), place.a_run()
        tokens = all_tokens(folder)
        apart = shards_to_spoil(folder, place.here)
        names = [path.name for path in folder.glob("*.h5")]
        files = sorted(path.name for path in saved_in.iterdir())

        def one_by_one(attempt):
            return lambda: [attempt(draw_edits(draw)) for _ in range(count)]

        def apart_from_here(fits):
            cases = [(draw.choice(names), draw_edits(draw), fits) for _ in range(count)]
            return lambda: in_a_process(apart, cases)

        kinds = {
            "run file": one_by_one(lambda edits: run_file(place.here / "run.toml", run_content, edits)),
            "manifest": one_by_one(lambda edits: manifest(folder, tokens, edits, False)),
            "manifest that fits its digest": one_by_one(lambda edits: manifest(folder, tokens, edits, True)),
            "shard": apart_from_here(False),
            "shard whose manifest fits": apart_from_here(True),
            "checkpoint": one_by_one(lambda edits: saved(saved_in, draw.choice(files), edits)),
            "records": one_by_one(lambda edits: records(run, draw.choice(("events.jsonl", "metrics.jsonl")), edits)),
        }
        print(f"| file | cases | {' | '.join(OUTCOMES)} | first that is wrong |\n|{'---|' * (len(OUTCOMES) + 3)}")
        for name, attempt in kinds.items():
            found = attempt()
            counts = [sum(one.split(":")[0] == kind for one in found) for kind in OUTCOMES]
            wrong = [one for one in found if one not in GOOD]
            broken = broken or bool(wrong)
            print(
                f"| {name} | {len(found)} | {' | '.join(map(str, counts))} | {(wrong or ['-'])[0][:200]} |", flush=True
            )
    return 1 if broken else 0


if __name__ == "__main__":  # the other process
    for line in sys.stdin:
        label, edits, fits = json.loads(line)
        print(shard(Path(sys.argv[1]), label, edits, fits).replace("\n", " ")[:300], flush=True)
