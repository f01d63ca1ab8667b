"""An exported model says what it is, and anybody loads it where there is no network and no hpcllm."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from small_labelled import prepare, sentences, write, write_tokenizer
from test_finetune import settings

import hpcllm.mpi
from hpcllm import card, export, predict, train

TEXTS = [" ".join(words) for words, _ in sentences(12, 77)]
SCRIPT = """
import json, socket, sys
from transformers import pipeline
try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
    raise SystemExit("there is a network")
except OSError as error:
    assert error.errno in (100, 101), error  # network is down, network is unreachable
task, folder, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
how = {"ignore_labels": []} if task == "token-classification" else {}
print(json.dumps(pipeline(task, model=folder)(texts, **how), default=float))
"""


def without_network():
    """What starts a process in a network namespace of its own, without a network; skips where that is not allowed."""
    command = ["unshare", "--net", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        command = command[:2]
        if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
            pytest.skip("this user may not make network namespaces")
    return command


def trained(tmp_path, kind):
    write_tokenizer(tmp_path / "tokenizer")
    for number, part in enumerate(("train", "validation", "test")):
        write(tmp_path / f"{part}.jsonl", kind, 80, number)
    validation, test = ([f"{tmp_path}/{part}.jsonl"] for part in ("validation", "test"))
    sources = {"inputs": [f"{tmp_path}/train.jsonl"], "validation": validation, "test": test}
    prepare(hpcllm.mpi.join(), tmp_path, kind, kind, max_tokens=16, **sources)
    run = settings(tmp_path, tmp_path / "run", kind, **{"train.max_steps": 30, "train.learning_rate": 1e-2})
    return run, train.train(run, hpcllm.mpi.init("cpu"))


@pytest.mark.parametrize("kind", ["single", "tags"])
def test_it_says_the_same_without_a_network(world, tmp_path, kind):
    isolated = without_network()
    run, results = trained(tmp_path, kind)
    export.export(results["checkpoint"], run.model.task, str(tmp_path / "out"))
    name = "token-classification" if kind == "tags" else "text-classification"
    command = [*isolated, sys.executable, "-P", "-c", SCRIPT, name, str(tmp_path / "out"), json.dumps(TEXTS)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    ours = [one["prediction"] for one in predict.predict_texts(world, results["checkpoint"], TEXTS)]
    if kind == "single":
        assert [one["label"] for one in ours] == [one["label"] for one in theirs]
        assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-5)
    else:  # words of this tokenizer are mostly one token; of the others the first counts
        for said, tokens in zip(ours, theirs, strict=True):
            firsts = [one for one in tokens if not one["word"].startswith("##")]
            assert said["tags"] == [one["entity"] for one in firsts]
            assert said["scores"] == pytest.approx([one["score"] for one in firsts], abs=1e-5)


def test_its_card_tells_where_it_comes_from_and_how_good_it_is(world, tmp_path):
    run, results = trained(tmp_path, "tags")
    export.export(results["checkpoint"], run.model.task, str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: token-classification" in text and "`O`, `B-person`, `I-person`, `B-place`, `I-place`" in text
    assert f"| f1 | {results['eval_f1']:.4f} | {results['test_f1']:.4f} |" in text
    assert "| steps | 30 of 24 sequences |" in text and "| seed | 3 |" in text
    # Without the run around it, it tells less.
    shutil.move(results["checkpoint"], tmp_path / "checkpoint-30")
    text = card.card(tmp_path / "checkpoint-30", run.model.task, "bf16", 1000)
    assert "| f1 |" not in text and "node-hours" not in text and "| weights | bf16, of checkpoint-30 |" in text


def test_node_hours_add_up_over_starts_and_hosts(tmp_path):
    def event(kind, restart, time, **more):
        return json.dumps({"event": kind, "restart": restart, "time": time, **more})

    hosts = {"hosts": ["a", "b"]}
    lines = [
        event("start", 0, 0.0, step=0, **hosts),
        event("checkpoint", 0, 3600.0, step=10),
        event("start", 1, 9000.0, step=10, **hosts),
        event("checkpoint", 1, 9000.0 + 1800, step=20),
        event("checkpoint", 1, 9000.0 + 3600, step=30),
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    hours = [card.node_hours(tmp_path / "events.jsonl", step) for step in (10, 20, 30)]
    assert hours == pytest.approx([2.0, 3.0, 4.0])
    assert card.node_hours(tmp_path / "none.jsonl", 1) is None
