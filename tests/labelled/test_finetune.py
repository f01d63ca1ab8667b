"""Fine-tuning: learns, the same at any number of ranks and in any layout, scored on every example once."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_labelled import KINDS, prepare, write, write_tokenizer
from small_runs import LAYOUTS, alone_and_together, load, opened, records, shared
from transformers import AutoConfig, AutoModel, pipeline

import hpcllm.mpi
from hpcllm import config, evaluate, model, run_folder, sources, stopping, train
from hpcllm.errors import DataError, UsageError
from hpcllm.parallel.apply import whole
from hpcllm.tasks import TASKS

SIZES = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A folder with a tokenizer and, for each kind of labels, train, validation and test."""
    world = hpcllm.mpi.join()
    base = Path(world.comm.bcast(str(tmp_path_factory.mktemp("labelled"))))
    if world.is_root:
        write_tokenizer(base / "tokenizer")
        for kind in KINDS:
            for number, (part, count) in enumerate((("train", 400), ("validation", 101), ("test", 50))):
                write(base / f"{kind}-{part}.jsonl", kind, count, number)
    world.comm.Barrier()
    for kind in KINDS:
        train_files, validation, test = ([f"{base}/{kind}-{part}.jsonl"] for part in ("train", "validation", "test"))
        prepare(world, base, kind, kind, max_tokens=16, inputs=train_files, validation=validation, test=test)
    return base


def settings(labelled, output, kind, family="bert", **changes):
    sizes = {**SIZES[family], "vocab_size": 200}
    if family == "bert":
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    task = "token_classification" if kind == "tags" else "sequence_classification"
    section = {"task": task, "config": {"model_type": family, **sizes}}
    return load(output, f"{labelled}/{kind}", section, 16, changes)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_learnt(world, labelled, tmp_path, kind):
    base = shared(world, tmp_path)
    how = {"train.max_steps": 120, "train.eval_every_steps": 40, "train.learning_rate": 1e-2}
    run = settings(labelled, base / "run", kind, **how)
    results = train.train(run, world)
    better = {"single": "accuracy", "multi": "f1", "value": "pearson", "tags": "f1"}[kind]
    assert results[f"test_{better}"] > {"multi": 0.75, "value": 0.75}.get(kind, 0.9), results
    assert records(base / "run")[-1] < 0.6 * records(base / "run")[0]
    told = json.loads((base / "run" / "test_results.json").read_text())
    assert {key: results[key] for key in told} == told and told["test_samples"] == 50
    report = (base / "run" / "test_report.txt").read_text()
    if kind == "tags":
        for row in ("     person ", "      place ", "micro avg", "    B-person ", "weighted avg", "accuracy"):
            assert row in report, report
    # As transformers computes it, on the same examples, without hpcllm's batches.
    net, source = model.load(results["checkpoint"], run.model.task), opened(run, world, "test")
    losses, targets = [], []
    for numbers in range(len(source)):
        batch = source.micro_batch(torch.tensor([numbers]).numpy(), torch.tensor([0]).numpy())
        with torch.no_grad():
            losses.append(float(net.eval()(**batch.inputs, labels=batch.labels).loss) * batch.targets)
        targets.append(batch.targets)
    assert sum(losses) / sum(targets) == pytest.approx(results["test_loss"], rel=1e-4)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("kind", KINDS)
@LAYOUTS
def test_losses_and_scores_do_not_depend_on_the_layout(world, labelled, tmp_path, kind, layout):
    def some(output, **changes):
        return settings(labelled, output, kind, **changes)

    for key, value, found in alone_and_together(world, some, tmp_path, layout):
        # After few steps values hardly differ, and what they go along with is decided by their last digits.
        correlates = key.endswith(("pearson", "spearman", "r2"))
        assert found == pytest.approx(value, rel=1e-2 if correlates else 1e-5, abs=1e-6), key


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("kind", ["single", "tags"])
def test_other_families_learn_too(world, labelled, tmp_path, family, kind):
    base = shared(world, tmp_path)
    run = settings(labelled, base / "run", kind, family, **{"train.max_steps": 120, "train.learning_rate": 1e-2})
    results = train.train(run, world)
    assert results["test_accuracy"] > 0.85, results


