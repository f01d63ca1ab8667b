"""Labelled data: the same bytes at any number of ranks, all or nothing, and a summary of what became of examples."""

import hashlib
import json
import random

import numpy as np
import pytest
from small_labelled import KINDS, prepare, record, sentences, write, write_tokenizer

import hpcllm.mpi
from hpcllm.data import shards
from hpcllm.data.prepare_labelled import table
from hpcllm.errors import CannotCreate, DataError, MissingInput, UsageError

COUNT = 200


def written(world, base, kind, count=COUNT, name="train.jsonl"):
    if world.is_root:
        write(base / name, kind, count, 1)
    world.comm.Barrier()


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_the_same_bytes_at_any_number_of_ranks(world, base, kind, monkeypatch):
    monkeypatch.setattr("hpcllm.data.text._UNIT_BYTES", (1000, 1000))
    written(world, base, kind)
    how = {"validation_fraction": 0.2, "shard_tokens": 500, "max_tokens": 12}
    together = prepare(world, base, "together", kind, **how)
    alone = prepare(hpcllm.mpi.alone(world), base, f"alone-{world.rank}", kind, **how)
    assert digests(base / "together") == digests(base / f"alone-{world.rank}")
    for part in ("train", "validation"):
        assert together[part] == alone[part]
    assert sum(together[part]["became"]["read"] for part in ("train", "validation")) == COUNT
    manifest = shards.read_manifest(str(base / "together" / "train"))
    assert len(manifest["shards"]) > 2
    for shard in manifest["shards"]:
        shards.check(str(base / "together" / "train"), shard, manifest)


def columns(folder):
    manifest = shards.read_manifest(str(folder))
    mapped = [
        shards.map_beside(folder / shard["name"], shards.columns_of(manifest["labelled"]))
        for shard in manifest["shards"]
    ]
    return {name: np.concatenate([one[name] for one in mapped]) for name in mapped[0] if name != "document_offsets"}


