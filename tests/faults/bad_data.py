"""Bad inputs of the rows about shards."""

import ast
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np

from hpcllm.data import shards
from hpcllm.data.manifest import digest
from hpcllm.errors import DataError

from .rows import ROOT, all_refused, cut, flip, refusal, row

FIRST = "shard-00000.h5"


def edited(place, name, change, fits=True):
    """A copy of the shards whose first one HDF5 itself has changed; with a manifest that fits, but for what it says of
    `change`: what is left to find it is the check of the content."""
    folder = place.shards(name)
    with h5py.File(folder / FIRST, "r+", locking=shards.LOCKING) as file:
        change(file)
    if fits:
        refit(folder)
    return folder


def refit(folder, **changes):
    """Make the manifest fit the first shard as it is now, and then say `changes` of it."""
    path = folder / shards.MANIFEST
    said = json.loads(path.read_text())
    said["shards"][0] = shards.entry(os.fspath(folder / FIRST)) | changes
    rewrite(path, said)


def rewrite(path, said):
    for key in ("token_count", "document_count"):
        said[key] = sum(shard[key] for shard in said["shards"])
    said["highest_id"] = max((shard["highest_id"] for shard in said["shards"]), default=0)
    path.write_text(json.dumps(said | {"digest": digest(said)}))


def replaced(label, values=None, **how):
    def change(file):
        kept = file[label][:] if values is None else values
        del file[label]
        file.create_dataset(label, data=kept, **how)

    return change


def opened(place, cases, code=65):
    """Every (name, words, change of the HDF5 file) is refused, naming the shard."""
    calls = [(code, words, shards.open_folder, edited(place, name, change)) for name, words, change in cases]
    named = all(FIRST in refusal(*call[2:])[1] for call in calls)
    holds, says = all_refused(calls)
    return holds and named, says


@row(7, "a missing shard, a glob that matches nothing")
def missing(place):
    folder = place.shards()
    (folder / FIRST).unlink()
    done = place.command("prepare", "--input", place.here / "no*.txt", "--output", place.out)
    command = done.returncode == 66 and "no*.txt" in done.stderr and not place.out.exists()
    holds, says = all_refused(
        [
            (66, FIRST, shards.open_folder, folder),
            (66, FIRST, lambda: place.train(data=folder)),
            (66, "there is no folder", shards.open_folder, place.here / "none"),
            (66, "has no manifest.json", shards.open_folder, place.base),
        ]
    )
    return holds and command, f"{says}; command: {done.returncode}: {done.stderr.strip().splitlines()[-1]}"


@row(8, "a file of no bytes, a file that is not HDF5")
def not_hdf5(place):
    empty, text = place.shards("empty"), place.shards("text")
    (empty / FIRST).write_bytes(b"")
    (text / FIRST).write_bytes(b"x" * (text / FIRST).stat().st_size)
    return all_refused(
        [
            (65, f"{empty / FIRST} has 0 bytes", shards.open_folder, empty),
            (65, f"{text / FIRST} is not an HDF5 file", shards.open_folder, text),
        ]
    )


@row(9, "a shard cut by one byte")
def truncated(place):
    folder = place.shards()
    cut(folder / FIRST)
    holds, says = all_refused([(65, f"{folder / FIRST} has", shards.open_folder, folder)])
    stream = shards.open_folder(folder, quarantine=True)
    return holds and list(stream.left_out) == [FIRST], f"{says}; quarantined on request"


WRITER = """
import os, signal, sys
from hpcllm.data import shards
facts = {"vocab_size": 300, "separator_id": 3, "tokenizer_hash": "0" * 64}
shards.create(sys.argv[1], token_count=1000, document_count=1, **facts)
os.kill(os.getpid(), signal.SIGKILL)
"""