def test_a_family_that_counts_positions_from_its_padding_token_keeps_that_of_its_configuration(labelled):
    words, *_ = sources.read_tokenizer(f"{labelled}/tokenizer")
    sizes = {**SIZES["bert"], "vocab_size": 200, "max_position_embeddings": 20, "pad_token_id": 1}
    built = {}
    for family in ("roberta", "bert"):
        section = config.Model(task="sequence_classification", config={"model_type": family, **sizes})
        built[family], _ = model.build(section, words, 16, 3, {"kind": "single", "names": ["a", "b"]})
    assert words.padding == 0 and built["roberta"].config.pad_token_id == 1
    assert built["roberta"].roberta.embeddings.padding_idx == 1 and built["bert"].config.pad_token_id == 0


def test_a_decoder_without_a_padding_token_sees_the_last_token_of_each_text(world, tmp_path):
    write_tokenizer(tmp_path / "tokenizer", "bpe")
    write(tmp_path / "train.jsonl", "single", 40, 1)
    prepare(world, tmp_path, "single", "single", max_tokens=16)
    how = {"data.train": f"{tmp_path}/single/train", "model.config.vocab_size": 400}
    values = settings(tmp_path, tmp_path / "run", "single", "gpt2", **how).model_dump(exclude_none=True)
    run = config.load({**values, "data": {"train": f"{tmp_path}/single/train", "tokenizer": f"{tmp_path}/tokenizer"}})
    results = train.train(run, hpcllm.mpi.alone(world))
    net = model.load(results["checkpoint"], run.model.task).eval()
    source = opened(run, world, "train")
    batch = source.training_step(0, 0, 1, run.train)[4]
    assert batch.inputs["attention_mask"].min() == 0 and net.config.pad_token_id == source.vocabulary.eos
    with torch.no_grad():
        together = net(**batch.inputs).logits
        for row, mask in enumerate(batch.inputs["attention_mask"].bool()):
            alone = net(input_ids=batch.inputs["input_ids"][row][mask].unsqueeze(0)).logits[0]
            assert torch.allclose(together[row], alone, atol=1e-5)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_scores_are_the_same_to_the_last_digit_at_any_number_of_ranks(world, labelled, tmp_path, kind, count):
    base = shared(world, tmp_path)
    if world.is_root:
        write(base / "few.jsonl", kind, count, 9)
    world.comm.Barrier()
    names = model_names(labelled, kind)
    how = {"given_labels": names, "max_tokens": 16, "tokenizer": str(labelled / "tokenizer")}
    prepare(world, base, "few", kind, **how)
    run = settings(
        labelled, base / "run", kind, **{"data.train": f"{base}/few/train", "data.tokenizer": f"{base}/few/tokenizer"}
    )
    source = opened(run, world, "train")
    net, _ = model.build(run.model, source.vocabulary, 16, 5, source.meaning)
    net = model_with_weights(net)
    ours, report = evaluate.evaluate(whole(net, world), source, 2, "fp32")
    alone, other = evaluate.evaluate(whole(net, hpcllm.mpi.alone(world)), source, 2, "fp32")
    assert ours == alone and report[0] == other[0] and ours["eval_samples"] == count


def model_names(labelled, kind):
    source = json.loads((labelled / kind / "train" / "manifest.json").read_text())
    return source["labelled"]["names"] or None


def model_with_weights(net):
    torch.manual_seed(0)
    made = type(net)(net.config)
    return made.eval()


@pytest.mark.mpi
def test_the_best_checkpoint_is_the_result_and_a_run_without_hope_ends(world, labelled, tmp_path):
    base = shared(world, tmp_path)
    # A rate that gets out of hand after the first evaluations.
    changes = {"train.max_steps": 60, "train.eval_every_steps": 5, "train.metric_for_best_model": "loss"}
    changes |= {"train.early_stopping_patience": 3, "checkpoint.keep": 2, "train.learning_rate": 0.02}
    changes |= {"train.lr_scheduler_type": "constant"}
    run = settings(labelled, base / "run", "single", **changes)
    results = train.train(run, world)
    seen = records(base / "run", "eval_loss")
    best = min(range(len(seen)), key=seen.__getitem__)
    assert results["best_step"] == 5 * (best + 1) and results["best_value"] == seen[best]
    assert results["checkpoint"].endswith(f"checkpoint-{results['best_step']}")
    assert results["stopped_early"] == (results["step"] < 60) and (len(seen) == best + 4 or results["step"] == 60)
    assert results["eval_loss"] == pytest.approx(seen[best], rel=1e-6)
    # What is over stays over, and what was lost after the last checkpoint comes again.
    assert train.train(run, world, resume=True) == results
    if world.is_root:
        (base / "run" / "results.json").unlink()
    world.comm.Barrier()
    assert train.train(run, world, resume=True) == results


