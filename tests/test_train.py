"""Training: the same run at any number of ranks, continued exactly, refused before it starts when it cannot be."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hpcllm.mpi
from hpcllm import config, evaluate, model, sources, train
from hpcllm.data import batches
from hpcllm.errors import CannotCreate, DataError, Diverged, Refusal, UsageError
from hpcllm.parallel.apply import whole

SMALL = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
    "mixtral": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "initializer_range": 0.1,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
    },
}
TASK = {"bert": "masked_lm", "gpt2": "causal_lm", "llama": "causal_lm", "mixtral": "causal_lm"}


def settings(prepared, output, kind="bert", **changes):
    values = {
        "run": {"output_dir": str(output), "seed": 7},
        "data": {"train": f"{prepared}/train", "validation": f"{prepared}/validation"},
        "model": {"task": TASK[kind], "config": {"model_type": kind, **SMALL[kind]}},
        "train": {
            "max_steps": 6,
            "global_batch_size": 12,
            "micro_batch_size": 1,
            "sequence_length": 32,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
        },
        "checkpoint": {},
    }
    return config.load(values, [f"{key}={value}" for key, value in changes.items()])


def losses(output, key="loss"):
    records = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def weights(output, step):
    folder = Path(output) / f"checkpoint-{step}"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def opened(run, world, folder):
    return sources.open_source(run, world, folder, sources.read_tokenizer(run.data.tokenizer_dir))


def shared(world, path):
    return Path(world.comm.bcast(str(path)))


@pytest.mark.mpi()
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {}),
        ("bert", {"train.optimizer": "sgd", "train.sgd_momentum": 0.9, "train.learning_rate": 0.3}),
        ("gpt2", {"train.lr_scheduler_type": "cosine"}),
        ("gpt2", {"train.optimizer": "sgd", "train.learning_rate": 0.3}),
        ("llama", {}),
        ("bert", {"data.attention": "document"}),
        ("gpt2", {"data.attention": "document"}),
    ],
)
def test_losses_do_not_depend_on_the_number_of_ranks(world, prepared, tmp_path, kind, changes):
    # Dropout is on: it belongs to the micro-batch, so it is the same too.
    run = settings(prepared, shared(world, tmp_path) / "together", kind, **changes)
    train.train(run, world)
    by_itself = settings(prepared, tmp_path / "alone", kind, **changes)
    train.train(by_itself, hpcllm.mpi.alone(world))
    ours, reference = losses(run.run.output_dir), losses(by_itself.run.output_dir)
    assert len(ours) == 6
    assert reference[-1] < reference[0] - 0.05
    assert max(abs(a / b - 1) for a, b in zip(ours, reference, strict=True)) < 1e-5


NO_DROPOUT = {
    "model.config.hidden_dropout_prob": 0.0,
    "model.config.attention_probs_dropout_prob": 0.0,
    "train.optimizer": "sgd",
    "train.sgd_momentum": 0.9,
    "train.learning_rate": 0.1,
    "train.lr_scheduler_type": "constant",
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("tensor", "context", "pipeline", "sharding", "how"),
    [(tensor, 1, 1, sharding, "1f1b") for tensor in (1, 2) for sharding in ("none", "optimizer", "gradients", "full")]
    + [(1, 1, 2, "none", "1f1b"), (1, 1, 2, "none", "zero_bubble"), (2, 1, 2, "none", "1f1b")]
    + [(2, 1, 1, "none", "sequence"), (2, 1, 1, "full", "sequence"), (2, 1, 2, "none", "sequence")]
    + [(1, 1, 2, "full", "1f1b"), (1, 2, 1, "none", "1f1b"), (1, 2, 1, "full", "1f1b"), (1, 2, 2, "none", "1f1b")],
)
def test_a_run_goes_on_under_another_layout_with_the_same_losses(
    world, prepared, tmp_path, tensor, context, pipeline, sharding, how
):
    if world.size % (tensor * context * pipeline):
        pytest.skip("ranks do not divide")
    base = shared(world, tmp_path)
    changes = {**NO_DROPOUT, "checkpoint.every_steps": 3, "train.eval_every_steps": 3}
    layout = {"parallel.tensor": tensor, "parallel.sharding": sharding, "parallel.pipeline": pipeline}
    layout |= {"parallel.sequence": "true"} if how == "sequence" else {"parallel.pipeline_schedule": how}
    layout |= {"parallel.context": context}
    reference = settings(prepared, tmp_path / "alone", **changes)
    train.train(reference, hpcllm.mpi.alone(world))
    # Three steps under the one layout, three under another.
    first = settings(prepared, base / "run", **{**changes, **layout, "train.max_steps": 3})
    train.train(first, world)
    other = {"parallel.sharding": "gradients" if sharding == "none" else "none"}
    if sharding == "full" and world.size % 2 == 0:
        other["parallel.pipeline"] = 2
    second = settings(prepared, base / "run", **{**changes, **other, "train.activation_checkpointing": "true"})
    train.train(second, world, resume=True)
    # Saved right after an evaluation, which leaves weights gathered under some shardings.
    assert len(load_file(base / "run" / "checkpoint-3" / "optimizer.safetensors")) > 10
    run, whole = losses(base / "run"), losses(reference.run.output_dir)
    assert len(run) == 6
    assert max(abs(a / b - 1) for a, b in zip(run, whole, strict=True)) < 1e-5
    for key in ("eval_loss", "eval_accuracy", "eval_targets", "eval_samples"):  # under either layout
        assert losses(base / "run", key) == pytest.approx(losses(reference.run.output_dir, key), rel=1e-5), key


@pytest.mark.mpi(min_size=2)
def test_experts_that_ranks_have_shared_go_on_under_another_layout(world, prepared, tmp_path):
    if world.size % 2:
        pytest.skip("ranks do not divide")
    base = shared(world, tmp_path)
    changes = {key: value for key, value in NO_DROPOUT.items() if key.startswith("train.")}
    reference = settings(prepared, tmp_path / "alone", "mixtral", **changes)
    train.train(reference, hpcllm.mpi.alone(world))
    first = {"parallel.tensor": 2, "train.max_steps": 3}
    train.train(settings(prepared, base / "run", "mixtral", **{**changes, **first}), world)
    results = train.train(
        settings(prepared, base / "run", "mixtral", **{**changes, "parallel.sharding": "full"}), world, resume=True
    )
    assert losses(base / "run") == pytest.approx(losses(reference.run.output_dir), rel=1e-5)
    # As a whole, from what ranks have written: the evaluation's loss is the cross entropy alone.
    net, source = model.load(results["checkpoint"], "causal_lm"), opened(reference, world, f"{prepared}/validation")
    scores, _ = evaluate.evaluate(whole(net, world), source, 1, "fp32")
    assert scores["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)


@pytest.mark.mpi(max_size=2)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile has no C++ compiler here")
def test_compiled_blocks_change_no_loss_and_no_score(world, prepared, tmp_path):
    base, runs = shared(world, tmp_path), []
    for compiled in ("false", "true"):
        how = {"train.compile": compiled, "train.eval_every_steps": 3, "train.micro_batch_size": 3}
        runs.append(settings(prepared, base / compiled, **{**NO_DROPOUT, **how}))
        train.train(runs[-1], world)
    for key in ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_samples"):
        eager, ours = (losses(run.run.output_dir, key) for run in runs)
        assert ours == pytest.approx(eager, rel=1e-5), key
    assert weights(base / "true", 6).keys() == weights(base / "false", 6).keys()


@pytest.mark.mpi()
@pytest.mark.parametrize("key", ["train.precision", "parallel.reduce_dtype"])
def test_bf16_follows_fp32(world, prepared, tmp_path, key):
    base = shared(world, tmp_path)
    curves = []
    for precision in ("fp32", "bf16"):
        run = settings(prepared, base / precision, **{key: precision, "parallel.sharding": "none"})
        train.train(run, world)
        curves.append(losses(run.run.output_dir))
    assert curves[0] != curves[1]
    assert max(abs(a / b - 1) for a, b in zip(*curves, strict=True)) < 0.02


@pytest.mark.mpi()
def test_a_run_stopped_by_an_error_continues_bit_for_bit(world, prepared, tmp_path, monkeypatch):
    base = shared(world, tmp_path)
    whole = settings(prepared, base / "whole", **{"checkpoint.every_steps": 3})
    train.train(whole, world)

    # One that is being written when an error comes may be lost.
    stopped = settings(prepared, base / "stopped", **{"checkpoint.every_steps": 3, "checkpoint.asynchronous": "false"})
    one_step, steps = train.one_step, []

    def failing(*arguments):
        steps.append(None)
        if len(steps) == 5:
            raise RuntimeError("provoked")
        return one_step(*arguments)

    monkeypatch.setattr(train, "one_step", failing)
    with pytest.raises(RuntimeError, match="provoked"):
        train.train(stopped, world)
    monkeypatch.setattr(train, "one_step", one_step)
    results = train.train(stopped, world, resume=True)

    assert results["step"] == 6
    ours, expected = weights(stopped.run.output_dir, 6), weights(whole.run.output_dir, 6)
    assert ours.keys() == expected.keys()
    assert any(".exp_avg_sq" in name for name in ours)
    differing = [name for name in ours if not torch.equal(ours[name], expected[name])]
    assert differing == []
    records = [json.loads(line) for line in (base / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["restart"]) for r in records if "loss" in r] == [
        (1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (5, 1), (6, 1),
    ]  # fmt: skip


@pytest.mark.mpi()
def test_documents_that_share_a_row_do_not_see_each_other(world, prepared, tmp_path):
    run = settings(prepared, shared(world, tmp_path) / "run", **{"data.attention": "document", "train.max_steps": 2})
    results = train.train(run, world)
    validation = opened(run, world, run.data.validation)
    batch = validation.micro_batch(torch.arange(len(validation)).numpy(), torch.zeros(len(validation)).long().numpy())
    # By hand: a document ends with its separator, and the row's own one is alone behind a document's.
    ends = (batch.input_ids == validation.stream.separator_id).nonzero()
    begins = [(row, at + 1) for row, at in ends.tolist() if at + 1 < batch.input_ids.shape[1]]
    assert begins and all(batch.positions[row, at] == 0 for row, at in begins)
    assert int((batch.positions == 0).sum()) == len(begins) + len(validation)
    net = train.model.load(results["checkpoint"], "masked_lm").eval()
    by_row, _ = evaluate.evaluate(
        whole(net, world), opened(settings(prepared, tmp_path), world, run.data.validation), 4, "fp32"
    )
    train.attention.keep_apart(net)
    scores, _ = evaluate.evaluate(whole(net, world), validation, 4, "fp32")
    assert scores["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-6)
    assert scores["eval_targets"] == by_row["eval_targets"]
    assert abs(scores["eval_loss"] - by_row["eval_loss"]) > 1e-5


@pytest.mark.mpi()
def test_every_validation_sample_counts_once(world, prepared, tmp_path):
    run = settings(prepared, shared(world, tmp_path) / "run", **{"train.max_steps": 2})
    results = train.train(run, world)
    validation = opened(run, world, run.data.validation)
    net = train.model.load(results["checkpoint"], "masked_lm")
    for width in (1, 5, 1000):
        scores, _ = evaluate.evaluate(whole(net, world), validation, width, "fp32")
        reference, _ = evaluate.evaluate(whole(net, hpcllm.mpi.alone(world)), validation, 3, "fp32")
        assert scores["eval_samples"] == reference["eval_samples"] == len(validation)
        assert scores["eval_targets"] == reference["eval_targets"] == results["eval_targets"]
        assert scores["eval_accuracy"] == reference["eval_accuracy"]
        assert scores["eval_loss"] == pytest.approx(reference["eval_loss"], rel=1e-6)
    assert results["eval_loss"] == pytest.approx(reference["eval_loss"], rel=1e-6)


@pytest.mark.mpi()
def test_ranks_share_the_global_batch_without_overlap(world, prepared, tmp_path):
    run = settings(prepared, shared(world, tmp_path))
    source = opened(run, world, run.data.train)
    mine = source.training_step(24, world.rank, world.size, run.train)
    alone = source.training_step(24, 0, 1, run.train)
    everybody = world.comm.allgather([(b.seed, b.input_ids.tolist(), b.labels.tolist()) for b in mine])
    dealt = [everybody[m % world.size][m // world.size] for m in range(12)]
    assert dealt == [(b.seed, b.input_ids.tolist(), b.labels.tolist()) for b in alone]


@pytest.mark.mpi()
@pytest.mark.parametrize(
    ("changes", "refusal", "words"),
    [
        ({"train.global_batch_size": 100_008}, DataError, "a global batch needs 100008 samples"),
        ({"train.sequence_length": 600}, UsageError, r"sequence_length \(600\).*max_position_embeddings \(512\)"),
        ({"model.config.vocab_size": 10}, UsageError, "10 embeddings .* too few for the tokenizer's"),
        ({"model.config.hiden_size": 10}, UsageError, 'no argument "hiden_size".*"hidden_size"'),
        ({"model.config.model_type": "birt"}, UsageError, 'no model_type "birt"'),
        ({"data.train": "nowhere"}, Refusal, "nowhere"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(world, prepared, tmp_path, changes, refusal, words):
    output = shared(world, tmp_path) / "run"
    tokenizer = {"data.tokenizer": f"{prepared}/tokenizer"}
    with pytest.raises(refusal, match=words):
        train.train(settings(prepared, output, **{**tokenizer, **changes}), world)
    assert not output.exists()


@pytest.mark.mpi(min_size=2)
def test_a_batch_that_ranks_cannot_share_is_refused_with_the_numbers(world, prepared, tmp_path):
    run = settings(prepared, shared(world, tmp_path) / "run", **{"train.micro_batch_size": 12})
    with pytest.raises(
        UsageError, match=rf"\(12\) is not divisible .* \(12\) x {world.size} ranks = {12 * world.size}"
    ):
        train.train(run, world)


@pytest.mark.mpi()
def test_a_run_is_not_overwritten_unasked(world, prepared, tmp_path):
    run = settings(prepared, shared(world, tmp_path) / "run", **{"train.max_steps": 2})
    train.train(run, world)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes() if world.is_root else None
    with pytest.raises(CannotCreate, match=r"holds a run already \(newest checkpoint: checkpoint-2\).*--resume"):
        train.train(run, world)
    if world.is_root:
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    world.comm.Barrier()
    train.train(run, world, overwrite=True)
    assert len(losses(run.run.output_dir)) == 2


@pytest.mark.parametrize("how", [{"overwrite": True}, {"resume": True}, {}])
def test_a_folder_that_is_no_run_is_never_touched(world, prepared, tmp_path, how):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "config.toml").write_text("[mine]")
    with pytest.raises(CannotCreate, match="holds no run of hpcllm"):
        train.train(settings(prepared, tmp_path), world, **how)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "thesis.tex": "years of work",
        "config.toml": "[mine]",
    }


@pytest.mark.mpi()
def test_a_run_that_is_over_keeps_its_results_and_can_be_made_longer(world, prepared, tmp_path):
    base = shared(world, tmp_path) / "run"
    few = {"train.global_batch_size": world.size, "train.max_steps": 2, "train.warmup_steps": 0}
    results = train.train(settings(prepared, base, **few), world)
    assert train.train(settings(prepared, base, **few), world, resume=True) == results
    with pytest.raises(UsageError, match=r"checkpoint-2 is beyond train.max_steps \(1\)"):
        train.train(settings(prepared, base, **{**few, "train.max_steps": 1}), world, resume=True)
    assert json.loads((base / "results.json").read_text()) == results
    with pytest.raises(UsageError, match=r"--resume .* --overwrite"):
        train.train(settings(prepared, base, **few), world, resume=True, overwrite=True)
    world.comm.Barrier()
    if world.is_root:  # killed between the last checkpoint and the results
        (base / "results.json").unlink()
        (base / ".checkpoint-2.x.tmp").mkdir()
    world.comm.Barrier()
    assert train.train(settings(prepared, base, **few), world, resume=True)["eval_loss"] == results["eval_loss"]
    longer = settings(prepared, base, **{**few, "train.max_steps": 3})
    assert train.train(longer, world, resume=True)["step"] == 3
    world.comm.Barrier()
    if world.is_root:  # killed after its last checkpoint: these are the results of the shorter run
        (base / "results.json").write_text(json.dumps(results))
    world.comm.Barrier()
    assert train.train(longer, world, resume=True)["step"] == 3
    assert json.loads((base / "results.json").read_text())["step"] == 3
    if world.is_root:
        assert sorted(p.name for p in base.glob(".*")) == []
        starts = [json.loads(line) for line in (base / "events.jsonl").read_text().splitlines()]
        assert [(e["step"], e["restart"]) for e in starts if e["event"] == "start"] == [(0, 0), (2, 1), (2, 2), (3, 3)]


@pytest.mark.mpi()
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run.seed": 8}, "run.seed was 7 .* and is 8"),
        ({"train.sequence_length": 16}, "train.sequence_length was 32"),
        ({"model.config.hidden_size": 64}, "model.config was"),
        ({"data.train": "VALIDATION"}, "are not those of the checkpoint"),
    ],
)
def test_a_run_is_not_continued_with_other_data_or_another_model(world, prepared, tmp_path, changes, words):
    base = shared(world, tmp_path) / "run"
    few = {"train.global_batch_size": world.size, "train.max_steps": 1, "train.warmup_steps": 0}
    train.train(settings(prepared, base, **few), world)
    changes = {key: f"{prepared}/validation" if value == "VALIDATION" else value for key, value in changes.items()}
    with pytest.raises(DataError, match=words):
        train.train(settings(prepared, base, **few, **changes), world, resume=True)


@pytest.mark.mpi()
def test_a_loss_that_is_not_a_number_stops_the_run_and_is_not_saved(world, prepared, tmp_path):
    run = settings(prepared, shared(world, tmp_path) / "run", **{
        "train.optimizer": "sgd", "train.learning_rate": 1e30, "train.max_grad_norm": 0, "train.warmup_steps": 0,
        "train.lr_scheduler_type": "constant", "checkpoint.every_steps": 1,
    })  # fmt: skip
    with pytest.raises(Diverged, match=r"diverged at learning rate 1e\+30; newest checkpoint: "):
        train.train(run, world)
    world.comm.Barrier()  # root has written the last record before it raised, the others raise by themselves
    records = (Path(run.run.output_dir) / "metrics.jsonl").read_text()
    assert json.loads(records.splitlines()[-1])["loss"] is None and "NaN" not in records
    last = json.loads((Path(run.run.output_dir) / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("failed", 93) and "has diverged" in last["why"]
    for saved in (tmp_path / "run").glob("checkpoint-*") if world.is_root else []:
        assert all(bool(torch.isfinite(t).all()) for t in load_file(saved / "model.safetensors").values())


@pytest.mark.mpi()
def test_a_gradient_that_is_not_a_number_on_one_rank_changes_nothing_on_any(world, prepared, tmp_path, monkeypatch):
    base, of_task, calls = shared(world, tmp_path), evaluate.of_task, []

    def poisoned(rank, step):
        def of(*arguments, **options):
            work = of_task(*arguments, **options)
            calls.extend([] if options else [None])  # those of training
            if options or len(calls) != step or world.rank != rank:
                return work
            return dataclasses.replace(work, loss=lambda net, batch: work.loss(net, batch) * float("nan"))

        calls.clear()
        return of

    changes = {**NO_DROPOUT, "checkpoint.every_steps": 1, "checkpoint.keep": 9}
    run = settings(prepared, base / "run", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "of_task", poisoned(world.size - 1, 3))
        assert train.train(run, world)["step"] == 6
    events = [json.loads(line) for line in (base / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["left_out"]) for e in events if e["event"] == "nonfinite"] == [(3, True)]
    told = losses(base / "run")
    assert told[2] is None and all(told[:2] + told[3:])
    before, after, later = (load_file(base / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(torch.equal(after[name], later[name]) for name in before if name.endswith("query.weight"))
    # Nor is the run ended that is poisoned so rarely; one that always is, is.
    strict = settings(prepared, base / "strict", **{**changes, "train.max_nonfinite_steps": 0})
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "of_task", poisoned(0, 2))
        with pytest.raises(Diverged, match="step 2: loss nan"):
            train.train(strict, world)


def test_the_step_ahead_is_loaded_in_order_and_errors_arrive_in_their_place():
    def load(item):
        if item == 3:
            raise DataError("damaged")
        return item * 10

    for threaded in (True, False):
        loaded = batches.ahead(load, iter(range(5)), threaded)
        assert [next(loaded) for _ in range(3)] == [0, 10, 20]
        with pytest.raises(DataError, match="damaged"):
            next(loaded)


@pytest.mark.mpi()
def test_offload_is_refused_where_it_would_do_nothing(world, prepared, tmp_path):
    changes = {"parallel.sharding": "full", "parallel.offload": True}
    run = settings(prepared, shared(world, tmp_path) / "run", **{k: str(v).lower() for k, v in changes.items()})
    why = "compute on the CPU" if world.size > 1 else "two ranks or more"
    with pytest.raises(UsageError, match=why):
        train.train(run, world)


@pytest.mark.mpi
def test_a_run_leaves_damaged_shards_out_and_goes_on_with_those_alone(world, prepared, tmp_path):
    base = shared(world, tmp_path)
    if world.is_root:
        shutil.copytree(prepared, base / "data")
    world.comm.Barrier()

    def flip(name, place):
        world.comm.Barrier()
        if world.is_root:
            with open(base / "data" / "train" / name, "r+b") as file:
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 4]))
        world.comm.Barrier()

    flip("shard-00001.h5", 1 << 20)  # the first of its tokens
    with pytest.raises(DataError, match=r"shard-00001\.h5 is damaged in block 0 of its tokens"):
        # Alone, for it is the rank that reads the block that finds it, and a job ends with that.
        train.train(settings(base / "data", tmp_path / "refused"), hpcllm.mpi.alone(world))
    how = {"data.quarantine": "true", "checkpoint.every_steps": 3}
    train.train(settings(base / "data", base / "run", **how), world)
    world.comm.Barrier()
    events = [json.loads(line) for line in (base / "run" / "events.jsonl").read_text().splitlines()]
    [told] = [event for event in events if event["event"] == "quarantine"]
    assert list(told["shards"]) == ["shard-00001.h5"]
    if world.is_root:
        shutil.rmtree(base / "run" / "checkpoint-6")
        (base / "run" / "results.json").unlink()
    world.comm.Barrier()
    whole = losses(base / "run")
    train.train(settings(base / "data", base / "run", **how), world, resume=True)
    world.comm.Barrier()
    assert losses(base / "run")[len(whole) :] == whole[3:]
    for changed in ({"data.quarantine": "false"}, how):
        if changed is how:
            flip("shard-00000.h5", 1 << 20)  # and another one
        else:
            flip("shard-00001.h5", 1 << 20)  # whole again
        with pytest.raises(DataError, match="are not those of the checkpoint"):
            run = settings(base / "data", base / "run", **changed, **{"train.max_steps": 8})
            train.train(run, world, resume=True)
    world.comm.Barrier()
