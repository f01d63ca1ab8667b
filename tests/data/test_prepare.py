"""Prepared folders: the same bytes for any number of ranks, the text itself again when decoded, all or nothing."""

import gzip
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_inputs import lines

import hpcllm.mpi
from hpcllm.data import layout, shards, tokenise, tokenizer
from hpcllm.data.prepare import Split, prepare
from hpcllm.errors import CannotCreate, DataError, IOFailure, MissingInput, UsageError


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(inputs, output, **options):
    """`prepare` in this process alone, with a small vocabulary."""
    options = {"vocab_size": 300, **options}
    return prepare(hpcllm.mpi.join(), inputs=list(map(str, inputs)), output=str(output), **options)


def decoded(folder):
    """The documents of one part, as text, in order."""
    loaded = tokenizer.load(str(folder.parent / "tokenizer"))
    stream = shards.open_folder(folder)
    ids = stream.gather([0], stream.token_count)[0]
    ends = np.flatnonzero(ids == stream.separator_id)
    return [loaded.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]]


def beside(output):
    """Names in the folder of `output`, hidden ones too."""
    return sorted(os.listdir(output.parent))


# --- the same for any number of ranks ----------------------------------------------------------------------------


def test_shards_are_the_same_bytes_at_1_2_3_and_4_ranks(mpirun, texts, tmp_path):
    folder, held = texts
    made = {}
    for ranks in (1, 2, 3, 4):
        output = tmp_path / f"ranks{ranks}"
        command = ["-m", "hpcllm", "prepare", "--input", f"{folder}/*.txt", f"{folder}/c.txt.gz", "--output", output]
        command += ["--vocab-size", 300, "--validation-fraction", 0.01, "--shard-tokens", 5000]
        job = mpirun(ranks, command, check=True)
        assert json.loads(job.stdout)["ranks"] == ranks
        made[ranks] = digests(output)
    assert made[1] == made[2] == made[3] == made[4]
    train, validation = (shards.read_manifest(tmp_path / "ranks3" / part) for part in ("train", "validation"))
    assert len(train["shards"]) > 10 and len(validation["shards"]) < 3  # more shards than ranks, and fewer
    assert train["document_count"] + validation["document_count"] == len(held)
    assert beside(tmp_path / "ranks1") == [f"ranks{ranks}" for ranks in (1, 2, 3, 4)]


def test_shards_do_not_depend_on_the_units(texts, tmp_path, monkeypatch):
    folder, _ = texts
    run([folder / "a.txt"], tmp_path / "large", shard_tokens=3000)
    monkeypatch.setattr("hpcllm.data.text._UNIT_BYTES", (100, 700))
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 5000)
    run([folder / "a.txt"], tmp_path / "small", shard_tokens=3000)
    assert digests(tmp_path / "small") == digests(tmp_path / "large")


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
def test_units_are_dealt_once_each_and_evenly(weights, size):
    dealt = tokenise.share(weights, size)
    assert sorted(index for each in dealt for index in each) == list(range(len(weights)))
    loads = [sum(weights[index] for index in each) for each in dealt]
    assert max(loads) - min(loads) <= max(weights, default=0)


@given(st.lists(st.lists(st.integers(1, 30), max_size=12), min_size=1, max_size=6), st.integers(1, 40))
def test_shard_borders_depend_on_the_documents_alone(units, shard_tokens):
    """Cutting the same documents into units otherwise gives the same shards, none shorter than it could be."""
    lengths = [length for unit in units for length in unit]

    def shards_of(units):
        first, placed = 0, {}
        for unit in units:
            unit = np.array(unit, np.int64)
            for slot, begin, end in layout.runs(first, unit, shard_tokens):
                placed.setdefault(slot, []).extend(unit[begin:end].tolist())
            first += int(unit.sum())
        return [placed[slot] for slot in sorted(placed)]

    whole = shards_of([lengths])
    assert shards_of(units) == whole
    assert [length for shard in whole for length in shard] == lengths
    assert all(sum(shard[:-1]) < shard_tokens for shard in whole)


# --- what is in them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_tokens_decode_to_the_text(texts, tmp_path, kind):
    folder, held = texts
    run([folder / "a.txt", folder / "b.txt", folder / "c.txt.gz"], tmp_path / "o", tokenizer_kind=kind)
    found = decoded(tmp_path / "o" / "train")
    if kind == "bpe":
        assert found == held
    else:  # lower-cased, without accents, blanks around punctuation: compare letters and digits

        def plain(text):
            table = str.maketrans("éï", "ei")
            return [character for character in text.lower().translate(table) if character.isalnum()]

        assert list(map(plain, found)) == list(map(plain, held))


def test_a_document_may_be_longer_than_a_shard_and_is_never_divided(tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(["short one", "word " * 3000, "short two", "x", "y"]))
    run([tmp_path / "t.txt"], tmp_path / "o", shard_tokens=10, tokenizer_kind="bpe")
    documents = decoded(tmp_path / "o" / "train")
    assert documents == ["short one", "word " * 3000, "short two", "x", "y"]
    counts = [shard["document_count"] for shard in shards.read_manifest(tmp_path / "o" / "train")["shards"]]
    assert sum(counts) == 5 and len(counts) > 1


