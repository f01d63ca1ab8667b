"""Slices of the sequence between the blocks, on the ranks of the tensor axis: the same model, against one process."""

import dataclasses
import fnmatch

import models
import pytest
import torch
import torch.distributed as dist
from test_layouts import SIZE, check_weights, largest_difference, place, skip_what_hosts_cannot_hold, train
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaForCausalLM

from hpcllm.config import load
from hpcllm.errors import UsageError
from hpcllm.parallel import context, regions, sharding
from hpcllm.parallel import tensor as tensor_axis

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(SIZE % 2 > 0, reason="needs ranks in pairs")]
LAYOUTS = [
    how
    for how in (
        {"tensor": 2},
        {"tensor": 4},
        *({"tensor": 2, "sharding": sharding} for sharding in ("optimizer", "gradients", "full", "hybrid")),
        {"tensor": 2, "context": 2},
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "pipeline": 2, "pipeline_schedule": "interleaved", "stages_per_rank": 2},
        {"tensor": 2, "pipeline": 2, "pipeline_schedule": "zero_bubble"},
        {"tensor": 2, "pipeline": 2, "sharding": "full"},
    )
    if SIZE % (how["tensor"] * how.get("context", 1) * how.get("pipeline", 1)) == 0
    and ("sharding" not in how or how["tensor"] * how.get("pipeline", 1) < SIZE)
]