@pytest.mark.mpi
@pytest.mark.parametrize("number", [2, 4, 5])
def test_evaluations_that_a_signal_breaks_off_change_neither_the_best_nor_the_result(
    world, labelled, tmp_path, monkeypatch, number
):
    base, of_task, evaluations = shared(world, tmp_path), evaluate.of_task, []

    def signalled(*arguments, score=False):  # the last rank, in evaluation `number`: of the validation data, the
        evaluations.extend([None] * score)  # last one included, and of the test data
        if score and len(evaluations) == number and world.rank == world.size - 1:
            stopping._heard.add(signal.SIGUSR2)
        return of_task(*arguments, score=score)

    changes = {"train.max_steps": 20, "train.eval_every_steps": 5, "train.metric_for_best_model": "loss"}
    changes |= {"checkpoint.keep": 2, "train.learning_rate": 0.02, "train.micro_batch_size": 1}
    expected = train.train(settings(labelled, base / "whole", "single", **changes), world)
    run = settings(labelled, base / "run", "single", **changes)
    monkeypatch.setattr(evaluate, "of_task", signalled)
    try:
        results = train.train(run, world)
    finally:
        stopping._heard.clear()
    assert (results["step"], results["exit_code"]) == (min(5 * number, 20), 75)
    finished = train.train(run, world, resume=True)
    assert finished == {**expected, "checkpoint": finished["checkpoint"]}
    assert Path(finished["checkpoint"]).name == Path(expected["checkpoint"]).name
    told = records(base / "whole", "eval_loss")
    assert records(base / "run", "eval_loss") == told + told[-1:] * (number == 5)  # comes again for the results


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["single", "tags"])
def test_a_run_goes_on_where_it_was(world, labelled, tmp_path, kind):
    base = shared(world, tmp_path)
    whole_run = train.train(settings(labelled, base / "whole", kind), world)
    train.train(
        settings(labelled, base / "run", kind, **{"train.max_steps": 3, "train.lr_scheduler_type": "constant"}), world
    )
    # The rate depends on max_steps, so the first part is repeated under the right one.
    if world.is_root:
        shutil.rmtree(base / "run")
    world.comm.Barrier()
    first = settings(labelled, base / "run", kind, **{"checkpoint.every_steps": 3, "checkpoint.keep": 5})
    train.train(first, world)
    if world.is_root:
        shutil.rmtree(base / "run" / "checkpoint-6")
        (base / "run" / "results.json").unlink()
    world.comm.Barrier()
    again = train.train(first, world, resume=True)
    a, b = (load_file(Path(r["checkpoint"]) / "model.safetensors") for r in (whole_run, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {k: v for k, v in again.items() if k != "checkpoint"} == {
        k: v for k, v in whole_run.items() if k != "checkpoint"
    }


@pytest.mark.mpi
def test_a_pretrained_encoder_gets_a_head_and_what_is_frozen_stays(world, labelled, tmp_path):
    base = shared(world, tmp_path)
    if world.is_root:
        torch.manual_seed(1)
        AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=200, **SIZES["bert"])).save_pretrained(
            base / "encoder"
        )
    world.comm.Barrier()
    changes = {"model.init_from": f"{base}/encoder", "model.freeze": '["bert.embeddings.*", "bert.encoder.layer.0.*"]'}
    values = settings(labelled, base / "run", "tags").model_dump(exclude_none=True)
    del values["model"]["config"]
    run = config.load(values, [f"{key}={value}" for key, value in changes.items()])
    results = train.train(run, world)
    before = load_file(base / "encoder" / "model.safetensors")
    after = load_file(Path(results["checkpoint"]) / "model.safetensors")
    for name, tensor in before.items():
        if "pooler" not in name:
            frozen = name.startswith(("embeddings.", "encoder.layer.0."))
            assert torch.equal(after[f"bert.{name}"], tensor) == frozen, name
    assert "classifier.weight" in after
    # The folder says what its labels mean.
    told = json.loads((Path(results["checkpoint"]) / "config.json").read_text())
    assert told["id2label"] == {"0": "O", "1": "B-person", "2": "I-person", "3": "B-place", "4": "I-place"}
    find = pipeline("token-classification", model=results["checkpoint"], aggregation_strategy="first")
    assert isinstance(find("anna sees paris"), list)


