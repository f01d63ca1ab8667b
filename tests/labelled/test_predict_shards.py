"""Examples in shards are answered as the rows of the files that the shards were made of."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_labelled import prepare, reading, write, write_tokenizer
from small_questions import prepare as prepare_questions
from small_questions import questions, write_lines
from small_runs import shared
from transformers import AutoConfig, AutoTokenizer

import hpcllm.mpi
from hpcllm import predict
from hpcllm.data import shards, tokenizer
from hpcllm.data.manifest import digest
from hpcllm.errors import CannotCreate, DataError, MissingInput, UsageError
from hpcllm.tasks import TASKS

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BERT |= {"max_position_embeddings": 64, "vocab_size": 200, "initializer_range": 0.5}
T5 = {
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 512,
    "decoder_start_token_id": 0,
}
COUNT = 600
TASK = {"single": "sequence_classification", "multi": "sequence_classification", "value": "sequence_classification"}
TASK |= {"pair": "sequence_classification", "tags": "token_classification", "span": "question_answering"}
TASK |= {"text": "seq2seq_lm"}
# What is asked of which data, and how.
ASKED = {kind: (kind, {}) for kind in TASK}
ASKED |= {"embedding": ("single", {"question": "embedding"}), "likeliest": ("single", {"top_k": 2})}
ASKED |= {"text": ("text", {"max_new_tokens": 6, "reference": "target"})}
COLUMNS = {"pair": ("text", "pair"), "text": ("source",)}  # of files


def rows_of(kind, base):
    """A file of rows with labels."""
    if kind == "span":
        return write_lines(base / "span.jsonl", questions(COUNT // 3, 6, 0.2, longest=80))
    path = write(base / f"{kind}.jsonl", "single" if kind == "pair" else kind, COUNT, 4)
    if kind == "pair":
        rows = read(path)
        write_lines(
            path, [{**row, "pair": other["text"][:20].strip()} for row, other in zip(rows, rows[::-1], strict=True)]
        )
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with, of each kind, KIND.jsonl, shards of it in KIND/train, and a model of random weights."""
    world = hpcllm.mpi.join()
    base = shared(world, tmp_path_factory.mktemp("shards"))
    if world.is_root:
        write_tokenizer(base / "tokenizer")
        write_tokenizer(base / "t5", "t5")
        for kind in TASK:
            rows_of(kind, base)
    world.comm.Barrier()
    for kind in TASK:
        how = {"inputs": [str(base / f"{kind}.jsonl")], "shard_tokens": 900, "max_tokens": 64}
        if kind == "span":
            prepare_questions(world, base, kind, **how)
        elif kind == "pair":
            prepare(world, base, kind, kind, reading=reading("single", pair="pair"), **how)
        else:  # sentences are split where the model would not split them
            how |= (
                {"max_tokens": 12}
                if kind == "tags"
                else {"tokenizer": str(base / "t5"), "max_tokens": 128}
                if kind == "text"
                else {}
            )
            prepare(world, base, kind, kind, **how)
        if world.is_root:
            save_model(base, kind)
    world.comm.Barrier()
    return base


def save_model(base, kind):
    task, labelled = TASKS[TASK[kind]], shards.read_manifest(base / kind / "train")["labelled"]
    family, sizes = ("t5", T5) if kind == "text" else ("bert", BERT)
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **sizes, **task.head(labelled))
    task.model_class().from_config(config).save_pretrained(base / f"{kind}-model")
    AutoTokenizer.from_pretrained(base / kind / "tokenizer").save_pretrained(base / f"{kind}-model")


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def close(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, abs=1e-4) if isinstance(a, float) else a == b


@pytest.mark.mpi
@pytest.mark.parametrize("asked", ASKED)
def test_examples_in_shards_are_answered_as_the_rows_they_are_made_of(world, made, tmp_path, asked):
    base, (kind, how) = shared(world, tmp_path), ASKED[asked]
    model, rows, folder = made / f"{kind}-model", str(made / f"{kind}.jsonl"), made / kind / "train"
    columns = {"columns": COLUMNS.get(kind, (None, None))}
    of_rows = predict.predict_file(world, model, [rows], str(base / "rows"), **columns, **how)
    of_shards = predict.predict_file(world, model, [str(folder)], str(base / "shards"), **how)
    wanted, found = read(base / "rows"), read(base / "shards")
    for row in wanted if kind == "span" else ():
        row["answers"] = [answer["text"] for answer in row["answers"]]
    for row, example in zip(wanted, found, strict=True):
        assert close(example, row), (example, row)
    assert of_shards["rows"] == len(found) and of_shards["units"] > 1 < len(shards.read_manifest(folder)["shards"])
    assert len({json.dumps(example["prediction"]) for example in found}) > 5
    assert of_shards.get("scores") == of_rows.get("scores") and ("scores" in of_shards) == (kind == "text")
    alone, output = hpcllm.mpi.alone(world), base / f"alone-{world.rank}"
    predict.predict_file(alone, model, [str(folder)], str(output), **how)
    assert output.read_bytes() == (base / "shards").read_bytes()


def test_some_sentences_and_texts_take_several_documents(world, made):
    for kind in ("tags", "span"):
        manifest = shards.read_manifest(made / kind / "train")
        assert manifest["document_count"] > 1.2 * len(read(made / f"{kind}.jsonl"))


