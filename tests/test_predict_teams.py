"""Predictions of ranks that hold a model between them: those of one rank that has it whole."""

import json
from pathlib import Path

import pytest
import torch
from test_predict import TAGS, WORDS, close, read, shared, texts, written
from transformers import AutoConfig, AutoModel

import hpcllm.mpi
from hpcllm import predict
from hpcllm.data import tokenizer
from hpcllm.errors import DataError, UsageError
from hpcllm.questions.asker import Asker
from hpcllm.tasks import TASKS

# 12 heads, which 2, 3 and 4 ranks can share; 401 words, which they share unevenly.
BERT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 50}
GPT = {"n_embd": 48, "n_layer": 2, "n_head": 12, "n_positions": 64}
LLAMA = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "num_key_value_heads": 12}
LLAMA |= {"intermediate_size": 50, "max_position_embeddings": 64}
T5 = {"d_model": 48, "d_kv": 4, "d_ff": 50, "num_layers": 2, "num_heads": 12, "decoder_start_token_id": 0}
T5 |= {"initializer_factor": 4.0}
MODELS = {
    "masked_lm": ("masked_lm", "bert", BERT),
    "sequence_classification": ("sequence_classification", "bert", BERT | {"id2label": {0: "bad", 1: "good"}}),
    "token_classification": ("token_classification", "bert", BERT | {"id2label": dict(enumerate(TAGS))}),
    "question_answering": ("question_answering", "bert", BERT),
    "gpt2": ("causal_lm", "gpt2", GPT),
    "llama": ("causal_lm", "llama", LLAMA),
    "t5": ("seq2seq_lm", "t5", T5),
}
ASKED = {
    "masked_lm": ("masked_lm", {}),
    "sequence_classification": ("sequence_classification", {}),
    "token_classification": ("token_classification", {}),
    "question_answering": ("question_answering", {"ask": "then the cat"}),
    "greedy": ("gpt2", {"max_new_tokens": 6}),
    "beams": ("gpt2", {"max_new_tokens": 6, "beams": 3}),
    "drawn": ("llama", {"max_new_tokens": 6, "temperature": 0.8, "top_k": 30, "seed": 3}),
    "written": ("t5", {"max_new_tokens": 6}),
    "embedding": ("sequence_classification", {"question": "embedding"}),
    "embedding of a decoder": ("llama", {"question": "embedding"}),
}
pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a small model of random weights for each of MODELS."""
    world = hpcllm.mpi.join()
    base = Path(world.comm.bcast(str(tmp_path_factory.mktemp("shared-out"))))
    if world.is_root:
        for name, (task, family, sizes) in MODELS.items():
            kind = "wordpiece" if family == "bert" else "bpe"
            made = tokenizer.train(kind, 140 if kind == "wordpiece" else 320, lambda: iter([" ".join(WORDS)] * 3))
            tokenizer.save(made, kind, str(base / name))
            torch.manual_seed(1)
            spread = {} if family == "t5" else {"initializer_range": 0.5}
            config = AutoConfig.for_model(family, vocab_size=401, **spread, **sizes)
            TASKS[task].model_class().from_config(config).save_pretrained(base / name)
    world.comm.Barrier()
    return base


@pytest.mark.parametrize("asked", ASKED)
def test_answers_are_those_of_one_rank_that_has_the_whole_model(world, folders, tmp_path, asked):
    base, (name, how) = shared(world, tmp_path), ASKED[asked]
    rows = [{"text": text + " [MASK]" * (name == "masked_lm")} for text in texts(120)]
    if name == "question_answering":
        rows = [{"context": row["text"]} for row in rows]
    inputs, how = written(world, base, rows), {"batch_tokens": 200, **how}
    summary = predict.predict_file(world, folders / name, inputs, str(base / "parts"), tensor=world.size, **how)
    alone = hpcllm.mpi.alone(world)
    predict.predict_file(alone, folders / name, inputs, str(base / f"whole-{world.rank}"), **how)
    parts, whole = read(base / "parts"), read(base / f"whole-{world.rank}")
    assert summary["rows"] == len(parts) == len(whole) == 120 and len(summary["ranks"]) == 1
    if name == "question_answering":  # that is a difference of logits, which are large here
        differ = [
            a["prediction"].pop("no_answer") - b["prediction"].pop("no_answer")
            for a, b in zip(parts, whole, strict=True)
        ]
        assert max(map(abs, differ)) < 1e-3
    assert all(map(close, parts, whole)), next(pair for pair in zip(parts, whole, strict=True) if not close(*pair))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("asked", ["masked_lm", "drawn"])
def test_answers_are_the_same_bytes_at_any_number_of_teams(world, folders, tmp_path, asked):
    base, (name, how) = shared(world, tmp_path), ASKED[asked]
    inputs = written(world, base, [{"text": text + " [MASK]" * (name == "masked_lm")} for text in texts(1500)])
    how = {"batch_tokens": 200, "tensor": 2, **how}
    summary = predict.predict_file(world, folders / name, inputs, str(base / "all"), **how)
    team, across = hpcllm.mpi.teams(world, 2)
    predict.predict_file(team, folders / name, inputs, str(base / f"team-{across.rank}"), **how)
    assert (base / "all").read_bytes() == (base / f"team-{across.rank}").read_bytes()
    assert len(summary["ranks"]) == world.size // 2 and all(rank["rows"] for rank in summary["ranks"])
    said = predict.predict_texts(world, folders / name, [row["text"] for row in read(base / "all")[:7]], **how)
    if name == "masked_lm" and world.is_root:
        assert all(map(close, said, read(base / "all")))


def test_a_rank_holds_its_part_of_the_weights(world, folders):
    team, _ = hpcllm.mpi.teams(world, world.size)
    whole = AutoModel.from_pretrained(folders / "llama")
    net = Asker(folders / "llama", "embedding", team)._question.net
    held = sum(parameter.untyped_storage().nbytes() for parameter in net.parameters())
    uncut = sum(p.nbytes for p in whole.parameters() if p.dim() == 1)
    cut = sum(p.nbytes for p in whole.parameters() if p.dim() == 2)
    assert held == pytest.approx(uncut + cut / world.size, rel=0.02)


def test_what_cannot_be_done_is_said_on_all_ranks(world, folders, tmp_path):
    base = shared(world, tmp_path)
    inputs = written(world, base, [{"text": "the [MASK]"}] * 40 + [{"text": "the"}])
    with pytest.raises(DataError, match=r"line 41: there is no \[MASK\]"):
        predict.predict_file(world, folders / "masked_lm", inputs, str(base / "out"), tensor=world.size)
    with pytest.raises(DataError, match=r"text 2: there is no \[MASK\]"):
        predict.predict_texts(world, folders / "masked_lm", ["a [MASK]", "a"], tensor=world.size)
    with pytest.raises(UsageError, match=f"tensor: 5 does not divide the {world.size} ranks"):
        predict.predict_file(world, folders / "masked_lm", inputs, str(base / "other"), tensor=5)
    with pytest.raises(UsageError, match="tensor: 0 does not divide"):
        predict.predict_texts(world, folders / "masked_lm", ["a [MASK]"], tensor=0)
    world.comm.Barrier()
    assert not (base / "out").exists()


@pytest.mark.mpi(max_size=1)
def test_the_command_ends_where_one_rank_of_a_team_fails(mpirun, tmp_path):
    torch.manual_seed(1)
    made = tokenizer.train("wordpiece", 140, lambda: iter([" ".join(WORDS)] * 3))
    tokenizer.save(made, "wordpiece", str(tmp_path / "model"))
    config = AutoConfig.for_model("bert", vocab_size=401, **BERT)
    TASKS["masked_lm"].model_class().from_config(config).save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "the [MASK] sat"}\n' * 200)
    asked = ["predict", str(tmp_path / "model"), "--input", str(tmp_path / "rows.jsonl"), "--tensor", "2"]
    fine = mpirun(2, ["-m", "hpcllm", *asked, "--output", str(tmp_path / "fine.jsonl")], check=True, warm=True)
    assert json.loads(fine.stdout)["rows"] == 200
    for failing in (0, 1):
        script = tmp_path / "failing.py"
        script.write_text(
            "import hpcllm.mpi\nfrom hpcllm.__main__ import main\nfrom hpcllm.questions.analyse import FillMask\n"
            "ask, calls = FillMask.ask, []\n"
            "def fails(*arguments):\n    calls.append(1)\n"
            f"    if hpcllm.mpi.join().rank == {failing} and len(calls) == 2:\n        raise MemoryError('no room')\n"
            "    return ask(*arguments)\n"
            "FillMask.ask = fails\nmain()\n"
        )
        arguments = [str(script), *asked, "--batch-tokens", "64", "--output", str(tmp_path / "never.jsonl")]
        done = mpirun(2, arguments, warm=True)
        assert done.returncode == 1 and "MemoryError: no room" in done.stderr, done.stderr
        assert not (tmp_path / "never.jsonl").exists()
