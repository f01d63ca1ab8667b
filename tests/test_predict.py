"""Predictions: what transformers says of the same text, and the same bytes however many ranks share the rows."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import clean_environment, find_mpirun
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import hpcllm.mpi
from benchmarks import jobs
from hpcllm import predict
from hpcllm.data import order, tokenizer
from hpcllm.data.labelled import Reading
from hpcllm.data.prepare_labelled import prepare_labelled
from hpcllm.errors import CannotCreate, DataError, MissingInput, UsageError
from hpcllm.questions.generate import Continue
from hpcllm.tasks import TASKS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TAGS = ["O", "B-person", "I-person", "B-place", "I-place"]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "it",
    "saw",
    "other",
    "cats",
    "under",
    "trees",
    "near",
    "paris",
]


def texts(count, seed=0):
    """Texts of very different lengths."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size)) for size in np.minimum(40, 1 + draw.pareto(1.2, count) * 3).astype(int)]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with a small model of random weights for each task, as transformers would save it."""
    world = hpcllm.mpi.join()
    base = Path(world.comm.bcast(str(tmp_path_factory.mktemp("models"))))
    if world.is_root:
        for task, kind, head in (
            ("masked_lm", "wordpiece", {}),
            ("causal_lm", "bpe", {}),
            ("sequence_classification", "wordpiece", {"id2label": {0: "bad", 1: "good", 2: "so"}}),
            ("token_classification", "wordpiece", {"id2label": dict(enumerate(TAGS))}),
        ):
            made = tokenizer.train(kind, 140 if kind == "wordpiece" else 320, lambda: iter([" ".join(WORDS)] * 3))
            tokenizer.save(made, kind, str(base / task))
            family, sizes = ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64})
            if task != "causal_lm":
                family, sizes = "bert", {**SIZES, "max_position_embeddings": 64}
            torch.manual_seed(1)
            config = AutoConfig.for_model(family, vocab_size=400, initializer_range=0.5, **sizes, **head)
            TASKS[task].model_class().from_config(config).save_pretrained(base / task)
    world.comm.Barrier()
    return base


def shared(world, path):
    return Path(world.comm.bcast(str(path)))