def test_what_is_drawn_depends_on_the_seed_alone(world, made, tmp_path):
    outputs = []
    for number, seed in enumerate((1, 1, 2)):
        how = {"max_new_tokens": 4, "temperature": 1.5, "seed": seed, "batch_tokens": 2000 if number else 500}
        folder = f"{made}/text/train{'/' * number}"
        predict.predict_file(world, made / "text-model", [folder], str(tmp_path / str(number)), **how)
        outputs.append([row["prediction"]["written"] for row in read(tmp_path / str(number))])
    assert outputs[0] == outputs[1] != outputs[2]
    said = {}
    for row in read(tmp_path / "0"):
        said.setdefault(row["source"], set()).add(row["prediction"]["written"])
    assert max(map(len, said.values())) > 1  # of the same text, each example by itself


@pytest.mark.mpi
def test_shards_that_do_not_suit_are_refused_in_a_sentence(world, made, prepared, tmp_path):
    base = shared(world, tmp_path)

    def refused(error, words, kind, *folders, **how):
        with pytest.raises(error, match=words) as refusal:
            predict.predict_file(world, made / f"{kind}-model", list(map(str, folders)), str(base / "out"), **how)
        assert refusal.value.agreed
        world.comm.Barrier()
        assert not (base / "out").exists() and not (base / ".out.partial").exists()

    tags, single = made / "tags" / "train", made / "single" / "train"
    takes = "give sequence_classification shards with labels of the kind single or multi or value, or files of text"
    refused(DataError, f"have labels of the kind tags; {takes}", "single", tags)
    refused(DataError, f"have no labels; {takes}", "single", prepared / "train")
    refused(DataError, "have no labels; give embedding shards", "single", prepared / "train", question="embedding")
    refused(DataError, "labels of the kind single; give seq2seq_lm shards with labels of the kind text", "text", single)
    refused(UsageError, "--format is for files", "single", single, format="jsonl")
    refused(UsageError, "--text-column is for files", "single", single, columns=("text", None))
    refused(UsageError, "--ask is for files", "span", made / "span" / "train", ask="who")
    refused(UsageError, "give it alone, and not 2 inputs", "single", single, single)
    refused(MissingInput, "there is no file", "single", made / "single" / "test")
    refused(DataError, "is a folder; name its files", "single", made / "single")

    if world.is_root:
        words = [" ".join(f"word{number}" for number in range(40))]
        tokenizer.save(tokenizer.train("wordpiece", 60, lambda: iter(words * 2)), "wordpiece", str(base / "other"))
        write_lines(base / "long.jsonl", [{"text": "good " * 100, "label": "good"}])
    world.comm.Barrier()
    how = {"inputs": [str(base / "long.jsonl")], "max_tokens": 128}
    prepare(world, base, "foreign", "single", **how, tokenizer=str(base / "other"))
    refused(DataError, "was tokenised by another tokenizer", "single", base / "foreign" / "train")
    prepare(world, base, "long", "single", **how, tokenizer=str(made / "tokenizer"))
    why = r"has examples of \d+ tokens, the model has room for 64; prepare with --max-tokens 64"
    refused(DataError, why, "single", base / "long" / "train")

    if world.is_root:
        (base / "empty").mkdir()
        manifest = json.loads((single / "manifest.json").read_text())
        manifest |= {"shards": [], "token_count": 0, "document_count": 0}
        (base / "empty" / "manifest.json").write_text(json.dumps(manifest | {"digest": digest(manifest)}))
    world.comm.Barrier()
    refused(DataError, "empty.*there are no shards", "single", base / "empty")


def test_generation_from_a_text_alone_and_replies_take_files(world, made, tmp_path):
    write_tokenizer(tmp_path / "causal", "bpe")
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=320)
    TASKS["causal_lm"].model_class().from_config(config).save_pretrained(tmp_path / "causal")
    with pytest.raises(DataError, match="labels of the kind single; give causal_lm files of text"):
        predict.predict_file(world, tmp_path / "causal", [str(made / "single" / "train")], str(tmp_path / "out"))


@pytest.mark.mpi
def test_damaged_tokens_end_all_ranks_alike_and_what_is_done_is_kept(world, made, tmp_path):
    base = shared(world, tmp_path)
    folder, model = base / "damaged", made / "single-model"
    if world.is_root:
        shutil.copytree(made / "single" / "train", folder)
        turn_a_bit(folder)
    world.comm.Barrier()
    with pytest.raises(DataError, match="is damaged in block 0 of its tokens") as refusal:
        predict.predict_file(world, model, [str(folder)], str(base / "out"))
    assert refusal.value.agreed and not (base / "out").exists()
    if world.is_root:
        turn_a_bit(folder)
    world.comm.Barrier()
    if world.size == 1:  # where the first unit is done before the last
        with pytest.raises(CannotCreate, match=r"input 1 .*damaged: shards of digest .* \(now .*multi/train: shards"):
            predict.predict_file(world, model, [str(made / "multi" / "train")], str(base / "out"))
    summary = predict.predict_file(world, model, [str(folder)], str(base / "out"))
    assert summary["reused_units"] > 0 or world.size > 1
    predict.predict_file(world, model, [str(made / "single" / "train")], str(base / "whole"))
    assert (base / "out").read_bytes() == (base / "whole").read_bytes()


def turn_a_bit(folder):
    """Of the first token of the last shard."""
    last = shards.read_manifest(folder)["shards"][-1]
    with open(folder / last["name"], "r+b") as file:
        file.seek(last["tokens_offset"])
        byte = file.read(1)[0]
        file.seek(last["tokens_offset"])
        file.write(bytes([byte ^ 1]))
