"""Whole commands under mpirun, as a user types them: what they print, leave behind, and exit with."""

import functools
import json
import shutil
from pathlib import Path

import pytest

RUN = """
[run]
output_dir = "{output}"
[data]
train = "{data}/train"
validation = "{data}/validation"
[model]
task = "{task}"
config = {{ {model} }}
[train]
max_steps = 4
global_batch_size = 8
micro_batch_size = 2
sequence_length = 32
learning_rate = 1e-3
log_every_steps = 2
"""
BERT = 'model_type = "bert", hidden_size = 32, num_hidden_layers = 1, num_attention_heads = 2, intermediate_size = 64'
GPT = 'model_type = "gpt2", n_embd = 32, n_layer = 1, n_head = 2'


@pytest.fixture
def run_file(tmp_path, prepared):
    def write(task="masked_lm", data=prepared):
        path = tmp_path / f"{task}.toml"
        model = BERT if task == "masked_lm" else GPT
        path.write_text(RUN.format(output=tmp_path / task, data=data, task=task, model=model))
        return path

    return write


@pytest.fixture
def job(mpirun):
    """As `mpirun`, for what does not depend on how processes start."""
    return functools.partial(mpirun, warm=True)


def test_a_bert_is_trained_continued_evaluated_and_asked(mpirun, job, run_file, tmp_path):
    path = run_file()
    apart = "data.attention=document"
    trained = mpirun(2, ["-m", "hpcllm", "train", path, apart, "train.max_steps=2"], check=True)
    assert "2 ranks on 1 host" in trained.stdout
    assert "step 2/2 loss=" in trained.stdout and "step 2 eval_loss=" in trained.stdout
    assert "first step after " in trained.stdout
    continued = job(2, ["-m", "hpcllm", "train", path, apart, "--resume", "run.seed=1234"], check=True)
    assert "continuing from step 2" in continued.stdout
    output = tmp_path / "masked_lm"
    results = json.loads((output / "results.json").read_text())
    assert results["step"] == 4 and results["samples"] == 32
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    starts = [event["seconds"] for event in events if event["event"] == "first_step"]
    parts = {"python", "mpi", "imports", "backend", "data", "model", "first step"}
    assert len(starts) == 2 and all(parts <= set(start) and sum(start.values()) < 120 for start in starts)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    trained_steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in trained_steps] == [1, 2, 3, 4]
    for record in trained_steps:
        assert record["data_s"] + record["compute_s"] + record["communication_s"] >= record["step_s"] * 0.999
        assert record["memory_bytes"] > 1 << 27 and record["tokens_per_s"] > 0 and record["grad_norm"] > 0
        assert 0 < record["mfu"] < 1 and record["imbalance"] >= 1

    scored = job(3, ["-m", "hpcllm", "evaluate", output, "--output", tmp_path / "scores.json"], check=True)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert json.loads(scored.stdout) == scores
    assert scores["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-6)
    assert scores["eval_samples"] == results["eval_samples"]

    texts = ["a [MASK] b", "[MASK] and [MASK]", "the third [MASK]"]
    asked = ["-m", "hpcllm", "predict", output, *(f"--text={text}" for text in texts), "--top-k", "2"]
    answers = [json.loads(line) for line in _predict(job, 2, asked, tmp_path / "a.jsonl")]
    assert [answer["text"] for answer in answers] == texts
    assert [[len(guesses) for guesses in answer["prediction"]["masks"]] for answer in answers] == [[2], [2, 2], [2]]
    assert _predict(job, 1, asked, tmp_path / "b.jsonl") == _predict(job, 3, asked, tmp_path / "c.jsonl")


def _predict(job, ranks, asked, path):
    job(ranks, [*asked, "--output", path], check=True)
    return path.read_text().splitlines()


def test_a_gpt_continues_texts_as_transformers_does(job, run_file, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job(2, ["-m", "hpcllm", "train", run_file("causal_lm")], check=True)
    done = job(2, ["-m", "hpcllm", "predict", tmp_path / "causal_lm", "--text", "return the", "--max-new-tokens", "5"])
    folder = tmp_path / "causal_lm" / "checkpoint-4"
    words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    net = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    asked = words("return the", return_tensors="pt").input_ids
    made = net.generate(asked, do_sample=False, max_new_tokens=5, pad_token_id=0)[0, asked.shape[1] :]
    assert done.stdout == f"return the | {words.decode(made, skip_special_tokens=True)}\n"


def test_gloo_gives_the_losses_of_mpi(job, run_file, tmp_path):
    losses = []
    for backend in ("mpi", "gloo"):
        output = tmp_path / backend
        settings = [f"parallel.backend={backend}", f"run.output_dir={output}"]
        job(2, ["-m", "hpcllm", "train", run_file(), *settings], check=True)
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    refused(job(2, ["-m", "hpcllm", "train", run_file(), "parallel.backend=nccl"]), 2, "needs a GPU for every rank")


FAILING = """
import sys
from hpcllm import __main__, mpi, train
one_step, done = train.one_step, []
def failing(*arguments):
    done.append(None)
    if len(done) == 3 and mpi.join().rank == 1:
        raise RuntimeError("provoked")
    return one_step(*arguments)
train.one_step = failing
__main__.main(["train", *sys.argv[1:]])
"""


def test_a_job_that_failed_continues_in_a_new_one_bit_for_bit(job, run_file, tmp_path):
    path, whole, stopped = run_file(), tmp_path / "whole", tmp_path / "stopped"
    every = "checkpoint.every_steps=2"
    job(2, ["-m", "hpcllm", "train", path, every, f"run.output_dir={whole}"], check=True)
    failed = job(2, ["-c", FAILING, path, every, f"run.output_dir={stopped}"])
    assert failed.returncode == 1
    assert failed.stderr.count("Traceback") == 1 and "hpcllm: rank 1 of 2 on" in failed.stderr
    assert not (stopped / "checkpoint-4").exists()
    job(2, ["-m", "hpcllm", "train", path, every, f"run.output_dir={stopped}", "--resume"], check=True)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (stopped / "checkpoint-4" / name).read_bytes() == (whole / "checkpoint-4" / name).read_bytes()


def test_weights_of_a_folder_are_the_start(job, run_file, tmp_path):
    path = run_file()
    job(1, ["-m", "hpcllm", "train", path], check=True)
    first = json.loads((tmp_path / "masked_lm" / "results.json").read_text())
    text = path.read_text().replace(f"config = {{ {BERT} }}", f'init_from = "{first["checkpoint"]}"')
    path.write_text(text)
    again = ["run.output_dir=" + str(tmp_path / "second"), "train.learning_rate=1e-12", "train.max_steps=1"]
    job(2, ["-m", "hpcllm", "train", path, *again], check=True)
    second = json.loads((tmp_path / "second" / "results.json").read_text())
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)


def refused(done, code, *words):
    """The job ended with `code` and one sentence that has `words`."""
    assert done.returncode == code, done.stderr
    told = [line for line in done.stderr.splitlines() if "hpcllm: " in line]
    assert len(told) == 1, done.stderr
    assert told[0].startswith("hpcllm: error: ")
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def cut_a_shard(data):
    shard = data / "train" / "shard-00000.h5"
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "arguments", "code", "words"),
    [
        (None, ["train.lerning_rate=1"], 2, ['unknown key "lerning_rate"', 'did you mean "learning_rate"']),
        (None, ["train.global_batch_size=10"], 2, ["global_batch_size (10)", "micro_batch_size (2) x 3 ranks = 6"]),
        (
            None,
            ["train.global_batch_size=6000"],
            65,
            ["a global batch needs 6000 samples of 32 tokens, but the shards hold"],
        ),
        (lambda data: (data / "train" / "shard-00001.h5").unlink(), [], 66, ["shard-00001.h5"]),
        (cut_a_shard, [], 65, ["shard-00000.h5", "bytes"]),
        (lambda data: shutil.rmtree(data / "train"), [], 66, ["train"]),
        ("another tokenizer", [], 65, ["was tokenised by another tokenizer"]),
    ],
    ids=["unknown key", "batch", "samples", "missing shard", "cut shard", "no folder", "tokenizer"],
)
def test_bad_input_is_one_sentence_and_an_exit_code(job, run_file, prepared, tmp_path, damage, arguments, code, words):
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    if damage == "another tokenizer":
        other = json.loads((data / "tokenizer" / "tokenizer.json").read_text())
        other["normalizer"]["lowercase"] = False
        (data / "tokenizer" / "tokenizer.json").write_text(json.dumps(other))
    elif damage:
        damage(data)
    divides = [] if any("global_batch" in argument for argument in arguments) else ["train.global_batch_size=6"]
    refused(job(3, ["-m", "hpcllm", "train", run_file(data=data), *divides, *arguments]), code, *words)
    assert not (tmp_path / "masked_lm").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["evaluate", "nowhere"], 66, ["nowhere"]),
        (["plan", "nowhere.toml"], 2, ["say what to show"]),
        (["plan", "nowhere.toml", "--show-mesh", "--nodes", "2"], 2, ["both --nodes and --ranks-per-node"]),
        (["plan", "nowhere.toml", "--show-mesh", "--nodes", "0", "--ranks-per-node", "1"], 2, ["count from 1"]),
        (["predict", "nowhere", "--text", "a"], 66, ["nowhere"]),
        (["predict", "nowhere"], 2, ["give --text or --input"]),
        (["predict", "nowhere", "--input", "a.txt"], 2, ["--input has rows, whose answers go to the file --output"]),
        (["predict", "nowhere", "--input", "a.txt", "--output", "b.jsonl"], 66, ["nowhere"]),
        (["export", "nowhere", "no-model"], 66, ["nowhere is neither a checkpoint nor a run folder"]),
        (["export", "nowhere", "no-model", "--max-shard-size", "5 apples"], 2, ['"5 apples" is not a size']),
        (["prepare", "--input", "a", "--output", "b", "--labels", "x"], 2, ["--labels is for labelled data"]),
        (
            ["prepare", "--input", "a", "--output", "b", "--task", "token_classification", "--problem", "multi"],
            2,
            ["--problem does nothing with --task token_classification"],
        ),
        (["evaluate", "a", "--plot", "nowhere/a.png"], 73, ["--plot nowhere/a.png: there is no such folder"]),
        (["train", "nowhere.toml"], 66, ["run file nowhere.toml does not exist"]),
        (["train"], 2, ["RUN.toml"]),
        (["train", "a.toml", "--fast"], 2, ["unrecognized arguments: --fast"]),
        (["evaluate", "a", "--output", "/"], 73, ["--output / exists"]),
        (["evaluate", "a", "--output", "nowhere/a.json"], 73, ["there is no such folder"]),
    ],
)
def test_bad_commands_are_one_sentence_and_an_exit_code(job, arguments, code, words):
    refused(job(2, ["-m", "hpcllm", *arguments]), code, *words)


