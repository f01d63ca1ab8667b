"""LoRA: it learns what PEFT learns, in any layout; what is frozen stays; what is exported says what was trained."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_labelled import WORDS, prepare, write, write_tokenizer
from small_runs import PLAIN, opened, records, shared
from small_runs import load as load_settings
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hpcllm.mpi
from hpcllm import config, export, lora, model, optimizer, plan, predict, train, weights
from hpcllm.errors import DataError, UsageError
from hpcllm.parallel.apply import whole

peft = pytest.importorskip("peft")

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BERT |= {"vocab_size": 200, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 600}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
SMALL = {"lora.r": 4, "lora.lora_alpha": 16}
EXACT = {**SMALL, **PLAIN, "train.weight_decay": 0.0, "train.max_grad_norm": 0.0}
BOTH = pytest.mark.parametrize("kind", ["bert", "gpt2"])


@pytest.fixture(scope="session")
def ready(tmp_path_factory):
    """A folder with labelled data and two models that have learnt nothing: an encoder without a head, and a decoder."""
    world = hpcllm.mpi.join()
    base = Path(world.comm.bcast(str(tmp_path_factory.mktemp("lora"))))
    if world.is_root:
        write_tokenizer(base / "tokenizer")
        for number, (part, count) in enumerate((("train", 200), ("validation", 40), ("test", 30))):
            write(base / f"single-{part}.jsonl", "single", count, number)
        torch.manual_seed(1)
        AutoModel.from_config(AutoConfig.for_model("bert", **BERT)).save_pretrained(base / "bert")
        AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT2)).save_pretrained(base / "gpt2")
    world.comm.Barrier()
    train_files, validation, test = ([f"{base}/single-{part}.jsonl"] for part in ("train", "validation", "test"))
    prepare(world, base, "single", "single", max_tokens=16, inputs=train_files, validation=validation, test=test)
    return base


@pytest.fixture
def settings(ready, prepared):
    """settings(output, kind, **changes) of a run of six steps: texts are classified from "bert", or continued."""

    def of(output, kind="bert", **changes):
        changes = {**SMALL, **changes}
        section = {"task": "sequence_classification", "init_from": f"{ready}/bert"}
        run = load_settings(output, f"{ready}/single", section, 16, changes if kind == "bert" else {})
        if kind == "bert":
            return run
        values = run.model_dump(exclude_none=True)
        values["model"] = {"task": "causal_lm", "init_from": f"{ready}/gpt2"}
        values["data"] = {"train": f"{prepared}/train", "validation": f"{prepared}/validation"}
        values["train"]["sequence_length"] = 32
        return config.load(values, [f"{key}={value}" for key, value in changes.items()])

    return of


def held(folder):
    """The weights of a checkpoint, as they were trained."""
    return load_file(Path(folder) / "lora.safetensors")


def unmerged(folder, task):
    """The model of a checkpoint as it was trained, LoRA beside its layers."""
    net, source = model.resume(folder, task)
    weights.give([net], "cpu")
    weights.refill(whole(net), source)
    return net.eval()


@torch.no_grad()
def says(net):
    return net(input_ids=torch.arange(1, 25).view(2, 12)).logits


def parallel(**section):
    return {f"parallel.{key}": value for key, value in section.items()}


def by_peft(run, source):
    """(losses, reference model) of the steps of `run`, trained by a loop around PEFT's model."""
    net, _ = model.build(run.model, source.vocabulary, 16, run.run.seed, source.meaning, run.lora)
    plain = AutoModelForSequenceClassification.from_pretrained(run.model.init_from, num_labels=2)
    how = {"r": run.lora.r, "lora_alpha": run.lora.lora_alpha, "use_rslora": run.lora.use_rslora}
    reference = peft.get_peft_model(plain, peft.LoraConfig(task_type="SEQ_CLS", **how)).train()
    ours = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    theirs = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): parameter
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    assert ours.keys() == theirs.keys() and any("lora_A" in name for name in ours)
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    adjust, losses = torch.optim.SGD(theirs.values(), lr=1.0, momentum=run.train.sgd_momentum), []
    for step in range(run.train.max_steps):
        optimizer.set_learning_rate(adjust, optimizer.learning_rate(step, run.train))
        adjust.zero_grad()
        batches = source.training_step(step * run.train.global_batch_size, 0, 1, run.train)
        found = [
            functional.cross_entropy(reference(**batch.inputs).logits, batch.labels, reduction="sum")
            / run.train.global_batch_size
            for batch in batches
        ]
        sum(found).backward()
        adjust.step()
        losses.append(float(sum(found).detach()))
    return losses, {name: parameter.detach() for name, parameter in theirs.items()}


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("sharding", "use_rslora"), [("host", "false"), ("none", "true"), ("gradients", "false"), ("full", "true")]
)
def test_it_learns_what_peft_learns(world, ready, settings, tmp_path, sharding, use_rslora):
    if sharding in ("full", "gradients") and (world.size == 1 or 12 % world.size):
        pytest.skip("nobody to divide the weights with")
    base = shared(world, tmp_path)
    changes = {**EXACT, "lora.use_rslora": use_rslora, **parallel(sharding=sharding)}
    run = settings(base / "run", **changes)
    after = held(train.train(run, world)["checkpoint"])
    losses, learnt = by_peft(run, opened(run, world, "train"))
    assert records(base / "run") == pytest.approx(losses, rel=1e-5)
    for name, value in learnt.items():
        assert torch.allclose(after[name], value, rtol=1e-3, atol=1e-6), name
    before = load_file(ready / "bert" / "model.safetensors")
    for name, value in before.items():
        adapted = f"bert.{name}".replace(".query.", ".query.base_layer.").replace(".value.", ".value.base_layer.")
        assert torch.equal(after[adapted], value), name
    assert all(value.any() for name, value in after.items() if ".lora_B." in name)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("bert", {}),
        ("bert", {"sharding": "full"}),
        ("gpt2", {}),
        ("gpt2", {"sharding": "optimizer"}),
        ("gpt2", {"context": 2}),
    ],
)
def test_losses_do_not_depend_on_the_layout(world, settings, tmp_path, kind, layout):
    if 12 % world.size or world.size % layout.get("context", 1):
        pytest.skip("ranks do not divide")
    # A micro-batch's dropout is the same on whichever rank, but each part of a sequence has its own.
    how = {**PLAIN, "lora.target_modules": "all-linear", "lora.lora_dropout": 0.0 if "context" in layout else 0.3}
    base = shared(world, tmp_path)
    alone = train.train(settings(tmp_path / "alone", kind, **how), hpcllm.mpi.alone(world))
    results = train.train(settings(base / "run", kind, **how, **parallel(**layout)), world)
    for key in ("loss", "grad_norm", "eval_loss"):
        assert records(base / "run", key) == pytest.approx(records(tmp_path / "alone", key), rel=1e-5), key
    ours, expected = held(results["checkpoint"]), held(alone["checkpoint"])
    assert all(torch.equal(ours[name], value) for name, value in expected.items() if ".base_layer." in name)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {}),
        ("gpt2", {"train.precision": "bf16", "train.activation_checkpointing": "true"}),
        ("bert", {"train.precision": "bf16", "parallel.sharding": "none"}),
        ("gpt2", {"parallel.sharding": "full"}),
    ],
)
def test_a_run_goes_on_bit_for_bit(world, settings, tmp_path, kind, changes):
    if changes.get("parallel.sharding") == "full" and world.size == 1:
        pytest.skip("nobody to divide the weights with")
    base = shared(world, tmp_path)
    run = settings(base / "run", kind, **changes, **{"lora.lora_dropout": 0.2, "checkpoint.every_steps": 3})
    results, files = train.train(run, world), ("lora.safetensors", "optimizer.safetensors", "lora.json")
    expected = [(Path(results["checkpoint"]) / name).read_bytes() for name in files]
    world.comm.Barrier()
    if world.is_root:
        shutil.rmtree(results["checkpoint"])
        (base / "run" / "results.json").unlink()
    world.comm.Barrier()
    assert train.train(run, world, resume=True) == results
    assert [(Path(results["checkpoint"]) / name).read_bytes() for name in files] == expected
    assert records(base / "run", "restart")[-1] == 1