def layers(family, how):
    stages = how.get("pipeline", 1) * how.get("stages_per_rank", 1)
    return max(2, stages // 2 if family == "t5" else stages)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("how", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_slices_of_sequences_give_the_same(world, family, how, again):
    skip_what_hosts_cannot_hold(2, how.get("sharding"))
    if family == "t5" and "context" in how:
        pytest.skip("context refuses it")
    count = layers(family, how)
    expected, weights = models.train_alone(family, layers=count)
    placed = place(world, models.build(family, layers=count), again, sequence=True, **how)
    assert largest_difference(train(placed), expected) < 1e-5
    check_weights(placed, weights)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_slices_compute_in_bf16_what_whole_sequences_do(world, family, again):
    work = dataclasses.replace(models.work(family), arithmetic=lambda: torch.autocast("cpu", torch.bfloat16))
    told = []
    for sequence in (False, True):
        placed = place(world, models.build(family), again, tensor=2, sequence=sequence)
        told.append((float(sum(placed.step(range(3), work, 100))), placed.clip_gradients(0)))
    assert told[1][0] == pytest.approx(told[0][0], rel=1e-3)
    assert told[1][1] == pytest.approx(told[0][1], rel=1e-2)


def cut_modules(placed, *ways):
    """Names of the modules that the tensor axis cuts in one of these ways."""
    patterns = [pattern for pattern, how in tensor_axis.plan(placed.config).items() if how in ways]
    names = [name for name, _ in placed.model.named_modules()]
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_between_regions_are_slices_and_in_them_whole_sequences(world, family):
    placed, between, inside = place(world, models.build(family), tensor=2, sequence=True), set(), set()
    for name in cut_modules(placed, "column", "packed", "row"):
        module = placed.model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, given: inside.add(given[0].shape[1]))
    for block in sharding.blocks(placed.model):
        for module in block.modules():
            if "Norm" in type(module).__name__:
                module.register_forward_pre_hook(lambda _, given: between.add(given[0].shape[1]))
    with torch.no_grad():
        logits = placed.model(**models.inputs(family, 1)).logits
    assert (between, inside) == ({models.LENGTH // 2}, {models.LENGTH})
    assert logits.shape[:2] == (models.ROWS, models.LENGTH)


@pytest.mark.skipif(SIZE % 4 > 0, reason="needs ranks in fours")
@pytest.mark.parametrize("family", models.FAMILIES)
def test_stages_hand_over_slices(world, family):
    placed = place(world, models.build(family), tensor=2, pipeline=2, sequence=True)
    placed.step(range(2), models.work(family, placed.mesh), 1)
    shapes = {shape for outline in placed.runner.outlines.values() for _, shape in outline}
    assert shapes == {(models.ROWS, models.LENGTH // 2, placed.config.hidden_size)}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_what_backward_keeps_of_a_region_is_a_slice(world, again):
    torch.manual_seed(world.rank)
    part = torch.randn(2, 3, 4, requires_grad=True)
    weights = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    whole, kept = regions.gather(part, world.group)
    expected = torch.cat(world.comm.allgather(part.detach()), 1)
    assert torch.equal(whole, expected)
    alive = StorageWeakRef(whole.untyped_storage())
    if again:  # as where nothing says that it must not be kept
        made = [whole @ weight.t() for weight in weights]
    else:
        with kept:
            made = [whole @ weight.t() for weight in weights]
    del whole, kept
    assert alive.expired() != again
    sum(one.sum() for one in made).backward()
    for weight in weights:
        assert torch.allclose(weight.grad, expected.sum((0, 1)).expand(5, 4), atol=1e-5)
    sums = sum(world.comm.allgather(sum(weight.detach().sum(0) for weight in weights)))
    assert torch.allclose(part.grad, sums.expand(2, 3, 4), atol=1e-4)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_what_models_gather_is_gone_after_forward(world, family, precision):
    placed, seen = place(world, models.build(family), tensor=2, sequence=True), []

    def see(module, given, named):
        whole = (*given, *named.values())[0]
        assert whole.shape[1] == models.LENGTH and whole.dtype == precision
        seen.append(StorageWeakRef(whole.untyped_storage()))

    for name in {name.rpartition(".")[0] for name in cut_modules(placed, "column", "packed")}:
        placed.model.get_submodule(name).register_forward_pre_hook(see, with_kwargs=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        logits = placed.model(**models.inputs(family, 1)).logits
    assert len(seen) == {"t5": 10}.get(family, 4) and all(one.expired() for one in seen)
    logits.sum().backward()


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_dropout_of_slices_is_everybodys_own_and_the_same_when_computed_again(world, family, pipeline):
    if SIZE % (2 * pipeline):
        pytest.skip("ranks do not divide")
    told = []
    for again in (False, True):
        how = {"tensor": 2, "pipeline": pipeline, "sequence": True}
        placed = place(world, models.build(family, dropout=0.2), again, **how)
        told.append(train(placed))
        # Outside of the blocks all ranks of the axis draw the same, or what they hold there would drift apart.
        drawn = [None] * 2
        dist.all_gather_object(drawn, int(torch.randint(1 << 40, ())), group=placed.mesh["tensor"])
        assert drawn[0] == drawn[1]
        for name, parameter in placed.named_parameters():
            if placed.pieces[name].dim is None:
                held = [torch.empty_like(parameter) for _ in range(2)]
                dist.all_gather(held, parameter.detach(), group=placed.mesh["tensor"])
                assert torch.equal(*held), name
    assert largest_difference(told[1], told[0]) < 1e-5
    without, _ = models.train_alone(family)
    assert 1e-3 < largest_difference(told[0], without) < 0.5


def test_ranks_drop_other_activations_of_their_slices(world):
    placed, drawn = place(world, models.build("bert", dropout=0.2), tensor=2, sequence=True), []
    dropout = placed.model.bert.encoder.layer[0].output.dropout
    dropout.register_forward_pre_hook(lambda *_: drawn.append(torch.get_rng_state().tolist()))
    torch.manual_seed(1)
    placed.model(**models.inputs("bert", 1))
    both = [None] * 2
    dist.all_gather_object(both, drawn, group=placed.mesh["tensor"])
    assert both[0] != both[1]


def run_file(**changes):
    train = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "learning_rate": 0.1}
    train["sequence_length"] = changes.pop("sequence_length", 24)
    model = {"task": "causal_lm", "config": {"model_type": "gpt2"}}
    sections = {"run": {"output_dir": "x"}, "data": {"train": "x"}, "model": model}
    return load({**sections, "train": train, "parallel": {"sequence": True, **changes}})


def test_lengths_that_ranks_do_not_divide_are_refused_with_the_numbers():
    assert run_file(tensor=4).parallel.sequence
    with pytest.raises(UsageError, match=r"tensor \(5\) = 5 ranks, which does not divide .*sequence_length \(24\)"):
        run_file(tensor=5)
    with pytest.raises(UsageError, match=r"context \(2\) x tensor \(8\) = 16 ranks, .*sequence_length \(24\)"):
        run_file(tensor=8, context=2)
    with pytest.raises(UsageError, match="sequence = true slices sequences between the ranks of tensor"):
        run_file()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_which_take_tokens_of_all_slices_are_refused(world, family):
    with pytest.raises(UsageError, match=f"sequence: experts of {family} take tokens of all slices; set sequence to f"):
        place(world, models.build(family), tensor=2, sequence=True)
    assert place(world, models.build(family), tensor=2).mesh.layout.tensor == 2


@pytest.mark.parametrize("name", ["input_ids", "decoder_input_ids"])
def test_a_sequence_that_ranks_do_not_divide_is_refused_with_the_numbers(world, name):
    placed, given = place(world, models.build("t5"), tensor=2, sequence=True), models.inputs("t5", 1)
    given[name] = given[name][:, :7]
    with pytest.raises(UsageError, match=r"tensor \(2\) does not divide a sequence of 7 tokens"):
        placed.model(**given)


def test_a_model_that_mixes_tokens_between_regions_is_refused(world):
    class Mixing(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.input_layernorm.register_forward_hook(lambda _, given, normed: normed - normed.mean(1, True))

    with pytest.raises(UsageError, match="llama does more between its regions than its plan says; set sequence to fal"):
        place(world, Mixing(models.config("llama")), tensor=2, sequence=True)


@pytest.mark.skipif(SIZE % 4 > 0, reason="needs ranks in fours")
def test_parts_of_sequences_are_sliced_too(world):
    """Of the context axis: half of the tokens on each of its ranks, and half of those between regions."""
    placed, seen = place(world, models.build("llama"), context=2, tensor=2, sequence=True), []
    placed.model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    placed.model(**context.inputs(models.inputs("llama", 1), placed.mesh))
    assert seen == [(models.ROWS, models.LENGTH // 4, placed.config.hidden_size)]