@row(10, "the writer was killed before it closed the file")
def writer_killed(place):
    killed, bare = place.shards("killed"), place.shards("bare")
    (killed / FIRST).unlink()
    done = subprocess.run([sys.executable, "-c", WRITER, str(killed / FIRST)], cwd=ROOT, capture_output=True)
    (bare / shards.MANIFEST).unlink()
    incomplete = edited(place, "incomplete", lambda file: file.attrs.modify("complete", np.uint8(0)))
    fewer = edited(place, "fewer", replaced("document_offsets", np.zeros(2, "<i8")))
    holds, says = all_refused(
        [
            (65, f"{killed / FIRST} has", shards.open_folder, killed),
            (65, f"{incomplete / FIRST} is incomplete", shards.open_folder, incomplete),
            (65, f"{fewer / FIRST} has document_offsets", shards.open_folder, fewer),
            (66, "did not finish it", shards.open_folder, bare),
        ]
    )
    return holds and done.returncode == -signal.SIGKILL, says


@row(11, "a bit flipped in the data")
def data_flip(place):
    folder, found, tried = place.shards(), 0, 0
    shard = shards.read_manifest(folder)["shards"][0]
    for place_of in np.linspace(0, shard["tokens_bytes"] - 1, 64).astype(int).tolist():
        flip(folder / FIRST, shard["tokens_offset"] + place_of, 1 << place_of % 8)
        stream, tried = shards.open_folder(folder), tried + 1
        try:
            stream.gather([0], stream.token_count)
        except DataError as error:
            sentence, found = str(error), found + (str(folder / FIRST) in str(error))
        flip(folder / FIRST, shard["tokens_offset"] + place_of, 1 << place_of % 8)
    return found == tried, f"{found} of {tried} found; {DataError.code}: {sentence}"


@row(12, "a bit flipped in the header")
def header_flip(place):
    folder, found = place.shards(), 0
    shard = shards.read_manifest(folder)["shards"][0]
    draw = np.random.default_rng(1)
    outside = shard["size_bytes"] - shard["tokens_bytes"]
    # What HDF5 has written lies before the first 4096 bytes and behind the tokens.
    places = [*range(8), *draw.integers(0, 4096, 92), *draw.integers(0, outside, 50)]
    for offset in map(int, places):
        offset = offset if offset < shard["tokens_offset"] else offset + shard["tokens_bytes"]
        flip(folder / FIRST, offset, 1 << offset % 8)
        code, sentence = refusal(shards.open_folder, folder)
        found += code == 65 and str(folder / FIRST) in sentence
        flip(folder / FIRST, offset, 1 << offset % 8)
    return found == len(places), f"{found} of {len(places)} found before HDF5 sees the file; {code}: {sentence}"


@row(13, "HDF5 made to crash readers")
def crafted(place):
    """Anything that did not come from `prepare` has another CRC, and HDF5 is not let near it."""
    folder, touched = place.shards(), []
    size = (folder / FIRST).stat().st_size
    with h5py.File(folder / FIRST, "r+", locking=shards.LOCKING) as file:
        file.attrs["more"] = np.arange(3)
    os.truncate(folder / FIRST, size)
    before, h5py.File = h5py.File, lambda *_, **__: touched.append(True)
    try:
        code, sentence = refusal(shards.open_folder, folder)
    finally:
        h5py.File = before
    told = "shards that you, or somebody you trust, prepared" in (ROOT / "SECURITY.md").read_text()
    return code == 65 and not touched and told, f"{code}: {sentence}; SECURITY.md says whose shards to open"


@row(14, "external link, virtual data set, external storage, filters")
def other_files(place):
    def external(file):
        del file["document_offsets"]
        file["document_offsets"] = h5py.ExternalLink("/etc/passwd", "/x")

    def soft(file):
        file.move("document_offsets", "elsewhere")
        file["document_offsets"] = h5py.SoftLink("/elsewhere")

    def virtual(file):
        shape = file["document_offsets"].shape
        layout = h5py.VirtualLayout(shape=shape, dtype="<i8")
        layout[:] = h5py.VirtualSource("other.h5", "x", shape=shape)
        del file["document_offsets"]
        file.create_virtual_dataset("document_offsets", layout)

    def storage(file):
        del file["token_crc32"]
        file.create_dataset("token_crc32", (1,), "<u4", external=[("/etc/passwd", 0, 4)])

    return opened(
        place,
        [
            ("external", "behind an external or soft link", external),
            ("soft", "behind an external or soft link", soft),
            ("virtual", "does not store 'document_offsets' contiguously", virtual),
            ("storage", "does not store 'token_crc32' contiguously", storage),
            ("fletcher32", "contiguously", replaced("document_offsets", chunks=(3,), fletcher32=True)),
            ("gzip", "contiguously", replaced("token_crc32", chunks=(1,), compression="gzip")),
        ],
    )