@pytest.mark.mpi
def test_a_run_does_not_go_on_with_another_lora(world, settings, tmp_path):
    base = shared(world, tmp_path)
    run = settings(base / "run", **{"train.max_steps": 2})
    train.train(run, world)
    world.comm.Barrier()
    without = config.load({**run.model_dump(exclude_none=True), "lora": None})
    for other, words in (
        (settings(base / "run", **{"lora.r": 8}), r"lora\.r was 4 when the checkpoint was written and is 8 now"),
        (settings(base / "run", **{"lora.target_modules": "all-linear"}), r"lora\.target_modules was None when"),
        (without, r"lora\.r was 4 when the checkpoint was written and is None now"),
    ):
        with pytest.raises(DataError, match=words):
            train.train(other, world, resume=True)


@pytest.mark.mpi
def test_the_best_checkpoint_is_the_one_that_is_evaluated(world, settings, tmp_path):
    base = shared(world, tmp_path)
    # A rate so high that nothing is learnt: of equals the first is the best.
    how = {"train.eval_every_steps": 2, "train.metric_for_best_model": "accuracy", "train.learning_rate": 5.0}
    results = train.train(settings(base / "run", **how), world)
    seen = records(base / "run", "eval_loss")[results["best_step"] // 2 - 1]
    assert results["best_step"] < 6 and results["eval_loss"] == pytest.approx(seen, rel=1e-6)


def test_the_first_lines_of_a_log_tell_how_much_is_trained(world, settings, tmp_path, capsys):
    train.train(settings(tmp_path / "run"), hpcllm.mpi.alone(world))
    # Two matrices beside each of four layers, and the new head.
    assert f", {(4 * 2 * 4 * 32 + 2 * 32 + 2) / 1e6:.3g} M of them trained, fp32 on cpu" in capsys.readouterr().out


# --- what comes of it --------------------------------------------------------------------------------------------


@pytest.fixture
def trained(world, settings, tmp_path):
    """trained(kind): (settings, checkpoint, transformers' class of the task) of a run that has learnt something."""

    def run(kind):
        how = {"train.learning_rate": 3e-2, **({"lora.target_modules": "all-linear"} if kind == "gpt2" else {})}
        made = settings(tmp_path / "run", kind, **how)
        results = train.train(made, hpcllm.mpi.alone(world))
        auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
        return made, Path(results["checkpoint"]), auto

    return run


@BOTH
def test_an_export_is_a_plain_model_that_says_the_same(trained, tmp_path, kind):
    run, folder, auto = trained(kind)
    net, out = unmerged(folder, run.model.task), tmp_path / "out"
    summary = export.export(folder, run.model.task, out)
    made, report = auto.from_pretrained(out, local_files_only=True, output_loading_info=True)
    assert not any(report.values()) and summary["files"] == len(list(out.iterdir()))
    assert not [name for name in load_file(out / "model.safetensors") if "lora" in name or "base_layer" in name]
    expected = says(net)
    assert torch.allclose(says(made.eval()), expected, atol=1e-5)
    assert torch.allclose(says(model.load(folder, run.model.task).eval()), expected, atol=1e-5)
    for module in net.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.enable_adapters(False)
    assert not torch.allclose(says(net), expected, atol=1e-3)  # it was LoRA that had learnt
    layers = {"bert": 4, "gpt2": 8}[kind]
    learnt = [value for name, value in held(folder).items() if ".lora_" in name or "classifier" in name]
    count = sum(map(torch.numel, learnt))
    told = f"| LoRA | r 4, alpha 16, dropout 0, in {layers} layers; {count} parameters trained |"
    assert told in (out / "README.md").read_text()


@BOTH
def test_an_adapter_is_one_that_peft_loads(trained, tmp_path, kind):
    run, folder, auto = trained(kind)
    out = tmp_path / "out"
    export.export(folder, run.model.task, out, adapter=True)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= set(names(out))
    assert "config.json" not in names(out) and "library_name: peft" in (out / "README.md").read_text()
    told = peft.PeftConfig.from_pretrained(str(out))
    assert told.base_model_name_or_path == run.model.init_from and not told.auto_mapping
    base = auto.from_pretrained(run.model.init_from, **({"num_labels": 2} if kind == "bert" else {}))
    made = peft.PeftModel.from_pretrained(base, str(out)).eval()
    assert torch.allclose(says(made), says(unmerged(folder, run.model.task)), atol=1e-6)
    export.export(folder, run.model.task, out, "bf16", overwrite=True, adapter=True)
    assert {value.dtype for value in load_file(out / "adapter_model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(DataError, match="holds an adapter of a model"):
        model.load(out, run.model.task)


def names(folder):
    return [file.name for file in folder.iterdir()]


@BOTH
def test_nobody_takes_a_checkpoint_for_the_model_that_it_started_from(trained, kind):
    _, folder, auto = trained(kind)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        auto.from_pretrained(folder, local_files_only=True)


def test_predictions_are_those_of_the_exported_model(world, trained, tmp_path):
    run, folder, _ = trained("bert")
    out = tmp_path / "out"
    export.export(folder, run.model.task, out)
    texts = [" ".join(words) for words in WORDS.values()]
    for question in (None, "embedding"):
        ours, theirs = (predict.predict_texts(world, path, texts, question=question) for path in (folder, out))
        assert ours == theirs


def test_a_run_may_start_from_one_with_lora(world, trained, settings, tmp_path):
    run, folder, _ = trained("bert")
    again = settings(tmp_path / "again", **{"model.init_from": str(folder)})
    source = opened(again, world, "train")
    net, _ = model.build(again.model, source.vocabulary, 16, 1, source.meaning, again.lora)
    assert torch.allclose(says(net.eval()), says(unmerged(folder, run.model.task)), atol=1e-5)
    assert net.lora["whole"] == []  # the head was there


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.r": 0}, "lora.r: Input should be greater than or equal to 1"),
        ({"lora.lora_dropout": 1.0}, "lora.lora_dropout: Input should be less than 1"),
        ({"lora.rank": 3}, r'lora: unknown key "rank"; known: r, lora_alpha, lora_dropout, use_rslora, target_modules'),
        ({"parallel.tensor": 2}, "goes with parallel.tensor = 1, not 2: .* parallel.sharding"),
        ({"parallel.pipeline": 2}, "goes with parallel.pipeline = 1, not 2"),
    ],
)
def test_run_files_that_lora_does_not_go_with_are_refused(settings, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        settings(tmp_path, "gpt2", **changes)


def test_a_model_without_weights_is_refused(settings, tmp_path):
    values = settings(tmp_path).model_dump(exclude_none=True)
    values["model"] = {"task": "sequence_classification", "config": {"model_type": "bert"}}
    with pytest.raises(UsageError, match=r"\[lora\] adapts a model that has learnt something: give model.init_from"):
        config.load(values)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.target_modules": '["querry"]'}, r'no layer is called "querry" \(near: query'),
        ({"lora.target_modules": '["query", "word_embeddings"]'}, "embeddings.word_embeddings is no linear layer"),
        ({"lora.target_modules": '["LayerNorm"]'}, "PEFT cannot adapt this model: Target module LayerNorm"),
        ({"lora.target_modules": "[]"}, "PEFT cannot adapt this model: No modules were targeted"),
        ({"lora.target_modules": '["classifier"]'}, "PEFT cannot adapt this model: No modules were targeted"),
    ],
)
def test_layers_that_lora_does_not_adapt_are_refused_at_the_start(world, settings, tmp_path, changes, words):
    base = shared(world, tmp_path)
    with pytest.raises(UsageError, match=words):
        train.train(settings(base / "run", **changes), world)
    assert not (base / "run").exists()


