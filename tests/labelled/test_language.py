"""Text to text and dialogue: learnt, the same at any number of ranks and in any layout, each example scored once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_labelled import LANGUAGE, prepare, reading, write, write_tokenizer
from small_runs import LAYOUTS, alone_and_together, load, opened, records, shared
from transformers import AutoTokenizer, pipeline

import hpcllm.mpi
from hpcllm import config, evaluate, export, model, predict, train
from hpcllm.data.prepare import prepare as prepare_text
from hpcllm.errors import DataError, MissingInput, UsageError
from hpcllm.parallel.apply import whole

MODELS = {
    "text": {"model_type": "t5", "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2},
    "turns": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
}
MODELS["text"] |= {"dropout_rate": 0.0}
MODELS["turns"] |= {"num_attention_heads": 2, "num_key_value_heads": 2}
TOKENIZERS = {"text": "t5", "turns": "bpe"}
TASK = {"text": "seq2seq_lm", "turns": "dialogue"}
TOKENS = {"text": 32, "turns": 96}
TEMPLATE = {"text": {}, "turns": {"chat_template": "plain"}}


@pytest.fixture(scope="session")
def language(tmp_path_factory):
    """A folder with a tokenizer, and train, validation and test, for each kind."""
    world = hpcllm.mpi.join()
    base = shared(world, tmp_path_factory.mktemp("language"))
    if world.is_root:
        for kind in LANGUAGE:
            write_tokenizer(base / f"{kind}-tokenizer", TOKENIZERS[kind])
            for number, (part, count) in enumerate((("train", 400), ("validation", 101), ("test", 50))):
                write(base / f"{kind}-{part}.jsonl", kind, count, number)
    world.comm.Barrier()
    for kind in LANGUAGE:
        parts = ([f"{base}/{kind}-{part}.jsonl"] for part in ("train", "validation", "test"))
        how = dict(zip(("inputs", "validation", "test"), parts, strict=True)) | TEMPLATE[kind]
        prepare(world, base, kind, kind, max_tokens=TOKENS[kind], tokenizer=str(base / f"{kind}-tokenizer"), **how)
    return base


def settings(language, output, kind, **changes):
    section = {"task": TASK[kind], "config": {**MODELS[kind], "vocab_size": 512}}
    return load(output, f"{language}/{kind}", section, TOKENS[kind], changes)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("kind", LANGUAGE)
def test_answers_are_learnt(world, language, tmp_path, kind):
    base = shared(world, tmp_path)
    how = {"train.max_steps": 200, "train.learning_rate": 1e-2, "train.eval_every_steps": 100}
    run = settings(language, base / "run", kind, **how, **{"train.metric_for_best_model": "perplexity"})
    results = train.train(run, world)
    assert results["test_accuracy"] > 0.85 and results["test_samples"] == 50, results
    assert records(base / "run", "eval_perplexity")[0] > records(base / "run", "eval_perplexity")[-1]
    told = json.loads((base / "run" / "test_results.json").read_text())
    assert {key: results[key] for key in told} == told
    # What transformers says of the same examples, each alone and without padding.
    net, source = model.load(results["checkpoint"], run.model.task).eval(), opened(run, world, "test")
    losses, targets = 0.0, 0
    for number in range(len(source)):
        [(tokens, beside)] = source.rows(np.array([number]))
        tokens = torch.from_numpy(tokens.astype(np.int64))[None]
        if kind == "text":
            at = int(beside["second"][0])
            given, count = {"input_ids": tokens[:, :at], "labels": tokens[:, at:]}, tokens.shape[1] - at
        else:
            labels = tokens.where(torch.from_numpy(beside["learnt"].copy()).bool(), -100)
            given, count = {"input_ids": tokens, "labels": labels}, int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            losses, targets = losses + float(net(**given).loss) * count, targets + count
    assert targets == results["test_targets"]
    assert losses / targets == pytest.approx(results["test_loss"], rel=1e-4)
    # And what it was trained for comes out.
    name = "source" if kind == "text" else "messages"
    rows = [json.loads(line) for line in (language / f"{kind}-test.jsonl").read_text().splitlines()][:20]
    if kind == "turns":
        rows = [{"messages": row["messages"][:3], "target": row["messages"][3]["content"]} for row in rows]
    if world.is_root:
        (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    world.comm.Barrier()
    columns = {"columns": ("source",)} if kind == "text" else {}
    how = {"max_new_tokens": 24, **columns}
    predict.predict_file(world, base / "run", [str(base / "rows.jsonl")], str(base / "answers.jsonl"), **how)
    answers = [json.loads(line) for line in (base / "answers.jsonl").read_text().splitlines()]
    said = [answer["prediction"]["written" if kind == "text" else "reply"] for answer in answers]
    assert [answer[name] for answer in answers] == [row[name] for row in rows]
    assert sum(one == row["target"] for one, row in zip(said, rows, strict=True)) >= 12, said


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("kind", LANGUAGE)
@LAYOUTS
def test_losses_and_scores_do_not_depend_on_the_layout(world, language, tmp_path, kind, layout):
    def some(output, **changes):
        return settings(language, output, kind, **changes)

    for key, value, found in alone_and_together(world, some, tmp_path, layout):
        assert found == pytest.approx(value, rel=1e-5), key


@pytest.mark.mpi
@pytest.mark.parametrize("kind", LANGUAGE)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_scores_are_the_same_to_the_last_digit_at_any_number_of_ranks(world, language, tmp_path, kind, count):
    base = shared(world, tmp_path)
    if world.is_root:
        write(base / "few.jsonl", kind, count, 9)
    world.comm.Barrier()
    tokenizer = str(language / kind / "tokenizer")
    summary = prepare(world, base, "few", kind, max_tokens=TOKENS[kind], tokenizer=tokenizer)
    assert summary["train"]["examples"] == count
    changes = {"data.train": f"{base}/few/train", "data.tokenizer": f"{base}/few/tokenizer"}
    run = settings(language, base / "run", kind, **changes)
    source = opened(run, world, "train")
    net, _ = model.build(run.model, source.vocabulary, TOKENS[kind], 5, source.meaning)
    torch.manual_seed(0)
    net = type(net)(net.config).eval()
    ours, report = evaluate.evaluate(whole(net, world), source, 2, "fp32")
    alone, _ = evaluate.evaluate(whole(net, hpcllm.mpi.alone(world)), source, 2, "fp32")
    assert report is None and ours == alone and ours["eval_samples"] == count


def of_text(world, language, base, **changes):
    """The settings of a run that learns from plain text, which is made for it in `base`."""
    if world.is_root:
        lines = [json.loads(line)["source"] for line in (language / "text-train.jsonl").read_text().splitlines()]
        (base / "text.txt").write_text("\n".join(lines) + "\n")
    world.comm.Barrier()
    how = {"inputs": [f"{base}/text.txt"], "output": f"{base}/plain", "tokenizer": None, "tokenizer_kind": "t5"}
    prepare_text(world, **how, vocab_size=420, validation_fraction=0.1)
    values = settings(language, base / "run", "text", **changes).model_dump(exclude_none=True)
    return values | {"data": {part: f"{base}/plain/{part}" for part in ("train", "validation")}}


@pytest.mark.mpi(max_size=1)
def test_t5_learns_to_fill_in_spans_of_plain_text(world, language, tmp_path):
    base = shared(world, tmp_path)
    values = of_text(world, language, base, **{"train.max_steps": 60, "train.learning_rate": 1e-2})
    results = train.train(config.load(values), world)
    losses = records(base / "run")
    assert losses[-1] < 0.75 * losses[0] and results["eval_loss"] < losses[0], (losses[0], losses[-1])
    with pytest.raises(UsageError, match=r"data\.test is for labelled data"):
        wrong = config.load(values | {"data": {**values["data"], "test": values["data"]["validation"]}})
        train.train(wrong, world, overwrite=True)


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"tensor": 2}, {"sharding": "full"}], ids=str)
def test_losses_on_plain_text_do_not_depend_on_the_layout(world, language, tmp_path, layout):
    base = shared(world, tmp_path)
    how = {"train.optimizer": "sgd", "train.sgd_momentum": 0.9, "train.learning_rate": 0.05}
    values = of_text(world, language, base, **how)
    train.train(config.load(values | {"parallel": layout}), world)
    values["run"] = {**values["run"], "output_dir": str(tmp_path / "alone")}
    train.train(config.load(values), hpcllm.mpi.alone(world))
    for key in ("loss", "grad_norm", "eval_loss"):
        assert records(base / "run", key) == pytest.approx(records(tmp_path / "alone", key), rel=1e-5), key


@pytest.mark.parametrize("kind", LANGUAGE)
def test_an_exported_model_answers_in_transformers_as_it_does_here(world, language, tmp_path, kind):
    alone = hpcllm.mpi.alone(world)
    run = settings(language, tmp_path / "run", kind, **{"train.max_steps": 60, "train.learning_rate": 1e-2})
    results = train.train(run, alone)
    export.export(Path(results["checkpoint"]), run.model.task, str(tmp_path / "model"), "fp32", 1 << 30, False)
    if kind == "turns":
        row = json.loads((language / "turns-test.jsonl").read_text().splitlines()[0])
        asked = row["messages"][:1]
        theirs = pipeline("text-generation", model=str(tmp_path / "model"))(asked, max_new_tokens=8, do_sample=False)
        theirs = theirs[0]["generated_text"][-1]["content"].strip()
        said = asked[0]["content"]
        [ours] = predict.predict_texts(alone, tmp_path / "model", [said], question="dialogue", max_new_tokens=8)
        assert ours["prediction"]["reply"] == theirs
    else:
        row = json.loads((language / "text-test.jsonl").read_text().splitlines()[0])
        words = AutoTokenizer.from_pretrained(tmp_path / "model")
        net = model.load(tmp_path / "model", "seq2seq_lm").eval()
        made = net.generate(**words(row["source"], return_tensors="pt"), max_new_tokens=8, do_sample=False)
        [ours] = predict.predict_texts(alone, tmp_path / "model", [row["source"]], max_new_tokens=8)
        assert ours["prediction"]["written"] == words.decode(made[0], skip_special_tokens=True)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| task | {run.model.task} |" in card and "perplexity" in card


# --- dialogues written down ----------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
FORGETS = "{% for m in messages[-2:] %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
DIALOGUE = [("user", "the paris"), ("assistant", "rome near"), ("user", "a"), ("assistant", "good")]


def written(world, tmp_path, messages, template, **how):
    """[(ids, learnt)] of what `prepare` makes of the lines `messages`, and the tokenizer that it leaves."""
    if not (tmp_path / "tokenizer").exists():
        write_tokenizer(tmp_path / "tokenizer", "bpe")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in messages))
    if template not in (None, "plain"):
        (tmp_path / "template.jinja").write_text(template)
        template = str(tmp_path / "template.jinja")
    alone = hpcllm.mpi.alone(world)
    summary = prepare(alone, tmp_path, "out", "turns", chat_template=template, overwrite=True, **how)
    run = config.load(
        {
            "run": {"output_dir": str(tmp_path / "run")},
            "data": {"train": f"{tmp_path}/out/train"},
            "model": {"task": "dialogue", "config": {"model_type": "gpt2"}},
            "train": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 512}
            | {"learning_rate": 1e-3},
        }
    )
    source = opened(run, alone, "train")
    found = [(tokens.tolist(), beside["learnt"].tolist()) for tokens, beside in source.rows(np.arange(len(source)))]
    return found, AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer"), summary


@pytest.mark.parametrize("template", ["plain", CHATML, MARKED])
def test_what_the_assistant_says_is_learnt_and_nothing_else(world, tmp_path, template):
    turns_ = [{"role": role, "content": content} for role, content in DIALOGUE]
    [(ids, learnt)], words, _ = written(world, tmp_path, [{"messages": turns_}], template)
    assert ids == words.apply_chat_template(turns_, return_dict=True)["input_ids"]
    said = words.decode([token for token, yes in zip(ids, learnt, strict=True) if yes])
    if template == MARKED:
        assert said == "rome neargood"
    elif template == "plain":
        assert said == " rome near<|endoftext|>\n good<|endoftext|>\n"
    else:
        assert said == "rome near<|im_end|>\ngood<|im_end|>\n"
    # A model that is asked sees just what it has learnt to answer to.
    prompt = words.apply_chat_template(turns_[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    if template != MARKED:
        first = learnt.index(1)
        assert ids[:first] == prompt


def test_dialogues_are_read_as_they_are_usual(world, tmp_path):
    roles = {"user": "human", "assistant": "gpt"}
    lines = [
        {"messages": [{"role": role, "content": content} for role, content in DIALOGUE[:2]]},
        {"messages": [{"from": roles[role], "value": content} for role, content in DIALOGUE[:2]]},
    ]
    found, *_ = written(world, tmp_path, lines, "plain")
    assert found[0] == found[1]
    [other], *_ = written(world, tmp_path, [{"prompt": "the paris", "completion": "rome near"}], "plain")
    assert other == found[0]
    named = reading("turns", text="q", label="a")
    [other], *_ = written(world, tmp_path, [{"q": "the paris", "a": "rome near"}], "plain", reading=named)
    assert other == found[0]
    named = reading("turns", text="conversations")
    [other], *_ = written(
        world, tmp_path, [{"conversations": lines[1]["messages"]}, {"conversations": lines[0]["messages"][:1]}],
        "plain", reading=named,
    )  # fmt: skip
    assert other == found[0]  # of the second nobody learns anything


def test_a_long_dialogue_goes_by_the_policy(world, tmp_path):
    turns_ = [{"role": role, "content": content * 20} for role, content in DIALOGUE]
    short = {"prompt": "a", "completion": "the"}
    lines = [{"messages": [{"role": "user", "content": "a"}, turns_[1]]}, {"messages": turns_}, short]
    found, _, summary = written(world, tmp_path, lines, "plain", max_tokens=64)
    became = summary["train"]["became"]
    assert all(len(ids) <= 64 and any(learnt) for ids, learnt in found)
    assert became["cut"] + became["empty"] > 0 and became["read"] == 3
    found, _, summary = written(world, tmp_path, lines[:1], "plain", max_tokens=200, truncation="drop")
    assert len(found) == 1 and summary["train"]["became"]["dropped"] == 0
    with pytest.raises(DataError, match=r"in\.jsonl line 2: more than 64 tokens; .*--truncation cut or drop$"):
        written(world, tmp_path, [short, lines[1]], "plain", max_tokens=64, truncation="error")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": []}, r'line 2: "messages": not a list of turns'),
        ({"messages": [{"role": "user"}]}, r'line 2: "messages": turn 1 has no strings "role" and "content"'),
        ({"messages": [{"role": "user", "content": None}]}, r'line 2: "messages": turn 1 has no strings'),
        ({"text": "x"}, r"line 2: no field 'messages'; it has 'text'"),
        ({"prompt": "x"}, r"line 2: no field 'completion'; it has 'prompt'"),
        (
            {"prompt": "see <|endoftext|>", "completion": "y"},
            r"line 2: turn 1 spells the special token <\|endoftext\|>, which would be one",
        ),
    ],
)
def test_bad_dialogues_are_named_by_line(world, tmp_path, line, said):
    with pytest.raises(DataError, match=said):
        written(world, tmp_path, [{"prompt": "a", "completion": "b"}, line], "plain")


def test_templates_that_do_not_do_are_refused(world, tmp_path):
    good = {"messages": [{"role": role, "content": content} for role, content in DIALOGUE]}
    with pytest.raises(UsageError, match="the tokenizer has none; name a file of Jinja, or plain"):
        written(world, tmp_path, [good], None)
    with pytest.raises(DataError, match="line 1: the chat template cannot write this dialogue: it does not write turn"):
        written(world, tmp_path, [good], FORGETS)
    with pytest.raises(DataError, match="line 1: the chat template cannot write this dialogue: Unexpected end"):
        written(world, tmp_path, [good], "{% for m in messages %}")
    with pytest.raises(MissingInput, match="there is no file nowhere"):
        prepare(hpcllm.mpi.alone(world), tmp_path, "out", "turns", chat_template="nowhere", overwrite=True)


def test_texts_to_write_end_with_the_end(world, tmp_path):
    write_tokenizer(tmp_path / "tokenizer", "t5")
    rows = [("the paris", "rome"), ("anna " * 60, "bert " * 60), (" ", "x"), ("x", ""), ("see </s>", "oslo")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in rows))
    alone = hpcllm.mpi.alone(world)
    summary = prepare(alone, tmp_path, "out", "text", max_tokens=16)
    became = summary["train"]["became"]
    assert (became["read"], became["empty"], became["cut"], became["longest"]) == (5, 2, 1, 16)
    run = settings(tmp_path, tmp_path / "run", "text", **{"data.train": f"{tmp_path}/out/train"})
    run = config.load({**run.model_dump(exclude_none=True), "data": {"train": f"{tmp_path}/out/train"}})
    source, words = opened(run, alone, "train"), AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    found = [(tokens.tolist(), int(beside["second"][0])) for tokens, beside in source.rows(np.arange(3))]
    (a, at), (b, cut), (c, _) = found
    assert (a[:at], a[at:]) == (words("the paris")["input_ids"], words("rome")["input_ids"]) and a[-1] == 0 + a[at - 1]
    assert cut == 16 and len(b) == 32 and b[15] == words.eos_token_id != b[31]  # of the text to write there is more
    assert c.count(words.eos_token_id) == 2  # what spells the end is not the end
    (tmp_path / "in.tsv").write_text("source\ttarget\nthe paris\trome\n")
    summary = prepare(alone, tmp_path, "table", "text", inputs=[f"{tmp_path}/in.tsv"])
    assert summary["train"]["examples"] == 1
    with pytest.raises(UsageError, match=r"in\.conll is conll .*, this task reads tsv, csv or jsonl"):
        (tmp_path / "in.conll").write_text("x y\n")
        prepare(alone, tmp_path, "none", "text", inputs=[f"{tmp_path}/in.conll"])