@pytest.mark.mpi
def test_evaluations_measure_the_plain_loss_however_training_weighs_it(world, labelled, tmp_path):
    base, scores = shared(world, tmp_path), []
    for name, how in (("plain", {}), ("weighted", {"train.class_weights": "[5, 1]", "train.label_smoothing": 0.2})):
        run = settings(labelled, base / name, "single", **{"train.max_steps": 2, "train.learning_rate": 1e-12, **how})
        scores.append(train.train(run, world))
    assert scores[0]["eval_loss"] == pytest.approx(scores[1]["eval_loss"], rel=1e-6)
    assert records(base / "plain")[0] != pytest.approx(records(base / "weighted")[0], rel=1e-3)


@pytest.mark.mpi
def test_of_a_run_that_looks_for_the_best_checkpoint_that_one_is_taken(world, labelled, tmp_path):
    base = shared(world, tmp_path)
    how = {"train.eval_every_steps": 2, "train.metric_for_best_model": "loss", "train.learning_rate": 0.3}
    results = train.train(settings(labelled, base / "run", "single", **how), world)
    _, folder = run_folder.run_config(base / "run")
    assert str(folder) == results["checkpoint"] and results["best_step"] < 6


def test_a_metric_that_evaluations_do_not_have_is_refused_before_anything_is_written(world, labelled, tmp_path):
    for kind, known in (("single", "accuracy"), ("multi", "f1"), ("value", "pearson"), ("tags", "f1_macro")):
        run = settings(labelled, tmp_path / "run", kind, **{"train.metric_for_best_model": "F1"})
        with pytest.raises(UsageError, match=f'evaluations have no "F1", but loss, .*{known}'):
            train.train(run, hpcllm.mpi.alone(world))
        assert not (tmp_path / "run").exists()


def test_a_run_of_epochs_may_be_given_steps(labelled, tmp_path):
    values = settings(labelled, tmp_path, "single").model_dump(exclude_none=True)
    del values["train"]["max_steps"]
    values["train"]["num_train_epochs"] = 2.0
    assert config.load(values, ["train.max_steps=5"]).train.num_train_epochs is None


def test_a_model_of_which_all_is_frozen_is_refused(world, labelled, tmp_path):
    with pytest.raises(UsageError, match=r"model: freeze: \* leaves no parameter to train"):
        train.train(settings(labelled, tmp_path, "tags", **{"model.freeze": '["*"]'}), world)


def test_names_that_nobody_has_cannot_be_frozen(world, labelled, tmp_path):
    run = settings(labelled, tmp_path, "tags", **{"model.freeze": '["bert.embedings.*"]'})
    with pytest.raises(UsageError, match=r'no parameter is called "bert\.embedings\.\*" \(near: bert\.embeddings'):
        train.train(run, world)


def test_losses_with_class_weights_and_smoothing_are_torchs(world, labelled, tmp_path):
    for kind in ("single", "tags", "multi"):
        smoothing = 0.0 if kind == "multi" else 0.1
        changes = {"train.class_weights": "balanced", "train.label_smoothing": smoothing}
        source = opened(settings(labelled, tmp_path, kind, **changes), world, "train")
        batch = source.training_step(0, 0, 1, settings(labelled, tmp_path, kind).train)[3]
        names = len(source.meaning["names"])
        logits = torch.randn(*batch.labels.shape[: 2 if kind == "tags" else 1], names, requires_grad=True)

        def net(logits=logits, **_):
            return type("Output", (), {"logits": logits})

        loss, _ = source.task.loss_sum(net, {}, batch.labels, **source.loss_options)
        if kind == "multi":
            reference = torch.nn.BCEWithLogitsLoss(weight=source.class_weights)(logits, batch.labels)
        else:
            how = {"weight": source.class_weights, "label_smoothing": smoothing}
            reference = torch.nn.CrossEntropyLoss(**how)(logits.flatten(0, -2), batch.labels.flatten())
        assert float(loss.detach()) / batch.targets == pytest.approx(float(reference.detach()), rel=1e-5), kind