def test_plan_shows_who_does_what_and_refuses_what_cannot_run(job, run_file):
    ran = job(2, ["-m", "hpcllm", "plan", run_file(), "--show-mesh", "parallel.tensor=2"], check=True)
    assert "2 ranks = tensor 2\n" in ran.stdout and "  rank 1    tensor 1\n" in ran.stdout
    machine = ["--nodes", "3", "--ranks-per-node", "2"]
    asked = ["-m", "hpcllm", "plan", run_file(), "--show-mesh", *machine, "train.global_batch_size=12"]
    ran = job(1, [*asked, "parallel.sharding=hybrid"], check=True)
    assert "6 ranks = data 6, model sharded over 2\n" in ran.stdout and "between hosts: data\n" in ran.stdout
    refused(job(1, [*asked, "parallel.tensor=3"]), 2, "tensor (3) does not divide the model's num_attention_heads")
    refused(job(1, [*asked, "parallel.tensor=4"]), 2, "= 4 does not divide the 6 ranks of this job")


def test_a_folder_that_cannot_be_written_is_refused_before_torch_is_loaded(mpirun, tmp_path):
    code = (
        "import os, sys, hpcllm.__main__ as m\n"
        "os.access = lambda *_: False\n"  # as of a file system that is mounted read-only: root may do all else
        "try: m.main(sys.argv[1:])\n"
        "finally: print('torch' in sys.modules)"
    )
    given = (Path(__file__).parents[1] / "slurm/train_bert.toml", f"run.output_dir={tmp_path}/runs/a")
    done = mpirun(2, ["-c", code, "train", *given])
    refused(done, 73, f"run.output_dir: {tmp_path}/runs/a cannot be written: Permission denied")
    assert "True" not in done.stdout and not list(tmp_path.iterdir())


def test_help_needs_neither_mpi_nor_torch(mpirun):
    code = (
        "import sys, hpcllm.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'mpi4py', 'transformers', 'h5py', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert "prepare" in mpirun(1, ["-c", code], check=True).stdout