def test_columns_hold_the_labels_of_the_input_in_its_order(world, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    for kind in KINDS:
        write(tmp_path / "train.jsonl", kind, COUNT, 1)
        summary = prepare(world, tmp_path, kind, kind, max_tokens=100)
        examples = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
        wanted = [example["tags" if kind == "tags" else "label"] for example in examples]
        names, found = summary["labels"], columns(tmp_path / kind / "train")["labels"]
        if kind == "value":
            assert names == [] and found[:, 0].tolist() == wanted
        elif kind == "multi":
            assert names == ["person", "place"]
            assert [[name for name, on in zip(names, row, strict=True) if on] for row in found] == wanted
        else:
            assert names == (
                ["O", *(f"{p}-{k}" for k in ("person", "place") for p in "BI")] if kind == "tags" else ["bad", "good"]
            )
            assert [names[number] for number in found[:, 0] if number != -100] == (
                [tag for tags in wanted for tag in tags] if kind == "tags" else wanted
            )
        counts = summary["train"]["label_counts"]
        assert counts == {name: sum(name in np.ravel(one) for one in wanted) for name in names} or kind == "tags"


def test_validation_and_test_files_are_parts_of_their_own(world, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    for name, count in (("a", 30), ("b", 20), ("c", 10)):
        write(tmp_path / f"{name}.jsonl", "single", count, count)
    sources = {
        "inputs": [f"{tmp_path}/a.jsonl"],
        "validation": [f"{tmp_path}/b.jsonl"],
        "test": [f"{tmp_path}/c.jsonl"],
    }
    summary = prepare(world, tmp_path, "out", "single", **sources)
    assert [summary[part]["examples"] for part in ("train", "validation", "test")] == [30, 20, 10]
    told = table(summary)
    assert "examples read" in told and told.splitlines()[0].split() == ["train", "validation", "test"]
    assert prepare(world, tmp_path, "out", "single", **sources, overwrite=True)["test"] == summary["test"]
    row = next(line for line in told.splitlines() if line.startswith("label good"))
    assert [int(n) for n in row.split()[2:]] == [
        summary[p]["label_counts"]["good"] for p in ("train", "validation", "test")
    ]


@pytest.mark.mpi
def test_what_is_wrong_is_told_on_every_rank_and_nothing_is_left(world, base):
    written(world, base, "single")
    if world.is_root:
        draw = random.Random(0)
        odd = [json.dumps(record("single", words, tags, draw)) for words, tags in sentences(50, 3)]
        odd[40] = json.dumps({"text": "the", "label": "odd"})
        (base / "bad.jsonl").write_text("\n".join(odd) + "\n")
    world.comm.Barrier()
    before = sorted(path.name for path in base.iterdir())

    def refused(kind, words, **how):
        with pytest.raises(kind, match=words):
            prepare(world, base, "out", "single", **how)
        world.comm.Barrier()
        assert sorted(path.name for path in base.iterdir()) == before

    train, bad = [f"{base}/train.jsonl"], [f"{base}/bad.jsonl"]
    refused(DataError, 'bad.jsonl line 41: the label "odd" is none of the 2', inputs=train, test=bad)
    refused(DataError, r'train.jsonl line \d+: the label "bad" is none of the 1', inputs=train, given_labels=["good"])
    refused(UsageError, "labels: a name is given twice", inputs=train, given_labels=["good", "good"])
    refused(UsageError, "max-tokens: 3 leaves no room", inputs=train, max_tokens=3)
    refused(UsageError, 'there is no field|no column|"split" is for words', inputs=train, truncation="split")
    refused(DataError, "more than 8 tokens", inputs=train, max_tokens=8, truncation="error")
    refused(MissingInput, "there is no file", inputs=train, validation=[f"{base}/none.jsonl"])
    refused(
        UsageError,
        "either validation files or a validation-fraction",
        inputs=train,
        validation=train,
        validation_fraction=0.1,
    )
    prepare(world, base, "out", "single", inputs=train)
    with pytest.raises(CannotCreate, match="exists"):
        prepare(world, base, "out", "single", inputs=train)
    prepare(world, base, "out", "single", inputs=train, overwrite=True)


def test_labels_of_a_shard_must_be_those_of_the_manifest(world, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    write(tmp_path / "train.jsonl", "single", 20, 1)
    prepare(world, tmp_path, "out", "single")
    folder = tmp_path / "out" / "train"
    manifest = shards.read_manifest(str(folder))
    manifest["labelled"]["names"] = ["good", "bad"]
    with pytest.raises(DataError, match="says other things of its labels"):
        shards.check(str(folder), manifest["shards"][0], manifest)
    del manifest["labelled"]
    (folder / shards.MANIFEST).unlink()
    keys = ("vocab_size", "separator_id", "tokenizer_hash")
    shards.write_manifest(str(folder), manifest["shards"], **{key: manifest[key] for key in keys})
    assert shards.read_manifest(str(folder)).get("labelled") is None


def test_a_part_of_which_nothing_is_left_is_refused(world, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "train.jsonl").write_text('{"text": " ", "label": "a"}\n{"text": "the of paris rome", "label": "a"}\n')
    with pytest.raises(DataError, match=r"no example is left for train .2 were read, 1 of them empty, 1 dropped"):
        prepare(world, tmp_path, "out", "single", max_tokens=5, truncation="drop")


def test_a_tag_that_is_no_part_of_an_entity_is_named_where_others_are(world, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "train.conll").write_text("anna B-person\n\nsees O\nrome BPLACE\n")
    with pytest.raises(DataError, match=r'train\.conll line 3: the tag "BPLACE" is neither O nor a part of an entity'):
        prepare(world, tmp_path, "out", "tags", inputs=[str(tmp_path / "train.conll")])
    (tmp_path / "train.conll").write_text("anna B-person\n\nsees O\n")
    (tmp_path / "test.conll").write_text("sees O\n\nrome X-place\n")
    with pytest.raises(DataError, match=r'test\.conll line 3: the tag "X-place" is neither O nor a part of an entity'):
        prepare(
            world, tmp_path, "out", "tags", inputs=[str(tmp_path / "train.conll")], test=[str(tmp_path / "test.conll")]
        )
    # Parts of speech are what they are.
    (tmp_path / "train.conll").write_text("anna PROPN\n\nsees VERB\n")
    assert prepare(world, tmp_path, "out", "tags", inputs=[str(tmp_path / "train.conll")])["labels"] == [
        "PROPN",
        "VERB",
    ]


def test_a_validation_fraction_that_leaves_nothing_is_named(world, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    write(tmp_path / "train.jsonl", "single", 3, 1)
    with pytest.raises(DataError, match=r"left for validation \(0 were read.*; validation-fraction is 1e-09\)"):
        prepare(world, tmp_path, "out", "single", validation_fraction=1e-9)