def written(world, base, rows, name="rows.jsonl"):
    if world.is_root:
        (base / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    world.comm.Barrier()
    return [str(base / name)]


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


HOW = {
    "masked_lm": {},
    "causal_lm": {"max_new_tokens": 6, "temperature": 0.8, "top_k": 30, "top_p": 0.9},
    "sequence_classification": {},
    "token_classification": {},
    "embedding": {},
}


@pytest.mark.mpi
@pytest.mark.parametrize("question", HOW)
def test_answers_are_the_same_bytes_at_any_number_of_ranks(world, models, tmp_path, question):
    base = shared(world, tmp_path)
    rows = [{"id": n, "text": text + " [MASK]" * (question == "masked_lm")} for n, text in enumerate(texts(300))]
    inputs = written(world, base, rows)
    folder = models / ("sequence_classification" if question == "embedding" else question)
    how = {"question": question, "batch_tokens": 200, **HOW[question]}
    summary = predict.predict_file(world, folder, inputs, str(base / "together"), **how)
    alone = hpcllm.mpi.alone(world)
    predict.predict_file(alone, folder, inputs, str(base / f"alone-{world.rank}"), **how)
    assert (base / "together").read_bytes() == (base / f"alone-{world.rank}").read_bytes()
    answers = read(base / "together")
    assert [{key: answer[key] for key in ("id", "text")} for answer in answers] == rows
    assert summary["rows"] == 300 == sum(rank["rows"] for rank in summary["ranks"])
    # Batches do not change what is said, but for rounding.
    one = predict.predict_texts(alone, folder, [row["text"] for row in rows[:20]], **how)
    if question != "causal_lm":
        for a, b in zip(one, answers, strict=False):
            assert close(a["prediction"], b["prediction"]), (a, b)


def close(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, abs=2e-5) if isinstance(a, float) else a == b


def test_labels_and_masks_are_those_of_transformers_pipeline(world, models):
    some = texts(20, 2)
    ours = predict.predict_texts(world, models / "sequence_classification", some)
    theirs = pipeline("text-classification", model=str(models / "sequence_classification"))(some)
    for one, other in zip(ours, theirs, strict=True):
        assert one["prediction"]["label"] == other["label"]
        assert one["prediction"]["score"] == pytest.approx(other["score"], abs=1e-5)
    fill = pipeline("fill-mask", model=str(models / "masked_lm"), top_k=3)
    for answer in predict.predict_texts(world, models / "masked_lm", [text + " [MASK]" for text in some], top_k=3):
        [guesses], other = answer["prediction"]["masks"], fill(answer["text"])
        assert [one["token"] for one in guesses] == [one["token_str"].strip() for one in other]
        assert [one["score"] for one in guesses] == pytest.approx([one["score"] for one in other], abs=1e-5)


def test_tags_are_those_of_transformers_pipeline(world, models):
    find = pipeline("token-classification", model=str(models / "token_classification"), aggregation_strategy=None)
    words = AutoTokenizer.from_pretrained(models / "token_classification")
    for answer in predict.predict_texts(world, models / "token_classification", texts(20, 3)):
        said, theirs = answer["prediction"], {one["index"]: one for one in find(answer["text"], ignore_labels=[])}
        places = words(answer["text"].split(), is_split_into_words=True).word_ids()
        firsts = [places.index(word) for word in range(len(said["words"]))]
        assert said["tags"] == [theirs[at]["entity"] for at in firsts]
        assert said["scores"] == pytest.approx([float(theirs[at]["score"]) for at in firsts], abs=1e-5)
        for entity in said["entities"]:
            inside = said["tags"][entity["start"] : entity["end"]]
            assert {tag[2:] for tag in inside} == {entity["type"]}
            assert entity["text"].split() == said["words"][entity["start"] : entity["end"]]


@pytest.mark.parametrize("beams", [1, 3])
def test_continuations_are_those_of_generate(world, models, beams):
    folder = models / "causal_lm"
    words, net = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for answer in predict.predict_texts(world, folder, texts(6, 4), max_new_tokens=8, beams=beams):
        asked = words(answer["text"], return_tensors="pt").input_ids
        made = net.generate(asked, do_sample=False, num_beams=beams, max_new_tokens=8, pad_token_id=0)[
            0, asked.shape[1] :
        ]
        assert answer["prediction"]["continuation"] == words.decode(made, skip_special_tokens=True)


def test_what_is_drawn_follows_the_model_and_is_of_the_row(world, models):
    folder, count = models / "causal_lm", 4000
    words, net = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    asker = Continue(net, words, max_new_tokens=1, temperature=2.0, top_k=5)
    keys = order.key(3, 1, np.arange(count))
    with torch.inference_mode():
        asked = words("the cat", return_tensors="pt").input_ids
        logits = net(asked).logits[:, -1]
        draw = asker._draw(keys, asked.shape[1])
        made = draw(asked.expand(count, -1), logits.expand(count, -1)).argmax(-1)
        again = asker._draw(keys[[7, 3]], asked.shape[1])(asked.expand(2, -1), logits.expand(2, -1)).argmax(-1)
    assert again.tolist() == made[[7, 3]].tolist()
    values, tokens = (logits[0] / 2.0).topk(5)
    assert set(made.tolist()) <= set(tokens.tolist())
    for token, share in zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True):
        assert float((made == token).float().mean()) == pytest.approx(
            share, abs=4 * (share * (1 - share) / count) ** 0.5
        )


def test_embeddings_are_means_of_length_one(world, models):
    folder, some = models / "sequence_classification", texts(5, 6)
    words, net = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    ours = {
        pooling: predict.predict_texts(world, folder, some, question="embedding", pooling=pooling)
        for pooling in ("mean", "first")
    }
    # Models for words have no pooler, which nobody needs.
    [answer] = predict.predict_texts(world, models / "token_classification", some[:1], question="embedding")
    assert len(answer["prediction"]["embedding"]) == 32
    for number, text in enumerate(some):
        hidden = net(**words(text, return_tensors="pt")).last_hidden_state[0].detach()
        for pooling, wanted in (("mean", hidden.mean(0)), ("first", hidden[0])):
            found = ours[pooling][number]["prediction"]["embedding"]
            assert found == pytest.approx((wanted / wanted.norm()).tolist(), abs=2e-5)


def test_long_texts_are_cut_or_go_on(world, models):
    long = "the cat sat on a mat " * 40
    [answer] = predict.predict_texts(world, models / "sequence_classification", [long])
    assert answer["prediction"]["truncated"] is True
    [short] = predict.predict_texts(world, models / "sequence_classification", ["the cat"])
    assert "truncated" not in short["prediction"]
    [tagged] = predict.predict_texts(world, models / "token_classification", [long])
    assert len(tagged["prediction"]["tags"]) == len(long.split())
    with pytest.raises(DataError, match=r"text 2: \d+ tokens, more than the 64"):
        predict.predict_texts(world, models / "masked_lm", ["a [MASK]", long + "[MASK]"])