@row(15, "data set missing, of another rank, ragged")
def other_shapes(place):
    def ragged(file):
        del file["document_offsets"]
        made = file.create_dataset("document_offsets", (2,), h5py.vlen_dtype(np.int64))
        made[0], made[1] = [1, 2], [3]

    def group(file):
        del file["token_crc32"]
        file.create_group("token_crc32")

    return opened(
        place,
        [
            ("missing", "has no data set 'token_crc32'", lambda file: file.__delitem__("token_crc32")),
            ("group", "has a group where", group),
            ("rank", "has document_offsets of shape", replaced("document_offsets", np.zeros((3, 1), "<i8"))),
            ("ragged", FIRST, ragged),
            ("version", "has format version 2", lambda file: file.attrs.modify("version", 2)),
        ],
    )


@row(16, "ids that are floats, int64, wider or narrower than the format says")
def other_dtypes(place):
    cases = [(kind, f"{FIRST} has ", replaced("tokens", dtype=kind)) for kind in ("<f4", "<i8", "<u4", "<i4", ">u2")]
    holds, says = opened(place, cases)
    widths = [shards.token_dtype(size).itemsize for size in (1 << 16, (1 << 16) + 1)]
    return holds and widths == [2, 4], f"{says}; ids below 65536 in 2 bytes, above in 4"


@row(17, "an id that is not below vocab_size, a negative id")
def wrong_ids(place):
    folder = edited(place, "high", lambda file: file.attrs.modify("highest_id", np.int64(300)))
    negative = place.shards("negative")
    refit(negative, highest_id=-1)
    return all_refused(
        [
            (65, "holds the id 300, its vocabulary has 300 entries", shards.open_folder, folder),
            (65, f"highest_id of {FIRST} is -1", shards.open_folder, negative),
        ]
    )


@row(18, "an empty shard, a folder without shards, text without words")
def empty(place):
    none, zero, blank = place.shards("none"), place.shards("zero"), place.here / "blank.txt"
    said = json.loads((none / shards.MANIFEST).read_text())
    rewrite(none / shards.MANIFEST, said | {"shards": []})
    refit(zero, token_count=0)
    blank.write_text("\n\n")
    return all_refused(
        [
            (65, "there are no shards", shards.open_folder, none),
            (65, f"{FIRST} has no tokens", shards.open_folder, zero),
            (65, "", lambda: place.prepare(place.out, inputs=[str(blank)], tokenizer=str(place.data / "tokenizer"))),
        ]
    )


@row(21, "a shard that is open elsewhere for writing")
def open_elsewhere(place):
    folder, patience = place.shards(), shards._PATIENCE_S
    shards._PATIENCE_S = 0.5
    try:
        with open(folder / FIRST, "r+b") as writer:
            fcntl.flock(writer, fcntl.LOCK_EX)
            began = time.monotonic()
            told = all_refused([(74, f"{folder / FIRST} is open for writing elsewhere", shards.open_folder, folder)])
            waited = time.monotonic() - began
        shards.open_folder(folder)
    finally:
        shards._PATIENCE_S = patience
    return told[0] and 0.5 <= waited < 5, f"{told[1]} (after {waited:.1f} s)"


@row(22, "another `locking=` in the same process")
def one_locking(place):
    calls = []
    for path in sorted((ROOT / "hpcllm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "h5py.File":
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                calls.append((path.name, said.get("locking")))
    # `try_locking` opens, in a process that reads no shards, files of its own.
    others = [call for call in calls if call != ("shards.py", "LOCKING")]
    return len(calls) > 5 and others == [("shards.py", "True")], f"{len(calls) - 1} calls, all with one constant"