def test_an_output_layer_and_unknown_families_are_refused(ready):
    net = AutoModelForCausalLM.from_pretrained(ready / "gpt2")
    with pytest.raises(UsageError, match="lm_head is no linear layer between embeddings and output layer"):
        lora.adapt(net, config.Lora(target_modules=["lm_head"]).model_dump())
    net = AutoModelForCausalLM.from_pretrained(ready / "gpt2")
    net.config.model_type = "new"
    with pytest.raises(UsageError, match="PEFT knows no usual target_modules of new: name some"):
        lora.adapt(net, config.Lora().model_dump())


@pytest.mark.mpi
def test_without_peft_it_is_named(world, settings, tmp_path, monkeypatch):
    base = shared(world, tmp_path)
    found = lora.importlib.util.find_spec
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(UsageError, match=r"\[lora\] needs peft: pip install 'hpcllm\[lora\]'") as caught:
        train.train(settings(base / "run"), world)
    assert caught.value.code == 2 and not (base / "run").exists()


def test_an_adapter_of_a_run_without_lora_is_refused(world, settings, tmp_path):
    run = config.load({**settings(tmp_path / "run").model_dump(exclude_none=True), "lora": None})
    results = train.train(run, hpcllm.mpi.alone(world))
    with pytest.raises(UsageError, match=r"--adapter: .* is of a run without \[lora\]"):
        export.export(results["checkpoint"], run.model.task, tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_peft_cannot_hold_is_refused(world, settings, tmp_path):
    values = settings(tmp_path / "run", "gpt2", **{"train.max_steps": 2}).model_dump(exclude_none=True)
    values["model"] = {"task": "masked_lm", "init_from": f"{tmp_path}/bert"}
    sizes = {**BERT, "vocab_size": 600}
    AutoModel.from_config(AutoConfig.for_model("bert", **sizes)).save_pretrained(tmp_path / "bert")
    results = train.train(config.load(values), hpcllm.mpi.alone(world))
    assert not held(results["checkpoint"])["cls.predictions.bias"].equal(torch.zeros(600))
    # Its output layer started at random, but for the weight that it shares with the embeddings.
    with pytest.raises(UsageError, match=r"--adapter: cls\.predictions\.bias started at random beside weights that"):
        export.export(results["checkpoint"], "masked_lm", tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()
    export.export(results["checkpoint"], "masked_lm", tmp_path / "out")


def test_plans_know_what_is_frozen(settings, tmp_path):
    run = settings(tmp_path, "gpt2")
    found = plan.shapes_of(run, model.configuration(run.model))
    parts = (found.first, *found.blocks, found.last)
    of_lora = 2 * 4 * (32 + 3 * 32)  # c_attn of two blocks
    assert sum(part.parameters - part.frozen for part in parts) - found.tied == of_lora
    plain = config.load({**run.model_dump(exclude_none=True), "lora": None})
    assert found.parameters == plan.shapes_of(plain, model.configuration(plain.model)).parameters + of_lora