@pytest.mark.mpi
def test_what_cannot_be_answered_is_named_by_line(world, models, tmp_path):
    base = shared(world, tmp_path)

    def refused(kind, words, folder, rows, **how):
        inputs = written(world, base, rows)
        with pytest.raises(kind, match=words):
            predict.predict_file(world, models / folder, inputs, str(base / "out"), overwrite=True, **how)
        world.comm.Barrier()
        assert not (base / "out").exists()

    fine = {"text": "the [MASK]"}
    refused(DataError, r"rows.jsonl line 2: there is no \[MASK\] to fill", "masked_lm", [fine, {"text": "the"}])
    refused(DataError, "line 3: the text is empty", "sequence_classification", [fine, fine, {"text": " "}])
    refused(DataError, "line 2: no field 'text'", "sequence_classification", [fine, {"tekst": "a"}])
    refused(DataError, "line 2: there are no words in it", "token_classification", [fine, {"tokens": []}])
    refused(UsageError, "--task causal_lm: .* is a model for masked_lm", "masked_lm", [fine], question="causal_lm")
    refused(UsageError, "--temperature is nothing that masked_lm knows", "masked_lm", [fine], temperature=1.0)
    refused(UsageError, "--top-k 500 must be 1 to", "masked_lm", [fine], top_k=500)
    refused(UsageError, "give one of them", "causal_lm", [fine], temperature=1.0, beams=2)
    refused(MissingInput, "nowhere is neither a checkpoint", "nowhere", [fine])
    with pytest.raises(MissingInput, match="there is no file"):
        predict.predict_file(world, models / "masked_lm", [str(base / "none.txt")], str(base / "out"))


@pytest.mark.mpi
def test_another_question_does_not_go_on_with_old_answers(world, models, tmp_path):
    base = shared(world, tmp_path)
    inputs = written(world, base, [{"text": text} for text in texts(3000)] + [{"text": ""}])
    with pytest.raises(DataError, match="line 3001: the text is empty"):
        predict.predict_file(world, models / "sequence_classification", inputs, str(base / "out"))
    world.comm.Barrier()
    with pytest.raises(CannotCreate, match="question"):
        predict.predict_file(world, models / "sequence_classification", inputs, str(base / "out"), question="embedding")


def test_words_of_rows_may_be_lists(world, models, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"tokens": ["New York", "cat"]}\n')
    predict.predict_file(world, models / "token_classification", [str(tmp_path / "rows.jsonl")], str(tmp_path / "out"))
    [answer] = read(tmp_path / "out")
    assert answer["prediction"]["words"] == ["New York", "cat"] and len(answer["prediction"]["tags"]) == 2


@pytest.mark.parametrize("given", ["rows.tsv", "data/train"])
def test_a_job_that_is_killed_goes_on_to_the_same_bytes(models, tmp_path, mpirun, given):
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "".join(f"{text}\tso\n" for text in texts(8000, 8)))
    if given == "data/train":
        how = {"tokenizer": models / "sequence_classification", "output": tmp_path / "data"}
        how = {name: str(path) for name, path in how.items()}
        prepare_labelled(hpcllm.mpi.join(), inputs=[str(tmp_path / "rows.tsv")], reading=Reading(), **how)
    asked = ["-m", "hpcllm", "predict", models / "sequence_classification", "--input", tmp_path / given]
    asked += ["--batch-tokens", "64"]  # small ones: it has to take a while
    mpirun(2, [*asked, "--output", tmp_path / "whole.jsonl"], check=True)
    command = [*find_mpirun(), "-np", "2", sys.executable, *map(str, asked), "--output", str(tmp_path / "killed.jsonl")]
    for delay in (0.0, 0.1, 0.2):
        job = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        folder, deadline = tmp_path / ".killed.jsonl.partial", time.monotonic() + 60
        before = spooled(folder)
        while spooled(folder) == before:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        ranks = jobs.ranks_with(tmp_path / "killed.jsonl")
        assert len(ranks) == 2
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        job.wait(30)
    assert not (tmp_path / "killed.jsonl").exists()
    done = mpirun(3, [*asked, "--output", tmp_path / "killed.jsonl"], check=True)
    assert json.loads(done.stdout)["reused_units"] > 0
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def spooled(folder):
    """Bytes of answers that runs have put aside."""
    return sum(path.stat().st_size for path in folder.glob("spool-*"))