def test_very_long_documents_are_encoded_in_pieces_with_the_same_ids(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text(" ".join(lines(300, 9)) + "\nanother\n")
    for name, characters in (("whole", 1 << 20), ("pieces", 1000)):
        monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", characters)
        monkeypatch.setattr(tokenise.pieces, "__defaults__", (characters,))
        run([tmp_path / "t.txt"], tmp_path / name, tokenizer_kind="bpe")
    whole, pieces = ((tmp_path / name / "train" / "shard-00000.h5").read_bytes() for name in ("whole", "pieces"))
    assert whole == pieces and decoded(tmp_path / "pieces" / "train")[1] == "another"


def test_text_that_spells_a_special_token_is_text(tmp_path):
    (tmp_path / "t.txt").write_text("about <|endoftext|> here\n" * 3)
    run([tmp_path / "t.txt"], tmp_path / "o", tokenizer_kind="bpe")
    stream = shards.open_folder(tmp_path / "o" / "train")
    ids = stream.gather([0], stream.token_count)[0]
    assert stream.document_count == 3 == (ids == stream.separator_id).sum()


def test_a_given_tokenizer_is_kept_and_used(texts, tmp_path):
    folder, _ = texts
    run([folder / "a.txt"], tmp_path / "first")
    given_folder = tmp_path / "first" / "tokenizer"
    summary = run([folder / "b.txt"], tmp_path / "second", tokenizer=str(given_folder))
    stream = shards.open_folder(tmp_path / "second" / "train")
    assert summary["tokenizer_hash"] == stream.tokenizer_hash == tokenizer.folder_hash(str(given_folder))
    tokenizer.check_same(stream, str(tmp_path / "second" / "tokenizer"))
    loaded = tokenizer.load(str(given_folder))
    first = next(line for line in (folder / "b.txt").read_text().splitlines() if line)
    ids = loaded(first, add_special_tokens=False).input_ids
    assert stream.gather([0], len(ids) + 1)[0].tolist() == [*ids, loaded.sep_token_id]


def test_json_lines_and_paragraphs_are_the_same_documents(tmp_path):
    documents = [line for line in lines(60, 4) if line]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": each}) + "\n" for each in documents))
    (tmp_path / "t.txt").write_text("\n\n".join(documents))
    run([tmp_path / "t.jsonl"], tmp_path / "o1", jsonl_field="body")
    run([tmp_path / "t.txt"], tmp_path / "o2", document_separator="blank-line")
    assert digests(tmp_path / "o1") == digests(tmp_path / "o2")


def test_equal_documents_fall_on_one_side_of_the_split(tmp_path):
    documents = [line for line in lines(80, 6) if line]
    (tmp_path / "t.txt").write_text("\n".join(documents * 3))
    run([tmp_path / "t.txt"], tmp_path / "o", validation_fraction=0.3, tokenizer_kind="bpe")
    train, validation = decoded(tmp_path / "o" / "train"), decoded(tmp_path / "o" / "validation")
    assert not set(train) & set(validation) and sorted(train + validation) == sorted(documents * 3)
    assert 0.15 < len(validation) / len(documents * 3) < 0.45


def test_the_split_is_of_the_asked_size():
    split = Split(0.1)
    parts = [split.part(f"document {index}") for index in range(20_000)]
    assert abs(parts.count("validation") - 2000) < 5 * np.sqrt(20_000 * 0.1 * 0.9)


# --- refusals leave nothing behind -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "options", "kind", "says"),
    [
        (b"ok\n\xfe\n", {}, DataError, r"t\.txt is not UTF-8: byte 0xfe in line 2"),
        (b"", {}, DataError, "nothing to read"),
        (b"\n \n", {}, DataError, "there is no document"),
        (b"one\ntwo\n", {"validation_fraction": 1e-9}, DataError, "1e-09 of 2 documents leaves none for validation"),
        (b"one\ntwo\n", {"validation_fraction": 0.999999}, DataError, "of 2 documents leaves none for train"),
        (b"one\n", {"validation_fraction": 1.0}, UsageError, "1.0 is not at least 0 and below 1"),
        (b"one\n", {"shard_tokens": 0}, UsageError, "shard-tokens: 0"),
        (b"one\n", {"vocab_size": 5}, UsageError, "vocab-size: 5 cannot hold the alphabet"),
        (b"one\n", {"document_separator": "tab"}, UsageError, '"tab" is not one of newline, blank-line'),
        (b"one\n", {"jsonl_field": "text"}, DataError, r"t\.txt line 1: not JSON"),
        (b"one\n", {"tokenizer": "nowhere"}, MissingInput, "there is no folder nowhere"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, content, options, kind, says):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(kind, match=says) as refused:
        run([tmp_path / "t.txt"], tmp_path / "o", **options)
    assert refused.value.agreed and beside(tmp_path / "o") == ["t.txt"]


def test_an_existing_output_is_left_alone(tmp_path):
    (tmp_path / "t.txt").write_text("some text here\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    for overwrite, says in ((False, "exists; give another name"), (True, "also holds file")):
        with pytest.raises(CannotCreate, match=says):
            run([tmp_path / "t.txt"], tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(CannotCreate, match="is not a folder that can be overwritten"):
        run([tmp_path / "t.txt"], tmp_path / "t.txt", overwrite=True)
    (tmp_path / "mine" / "file").rename(tmp_path / "mine" / "train")
    with pytest.raises(CannotCreate, match="is not a folder that prepare wrote"):
        run([tmp_path / "t.txt"], tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "train").read_text() == "precious"
    with pytest.raises(CannotCreate, match="cannot be created"):
        run([tmp_path / "t.txt"], tmp_path / "t.txt" / "o")


def test_overwriting_replaces_all_of_the_old_folder_only_when_the_new_one_is_done(tmp_path):
    (tmp_path / "t.txt").write_text("some text here\nand more\n" * 20)
    run([tmp_path / "t.txt"], tmp_path / "o", shard_tokens=5)
    first = digests(tmp_path / "o")
    with pytest.raises(CannotCreate):
        run([tmp_path / "t.txt"], tmp_path / "o")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError):
        run([tmp_path / "bad.txt"], tmp_path / "o", overwrite=True)
    assert digests(tmp_path / "o") == first
    run([tmp_path / "t.txt"], tmp_path / "o", tokenizer=str(tmp_path / "o" / "tokenizer"), overwrite=True)
    assert len(list((tmp_path / "o" / "train").glob("*.h5"))) == 1
    assert beside(tmp_path / "o") == ["bad.txt", "o", "t.txt"]
    (tmp_path / "t.txt").rename(tmp_path / "o" / "train" / "t.txt")
    with pytest.raises(CannotCreate, match="would delete the input"):
        run([tmp_path / "o" / "train" / "t.txt"], tmp_path / "o", overwrite=True)


def test_an_error_that_one_rank_meets_in_the_middle_ends_the_job_with_its_sentence(mpirun, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(lines(2000, 7)))
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("\n".join(lines(2000, 8)))
    run([tmp_path / "a.txt"], tmp_path / "o")  # with a tokenizer given, nobody reads the text beforehand
    content = bytearray((tmp_path / "a.txt").read_bytes())
    content[-3] = 0xFF
    (tmp_path / "a.txt").write_bytes(content)
    command = ["-m", "hpcllm", "prepare", "--input", tmp_path / "b.txt.gz", tmp_path / "a.txt"]
    command += ["--output", tmp_path / "p", "--tokenizer", tmp_path / "o" / "tokenizer"]
    job = mpirun(3, command, timeout=60)
    assert job.returncode == DataError.code, job.stderr
    assert job.stderr.count("is not UTF-8: byte 0xff in line 2000 at byte offset") == 1, job.stderr
    assert beside(tmp_path / "p") == ["a.txt", "b.txt.gz", "o"]


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(lines(3000, 3)))
    run([tmp_path / "t.txt"], tmp_path / "o")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # below the spool, above the tokenizer
        with pytest.raises(IOFailure, match="File too large"):
            run([tmp_path / "t.txt"], tmp_path / "p", tokenizer=str(tmp_path / "o" / "tokenizer"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert beside(tmp_path / "p") == ["o", "t.txt"]


KILLED = """
import sys, time
import hpcllm.mpi
from hpcllm.data import prepare, scratch

def stop(*arguments):
    print("here", flush=True)
    time.sleep(100)

setattr(scratch, "publish", stop)
prepare.prepare(hpcllm.mpi.join(), inputs=[sys.argv[1]], output=sys.argv[2], vocab_size=300)
"""


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path, capfd):
    """Killed at the last moment, when all files are written but not yet published."""
    (tmp_path / "t.txt").write_text("\n".join(lines(100, 3)))
    job = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "t.txt", tmp_path / "o"], stdout=subprocess.PIPE, text=True
    )
    assert job.stdout.readline() == "here\n"
    job.send_signal(signal.SIGKILL)
    job.wait(10)
    assert not (tmp_path / "o").exists()
    with pytest.raises(MissingInput):
        shards.open_folder(tmp_path / "o" / "train")
    run([tmp_path / "t.txt"], tmp_path / "o")
    left = [name for name in beside(tmp_path / "o") if name.startswith(".o.partial-")]
    assert len(left) == 1 and left[0] in capfd.readouterr().err


def test_progress_reaches_the_log_in_plain_lines(mpirun, texts, tmp_path):
    folder, _ = texts
    began = time.monotonic()
    job = mpirun(
        2,
        ["-m", "hpcllm", "prepare", "--input", f"{folder}/a.txt", "--output", tmp_path / "o", "--vocab-size", 300],
        env={"HPCLLM_PROGRESS": "lines"},
        check=True,
    )
    size = (folder / "a.txt").stat().st_size / 1e6
    assert f"prepare: {size:.1f} of {size:.1f} MB (100 %)" in job.stderr and "on 2 ranks" in job.stderr
    assert json.loads(job.stdout)["seconds"] < time.monotonic() - began
