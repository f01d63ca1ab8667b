"""Answers in texts: learnt, the same at any number of ranks and in any layout, scored and told as it is meant."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_labelled import write_tokenizer
from small_questions import prepare, questions, write_lines, write_squad
from small_runs import LAYOUTS, alone_and_together, load, opened, records, shared
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering, AutoTokenizer

import hpcllm.mpi
from hpcllm import config, evaluate, export, model, plan, predict, train
from hpcllm.errors import DataError, UsageError
from hpcllm.metrics import answers as squad
from hpcllm.parallel.apply import whole
from hpcllm.questions.asker import Asker
from hpcllm.tasks import question_answering as task

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BERT = {"model_type": "bert", **SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "bert": {**BERT, "max_position_embeddings": 64},
    "distilbert": {"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
}
PARTS = {"train": 1000, "validation": 101, "test": 50}
TOKENS, STRIDE = 40, 6


@pytest.fixture(scope="session")
def asked(tmp_path_factory):
    """A folder with a tokenizer, and train, validation and test, by the rules of SQuAD 1 ("1") and 2 ("2").

    Validation has texts that take several windows.
    """
    world = hpcllm.mpi.join()
    base = shared(world, tmp_path_factory.mktemp("asked"))
    if world.is_root:
        write_tokenizer(base / "tokenizer")
        for version, missing in ((1, 0.0), (2, 0.3)):
            for number, (part, count) in enumerate(PARTS.items()):
                longest = 40 if part == "validation" else 8
                write_squad(base / f"{part}-{version}.json", questions(count, number, missing, longest))
    world.comm.Barrier()
    for version in (1, 2):
        inputs, validation, test = ([f"{base}/{part}-{version}.json"] for part in PARTS)
        how = {"validation": validation, "test": test, "max_tokens": TOKENS, "stride": STRIDE}
        prepare(world, base, str(version), inputs=inputs, **how)
    return base


def settings(asked, output, version=1, family="bert", **changes):
    section = {"task": "question_answering", "config": {**FAMILIES[family], "vocab_size": 200}}
    return load(output, f"{asked}/{version}", section, TOKENS, changes)


def random_model(run, source, spread=0.5):
    """A model of the run file whose answers differ from text to text."""
    net, _ = model.build(run.model, source.vocabulary, TOKENS, 5, source.meaning)
    torch.manual_seed(0)
    made = type(net)(net.config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread)
    return made.eval()


# --- the answer, and the loss --------------------------------------------------------------------------------------


@given(
    st.integers(1, 50).flatmap(
        lambda size: st.tuples(
            st.lists(st.integers(-9, 9), min_size=size, max_size=size),
            st.lists(st.integers(-9, 9), min_size=size, max_size=size),
            st.integers(0, size - 1).flatmap(lambda a: st.tuples(st.just(a), st.integers(a + 1, size))),
        )
    )
)
def test_the_likeliest_answer_is_that_of_all_spans(drawn):
    first, last, (begin, end) = np.array(drawn[0], np.float32), np.array(drawn[1], np.float32), drawn[2]
    spans = [(a, z) for a in range(begin, end) for z in range(a, min(end, a + 30))]
    wanted = max(spans, key=lambda span: first[span[0]] + last[span[1]])
    total, one, other = task.best(first, last, np.arange(begin, end))
    assert (one, other) == wanted and total == first[wanted[0]] + last[wanted[1]]


def test_answers_have_at_most_30_tokens():
    first, last = np.zeros(60), np.zeros(60)
    first[10], last[39], last[40] = 1, 2, 4
    assert task.best(first, last, np.arange(5, 60)) == (4, 11, 40)  # and not 10 to 40, 5 in 31 tokens
    last[40] = 2.5
    assert task.best(first, last, np.arange(5, 60)) == (3, 10, 39)
    assert task.best(first, last, np.arange(5, 39)) == (1, 10, 10)


def test_losses_are_those_of_transformers(world, asked, tmp_path):
    run = settings(asked, tmp_path, 2)
    source = opened(run, world, "validation")
    net = random_model(run, source)
    lengths = source.lengths(np.arange(len(source)))
    same = np.flatnonzero(lengths == np.bincount(lengths).argmax())[:6]  # nothing is padded
    seen = set()
    for numbers in (*np.arange(60).reshape(-1, 1), same):
        batch = source.micro_batch(numbers, np.zeros(len(numbers), np.int64))
        first, last = batch.labels.T
        seen |= {*first.tolist()}
        with torch.no_grad():
            loss, _ = task.loss_sum(net, batch.inputs, batch.labels)
            theirs = net(**batch.inputs, start_positions=first, end_positions=last).loss
        assert batch.targets == len(numbers)
        assert float(loss) / batch.targets == pytest.approx(float(theirs), rel=1e-5)
    assert len(same) > 1 and 0 in seen and len(seen) > 5


def test_losses_do_not_depend_on_what_is_padded(world, asked, tmp_path):
    run = settings(asked, tmp_path)
    source = opened(run, world, "validation")
    net = random_model(run, source)
    numbers = np.arange(12)
    batch = source.micro_batch(numbers, np.zeros(12, np.int64))
    assert batch.inputs["attention_mask"].min() == 0
    with torch.no_grad():
        together, logits = task.loss_sum(net, batch.inputs, batch.labels, score=True)
        alone = [source.micro_batch(numbers[[at]], np.zeros(1, np.int64)) for at in numbers]
        losses = [float(task.loss_sum(net, one.inputs, one.labels)[0]) for one in alone]
    assert float(together) == pytest.approx(sum(losses), rel=1e-4)
    assert logits.shape == (12, 2, batch.inputs["input_ids"].shape[1]) and logits.dtype == torch.float32


def reference(net, source):
    """{question: (answer, how much surer it is that there is none, gold answers)}, by plain loops in fp64."""
    found = {}
    for number in range(len(source)):
        batch = source.micro_batch(np.array([number]), np.zeros(1, np.int64))
        [(_, beside)] = source.rows(np.array([number]))
        text = source.texts.of(number)
        with torch.no_grad():
            output = net(**batch.inputs)
        first, last = (one[0].double().tolist() for one in (output.start_logits, output.end_logits))
        inside = [at for at, begin in enumerate(beside["begins"].tolist()) if begin >= 0]
        spans = [(first[a] + last[z], -a, -z) for a in inside for z in inside if a <= z < a + 30]
        total, a, z = max(spans)
        said = text["context"][beside["begins"][-a] : beside["ends"][-z]]
        found.setdefault(text["id"], []).append((total, said, first[0] + last[0], text["answers"]))
    joined = {}
    for name, windows in found.items():
        total, said, *_, golds = max(windows, key=lambda window: window[0])
        joined[name] = said, min(none for *_, none, _ in windows) - total, golds
    return joined


@pytest.mark.parametrize("version", [1, 2])
def test_scores_are_those_of_the_answers_by_plain_loops(world, asked, tmp_path, version):
    run = settings(asked, tmp_path, version)
    source = opened(run, world, "validation")
    net = random_model(run, source)
    wanted = reference(net, source)
    assert len(wanted) == PARTS["validation"] < len(source)
    said, surer, golds = zip(*wanted.values(), strict=True)
    scores, (table, matrix) = evaluate.evaluate(whole(net, hpcllm.mpi.alone(world)), source, 4, "fp32")
    numbers = squad.squad1(golds, said) if version == 1 else squad.squad2(golds, said, surer, 0.0)
    assert scores.pop("eval_samples") == len(wanted) and scores.pop("eval_loss") > 0 and matrix is None
    assert scores == {f"eval_{name}": pytest.approx(value, abs=1e-4) for name, value in numbers.items()}
    assert 0 < scores["eval_f1"] < 100
    exact = numbers["exact_match" if version == 1 else "exact"]
    assert f"           all {exact:9.2f} {numbers['f1']:9.2f} {len(wanted):9,}" in table
    assert ("without one" in table) == (version == 2)


def test_no_answer_is_what_the_model_is_surer_of():
    answers = [("rome", 0.5, []), ("rome", -0.5, []), ("the paris", -1.0, ["Paris", "oslo"]), ("lima", 2.0, ["lima"])]
    numbers, table, _ = task.scores(answers, {"version": 2})
    # Nothing is said to the first and the last one.
    assert numbers["exact"] == 50 and numbers["HasAns_exact"] == numbers["NoAns_exact"] == 50
    assert numbers["best_exact"] == 75 and numbers["best_exact_thresh"] == -1.0
    rows = [line.split() for line in table.splitlines()]
    assert rows[1:] == [
        ["all", "50.00", "50.00", "4"],
        ["with", "an", "answer", "50.00", "50.00", "2"],
        ["without", "one", "50.00", "50.00", "2"],
    ]
    numbers, *_ = task.scores(answers[2:], {"version": 1})
    assert numbers == {"exact_match": 100.0, "f1": 100.0}


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(("version", "family"), [(1, "bert"), (2, "bert"), (1, "distilbert")])
def test_answers_are_learnt(world, asked, tmp_path, version, family):
    base = shared(world, tmp_path)
    how = {"train.max_steps": 300, "train.eval_every_steps": 100, "train.learning_rate": 5e-3}
    how |= {"train.metric_for_best_model": "f1"}
    run = settings(asked, base / "run", version, family, **how)
    results = train.train(run, world)
    exact = "exact_match" if version == 1 else "exact"
    first = records(base / "run", f"eval_{exact}")[0]
    before, _ = evaluate.evaluate(whole(untrained(run, world), world), opened(run, world, "test"), 2, "fp32")
    assert before[f"eval_{exact}"] < 40
    assert results[f"test_{exact}"] > {1: 85, 2: 75}[version], (first, results)
    assert results[f"eval_{exact}"] > {1: 70, 2: 65}[version], results
    told = json.loads((base / "run" / "test_results.json").read_text())
    assert {key: results[key] for key in told} == told and told["test_samples"] == 50
    assert "questions" in (base / "run" / "test_report.txt").read_text()
    if version == 2:
        assert results["test_HasAns_total"] + results["test_NoAns_total"] == results["test_total"] == 50
        assert results["test_best_exact"] >= results["test_exact"] and results["test_NoAns_exact"] > 50
    # What the run's model is for, its folder tells, and data are checked against it.
    assert model.label_names(results["checkpoint"], run.model.task) == ("span", [])
    told = json.loads((Path(results["checkpoint"]) / "config.json").read_text())
    assert told["architectures"][0].endswith("ForQuestionAnswering") and told["id2label"] == {"0": "start", "1": "end"}


def untrained(run, world):
    source = opened(run, world, "train")
    net, _ = model.build(run.model, source.vocabulary, TOKENS, 5, source.meaning)
    torch.manual_seed(1)
    return type(net)(net.config).eval()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("version", [1, 2])
@LAYOUTS
def test_losses_and_scores_do_not_depend_on_the_layout(world, asked, tmp_path, version, layout):
    def some(output, **changes):
        return settings(asked, output, version, **changes)

    for key, value, found in alone_and_together(world, some, tmp_path, layout):
        assert found == pytest.approx(value, rel=1e-4, abs=1e-4), key


@pytest.mark.mpi
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_scores_are_the_same_to_the_last_digit_at_any_number_of_ranks(world, asked, tmp_path, version, count):
    base = shared(world, tmp_path)
    if world.is_root:
        few = questions(count, 9, 0.0, 60)
        few[-1]["answers"] = few[-1]["answers"] if version == 1 else []
        write_lines(base / "few.jsonl", few)
    world.comm.Barrier()
    how = {"tokenizer": str(asked / "tokenizer"), "inputs": [f"{base}/few.jsonl"], "stride": 6}
    prepare(world, base, "few", **how)
    run = settings(
        asked, base / "run", **{"data.train": f"{base}/few/train", "data.tokenizer": f"{base}/few/tokenizer"}
    )
    source = opened(run, world, "train")
    net = random_model(run, source)
    ours, report = evaluate.evaluate(whole(net, world), source, 2, "fp32")
    alone, other = evaluate.evaluate(whole(net, hpcllm.mpi.alone(world)), source, 2, "fp32")
    assert ours == alone and report[0] == other[0] and ours["eval_samples"] == count < len(source)
    assert ("eval_NoAns_exact" in ours) == (version == 2)


@pytest.mark.mpi
def test_a_pretrained_encoder_gets_two_numbers_a_token(world, asked, tmp_path):
    base = shared(world, tmp_path)
    if world.is_root:
        torch.manual_seed(1)
        sizes = {**SIZES, "vocab_size": 200, "num_labels": 5}
        AutoModel.from_config(AutoConfig.for_model("bert", **sizes)).save_pretrained(base / "encoder")
    world.comm.Barrier()
    values = settings(asked, base / "run").model_dump(exclude_none=True)
    values["model"] = {"task": "question_answering", "init_from": f"{base}/encoder"}
    results = train.train(config.load(values), world)
    made = AutoModelForQuestionAnswering.from_pretrained(results["checkpoint"])
    assert made.qa_outputs.weight.shape == (2, 32)
    again = train.train(config.load(values), world, resume=True)
    assert again == results


def test_a_plan_counts_two_numbers_a_token_as_two_labels(asked, tmp_path):
    run = settings(asked, tmp_path)
    tags = run.model_copy(update={"model": run.model.model_copy(update={"task": "token_classification"})})
    ours, theirs = (plan.shapes_of(one, model.configuration(one.model)) for one in (run, tags))
    assert ours.logits == theirs.logits == 2 * TOKENS and ours.parameters == theirs.parameters
    assert ours.blocks == theirs.blocks


def test_what_has_no_place_in_this_task_is_refused(world, asked, tmp_path):
    for key, value in (("class_weights", "[1, 2]"), ("label_smoothing", 0.1)):
        run = settings(asked, tmp_path / "run", **{f"train.{key}": value})
        with pytest.raises(UsageError, match="class_weights and label_smoothing are for labels that have names"):
            train.train(run, world)
    run = settings(asked, tmp_path / "run", **{"train.metric_for_best_model": "exact"})
    with pytest.raises(UsageError, match='evaluations have no "exact", but loss, exact_match, f1'):
        train.train(run, world)
    assert task.metrics({"version": 2})[:3] == ["exact", "f1", "total"]
    with pytest.raises(UsageError, match="question_answering goes with the data and tensor axes"):
        settings(asked, tmp_path / "run", **{"parallel.pipeline": 2})
    values = settings(asked, tmp_path / "run").model_dump(exclude_none=True)
    values["model"]["task"] = "token_classification"
    with pytest.raises(DataError, match='labels of the kind "span", token_classification takes tags'):
        train.train(config.load(values), world)
    assert not (tmp_path / "run").exists()


# --- predictions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(asked, tmp_path_factory):
    """A model of random weights with its tokenizer, as transformers would save it."""
    world = hpcllm.mpi.join()
    base = shared(world, tmp_path_factory.mktemp("answering"))
    if world.is_root:
        run = settings(asked, base / "run")
        source = opened(run, hpcllm.mpi.alone(world), "train")
        random_model(run, source).save_pretrained(base / "model")
        AutoTokenizer.from_pretrained(asked / "tokenizer").save_pretrained(base / "model")
    world.comm.Barrier()
    return base / "model"


def rows_of(some):
    return [{key: record[key] for key in ("id", "context", "question")} for record in some]


def predicted(world, folder, base, rows, **how):
    if world.is_root:
        write_lines(base / "rows.jsonl", rows)
    world.comm.Barrier()
    predict.predict_file(world, folder, [str(base / "rows.jsonl")], str(base / "out"), overwrite=True, **how)
    return [json.loads(line) for line in (base / "out").read_text().splitlines()]


def by_plain_loops(net, words, question, context):
    """What the answer is, of a text that fits: as transformers' pipeline("question-answering") told it."""
    given = words(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets, inside = given.pop("offset_mapping")[0].tolist(), [number == 1 for number in given.sequence_ids(0)]
    with torch.no_grad():
        output = net.double()(**given)
    seen = torch.tensor(inside)
    seen[0] = True
    first, last = (
        one[0].masked_fill(~seen, -torch.inf).softmax(-1).tolist() for one in (output.start_logits, output.end_logits)
    )
    places = [at for at, there in enumerate(inside) if there]
    spans = [(first[a] * last[z], -a, -z) for a in places for z in places if a <= z < a + 30]
    score, a, z = max(spans)
    start, end = offsets[-a][0], offsets[-z][1]
    none = np.log(first[0] * last[0]) - np.log(score)
    return {"answer": context[start:end], "start": start, "end": end, "score": score, "no_answer": none}


def test_answers_are_those_of_plain_loops(world, folder, tmp_path):
    some = rows_of(questions(40, 5))
    net = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    answers = predicted(world, folder, tmp_path, some)
    assert [{key: answer[key] for key in ("id", "context", "question")} for answer in answers] == some
    for row, answer in zip(some, answers, strict=True):
        wanted = by_plain_loops(net, words, row["question"], row["context"])
        assert answer["prediction"] == {
            name: pytest.approx(value, abs=2e-4) if isinstance(value, float) else value
            for name, value in wanted.items()
        }
    border = float(np.median([answer["prediction"]["no_answer"] for answer in answers]))
    withheld = predicted(world, folder, tmp_path, some, no_answer_above=border)
    for answer, other in zip(answers, withheld, strict=True):
        said, then = answer["prediction"], other["prediction"]
        assert then["no_answer"] == said["no_answer"]
        assert then == said if said["no_answer"] <= border else then["answer"] == "" and then["end"] == 0
    assert {bool(other["prediction"]["answer"]) for other in withheld} == {True, False}


def test_long_texts_are_read_in_windows(world, folder, tmp_path):
    [row] = rows_of(questions(1, 5, longest=8))
    long = {**row, "context": " ".join([row["context"]] * 12)}
    [answer] = predicted(world, folder, tmp_path, [long])
    said = answer["prediction"]
    assert long["context"][said["start"] : said["end"]] == said["answer"] != "" and 0 < said["score"] < 1
    asker = Asker(folder, "question_answering", hpcllm.mpi.alone(world))
    documents = asker._question.documents(type("Row", (), {"fields": long, "offset": 0}))
    assert len(documents) > 2 and all(len(document.ids) <= 64 for document in documents)


@pytest.mark.mpi
def test_answers_are_the_same_bytes_at_any_number_of_ranks(world, folder, tmp_path):
    base = shared(world, tmp_path)
    some = rows_of(questions(200, 6, longest=80))
    predicted(world, folder, base, some, batch_tokens=300)
    alone, output = hpcllm.mpi.alone(world), base / f"alone-{world.rank}"
    predict.predict_file(alone, folder, [str(base / "rows.jsonl")], str(output), batch_tokens=300)
    assert (base / "out").read_bytes() == output.read_bytes()


def test_a_text_is_asked_on_the_command_line(world, folder):
    texts = ["anna sees paris", "the rome"]
    told = predict.predict_texts(world, folder, texts, ask="who often")
    for text, answer in zip(texts, told, strict=True):
        said = answer["prediction"]
        assert answer["text"] == text and text[said["start"] : said["end"]] == said["answer"]
        assert predict.show(answer) == f"{text}\n    {said['answer']} ({said['score']:.3f})"
    assert predict.show({"text": "a", "prediction": {"answer": "", "score": 0.25}}) == "a\n    no answer (0.250)"
    with pytest.raises(DataError, match="text 1: there is no question"):
        predict.predict_texts(world, folder, texts)
    with pytest.raises(DataError, match="text 2: the text is empty"):
        predict.predict_texts(world, folder, ["a", " "], ask="who")
    with pytest.raises(UsageError, match="--ask is nothing that embedding knows"):
        predict.predict_texts(world, folder, texts, ask="who", question="embedding")


def test_columns_of_files_may_have_other_names(world, folder, tmp_path):
    rows = [{"passage": row["context"], "query": row["question"]} for row in rows_of(questions(3, 5))]
    found = predicted(world, folder, tmp_path, rows, columns=("passage", "query"))
    (tmp_path / "lines.txt").write_text("".join(row["passage"] + "\n" for row in rows))
    how = {"columns": ("text", None), "ask": rows[0]["query"]}
    predict.predict_file(world, folder, [str(tmp_path / "lines.txt")], str(tmp_path / "of-lines"), **how)
    first = json.loads((tmp_path / "of-lines").read_text().splitlines()[0])
    assert first["prediction"] == found[0]["prediction"]
    with pytest.raises(DataError, match="line 1: no field 'context'"):
        predicted(world, folder, tmp_path, rows)
    with pytest.raises(DataError, match="line 1: there is no question"):
        predicted(world, folder, tmp_path, [{"context": "a", "question": ""}])


def test_an_exported_model_says_that_it_answers_questions(world, asked, tmp_path):
    results = train.train(settings(asked, tmp_path / "run", 2, **{"train.max_steps": 2}), hpcllm.mpi.alone(world))
    export.export(results["checkpoint"], "question_answering", str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: question-answering" in text
    assert f"| exact | {results['eval_exact']:.4f} | {results['test_exact']:.4f} |" in text
    assert predict.what_is(tmp_path / "out")[1] == "question_answering"


def test_predictions_score_as_the_evaluation_says(world, asked, tmp_path):
    run = settings(asked, tmp_path / "run", 2, **{"train.max_steps": 60})
    results = train.train(run, hpcllm.mpi.alone(world))
    test = questions(PARTS["test"], 2, 0.3)
    answers = predicted(world, results["checkpoint"], tmp_path, rows_of(test), no_answer_above=0.0)
    golds = [[answer["text"] for answer in record["answers"]] for record in test]
    scores = squad.squad2(golds, [answer["prediction"]["answer"] for answer in answers])
    for name in ("exact", "f1", "HasAns_f1", "NoAns_exact"):
        assert scores[name] == pytest.approx(results[f"test_{name}"]), name