def test_rates_fall_from_the_output_to_the_embeddings():
    from hpcllm import optimizer

    for family, sizes in SIZES.items():
        net = (
            TASKS["sequence_classification"]
            .model_class()
            .from_config(AutoConfig.for_model(family, vocab_size=50, **sizes))
        )
        placed = whole(net)
        run = config.Train(
            max_steps=1,
            global_batch_size=1,
            micro_batch_size=1,
            sequence_length=8,
            learning_rate=1.0,
            layerwise_lr_decay=0.5,
        )
        adjust = optimizer.build(placed, run)
        optimizer.set_learning_rate(adjust, 2.0)
        rate = {id(p): group["lr"] for group in adjust.param_groups for p in group["params"]}
        rates = {name: rate[id(p)] for name, p in net.named_parameters()}
        assert len(rates) == len(rate)
        for name, found in rates.items():
            depth = (
                3
                if "embedding" in name or "wte" in name or "wpe" in name
                else 2
                if ".0." in name
                else 1
                if ".1." in name
                else 0
            )
            assert found == 2.0 * 0.5**depth, (family, name, found)


def test_data_of_another_task_or_with_other_labels_are_refused(world, labelled, tmp_path):
    for kind, other, words in (
        ("single", "tags", 'labels of the kind "tags", sequence_classification takes'),
        ("tags", "single", 'labels of the kind "single", token_classification takes tags'),
    ):
        run = settings(labelled, tmp_path, kind, **{"data.train": f"{labelled}/{other}/train"})
        with pytest.raises(DataError, match=words):
            train.train(run, world)
    run = settings(labelled, tmp_path, "single", **{"data.validation": f"{labelled}/multi/validation"})
    with pytest.raises(DataError, match="has the labels multi person, place, the model single bad, good"):
        train.train(run, world)
    run = settings(labelled, tmp_path, "single", **{"train.sequence_length": 8})
    with pytest.raises(DataError, match=r"has examples of 16 tokens, more than train.sequence_length \(8\)"):
        train.train(run, world)
    values = settings(labelled, tmp_path, "single").model_dump(exclude_none=True)
    values["model"]["task"], values["data"]["test"] = "masked_lm", None
    with pytest.raises(DataError, match="holds labelled examples, masked_lm learns from text"):
        train.train(config.load({**values, "data": {"train": f"{labelled}/single/train"}}), world)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.num_train_epochs": 2}, "either max_steps or num_train_epochs"),
        ({"train.warmup_ratio": 0.1}, "either warmup_steps or warmup_ratio"),
        ({"train.early_stopping_patience": 2}, "needs metric_for_best_model and eval_every_steps"),
        ({"parallel.pipeline": 2}, "goes with the data and tensor axes"),
        ({"parallel.tensor": 2, "parallel.sequence": True}, "goes with the data and tensor axes"),
        ({"data.attention": "document"}, 'data.attention = "row"'),
    ],
)
def test_run_files_that_contradict_themselves_are_refused(labelled, tmp_path, changes, words):
    values = settings(labelled, tmp_path, "single").model_dump(exclude_none=True)
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    with pytest.raises(UsageError, match=words):
        config.load(values)


def test_epochs_are_steps_once_the_data_are_known():
    values = {"global_batch_size": 32, "micro_batch_size": 8, "sequence_length": 16, "learning_rate": 1.0}
    plan = config.Train(num_train_epochs=1.5, warmup_ratio=0.1, **values).with_steps(100)
    assert (plan.max_steps, plan.warmup_steps) == (5, 1)
    assert config.Train.model_validate(plan.model_dump()) == plan
