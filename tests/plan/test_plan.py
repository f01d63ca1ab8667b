"""The planner's numbers against published ones and closed formulas, and its choices. No ranks, no GPU."""

import copy
import dataclasses
import functools
import json
import tomllib
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from benchmarks import plan as published
from hpcllm import __main__, config, plan
from hpcllm.errors import DataError, MissingInput, UsageError
from hpcllm.parallel import apply, mesh, schedules, vocabulary
from hpcllm.parallel.balance import balance
from hpcllm.plan import cost, count, machines, search
from hpcllm.plan.shapes import Part, Shapes

CAUSAL, MASKED = AutoModelForCausalLM, AutoModelForMaskedLM
GPT3 = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}
BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LLAMA_3_8B = {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
SMALL = {"n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 512, "vocab_size": 1024}
RUN = {
    "run": {"output_dir": "runs/a"},
    "data": {"train": "nowhere/train"},
    "model": {"task": "causal_lm", "config": {"model_type": "gpt2", **SMALL}},
    "train": {
        "max_steps": 50,
        "global_batch_size": 64,
        "micro_batch_size": 1,
        "sequence_length": 512,
        "learning_rate": 1e-3,
        "precision": "bf16",
    },
}
LLAMA_7B = ["model.config={model_type='llama', max_position_embeddings=4096}", "train.sequence_length=4096"]


def load(*overrides):
    return config.load(copy.deepcopy(RUN), overrides)


@functools.cache
def shapes(kind, family, tokens, precision="bf16", gpu=True, **given):
    return count.count(lambda: kind.from_config(AutoConfig.for_model(family, **given), dtype=torch.float32), tokens,
                       None, precision, gpu)  # fmt: skip


def work(data=1, shard=1, pipeline=1, context=1, tensor=1, **more):
    return cost.Work(mesh.Layout(data // shard, shard, pipeline, context, tensor), 8, **{"micro_batch": 1, **more})


# --- what a model holds and does -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "family", "tokens", "given", "billions"),
    [
        (CAUSAL, "gpt2", 2048, GPT3, 174.6),  # Brown et al. 2020, arXiv 2005.14165: 175 B
        (MASKED, "bert", 512, BERT_LARGE, 0.335),  # Devlin et al. 2019, arXiv 1810.04805: 340 M, with the pooler
        (CAUSAL, "llama", 2048, {}, 6.738),  # Touvron et al. 2023, arXiv 2307.09288: 6.7 B
        (CAUSAL, "llama", 2048, LLAMA_3_8B, 8.030),
        (AutoModelForSeq2SeqLM, "t5", 512, {}, 0.0605),  # Raffel et al. 2020, arXiv 1910.10683: 60 M
    ],
)
def test_parameters_are_those_that_were_published(kind, family, tokens, given, billions):
    assert shapes(kind, family, tokens, **given).parameters == pytest.approx(billions * 1e9, rel=1e-3)


@pytest.mark.parametrize(("kind", "family"), [(CAUSAL, "gpt2"), (MASKED, "bert"), (CAUSAL, "llama")])
def test_every_parameter_counts_once(kind, family):
    made = AutoConfig.for_model(family, num_hidden_layers=2, vocab_size=100)
    with torch.device("meta"):
        parameters = kind.from_config(made).parameters()
    counted = count.count(lambda: kind.from_config(made, dtype=torch.float32), 16)
    assert counted.parameters == sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("gpu", [True, False])
def test_operations_are_those_of_the_formula(gpu):
    # Narayanan et al. 2021, arXiv 2104.04473: 24 s h^2 + 4 s^2 h a layer, 2 s h V for the logits.
    tokens, hidden = 512, 256
    counted = shapes(CAUSAL, "gpt2", tokens, gpu=gpu, **SMALL)
    assert {block.flops for block in counted.blocks} == {24 * tokens * hidden**2 + 4 * tokens**2 * hidden}
    assert counted.last.flops == 2 * tokens * hidden * 1024


def test_grouped_heads_and_gates_are_counted():
    tokens, hidden, feed = 2048, 4096, 14336
    matrices = 2 * hidden**2 + 2 * hidden * 1024 + 3 * hidden * feed
    block = shapes(CAUSAL, "llama", tokens, **LLAMA_3_8B).blocks[0]
    assert block.flops == 2 * tokens * matrices + 4 * tokens**2 * hidden
    assert block.cut == matrices


def test_only_targets_reach_the_vocabulary():
    settings = load("model.task=masked_lm", "model.config={model_type='bert'}")
    counted = plan.shapes_of(settings, AutoConfig.for_model("bert"))
    assert counted.logits == round(0.15 * 512) * 30522


def test_what_is_frozen_has_neither_gradient_nor_state():
    told = load("model.task=masked_lm", "model.config={model_type='bert'}", "parallel.sharding=none")
    frozen = load(
        "model.task=masked_lm", "model.config={model_type='bert'}", "parallel.sharding=none", "model.freeze=['bert.*']"
    )
    whole, part = (plan.shapes_of(run, AutoConfig.for_model("bert")) for run in (told, frozen))
    work = cost.work(told, mesh.layout(told.parallel, ["a"]), 1)
    all_of_it, some = cost.memory(whole, work), cost.memory(part, work)
    head = 768 * 768 + 3 * 768 + 30522
    assert some.weights == all_of_it.weights and some.optimizer == pytest.approx(8 * head)
    assert some.gradients == pytest.approx(all_of_it.gradients * head / whole.parameters)


def test_what_autograd_keeps_is_the_formula_in_our_precisions():
    # Korthikanti et al. 2022, arXiv 2205.05198: 34 s b h without attention's matrix, 10 of it whole. Here norms take
    # fp32 (4 + 4, not 2 + 2), and query, key and value each a bf16 copy of their own (6, not 2): whole are 18, with the
    # input of the feed forward (2) and two masks (1 + 1). Divided are its 24: attention 8, feed forward 8 + 8.
    tokens, hidden = 512, 1024
    block = shapes(MASKED, "bert", tokens, **BERT_LARGE).blocks[1]
    each = (block.saved + block.saved_cut) / (tokens * hidden)
    assert each == pytest.approx(42, rel=0.01)
    assert block.saved_cut / (tokens * hidden) == pytest.approx(24, rel=0.01)  # the paper's 24 / t


def test_slices_divide_all_that_blocks_keep():
    # The same sum / t (table 2 there), with norms in fp32 (+ 4); query, key and value share a copy.
    tokens, hidden, ranks = 512, 1024, 8
    block = shapes(MASKED, "bert", tokens, **BERT_LARGE).blocks[1]
    each = tokens * hidden / ranks
    assert block.kept(ranks, sliced=True) / each == pytest.approx(38, rel=0.01)
    assert block.gathered == 2 * 2 * tokens * hidden and block.entered == (6 + 2) * tokens * hidden
    # Computed again, what two regions have gathered is whole.
    assert block.kept(ranks, sliced=True, again=True) == block.kept(ranks, sliced=True) + 7 / 8 * block.gathered
    single = shapes(MASKED, "bert", tokens, precision="fp32", **BERT_LARGE).blocks[1]
    assert single.kept(ranks, sliced=True) == (single.saved + single.saved_cut) / ranks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "family"), [(CAUSAL, "gpt2"), (MASKED, "bert"), (CAUSAL, "llama")])
def test_what_is_counted_is_what_autograd_keeps_here(kind, family, precision):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    made = AutoConfig.for_model(family, **sizes)
    model = kind.from_config(made, dtype=torch.float32).train()
    weights, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
        model(input_ids=torch.zeros(2, 24, dtype=torch.int64), **({"use_cache": False} if kind is CAUSAL else {}))
    counted = count.count(lambda: kind.from_config(made, dtype=torch.float32), 24, None, precision, gpu=False)
    parts = (counted.first, *counted.blocks, counted.last)
    activations = 2 * sum(part.saved + part.saved_cut for part in parts)
    copies = sum(part.copies + part.copies_cut for part in parts)
    there = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # A norm's means and variances may be of another precision where there are numbers.
    assert activations + copies == pytest.approx(there, rel=1e-4)


def test_without_fused_attention_its_matrix_is_kept():
    tokens, heads = 512, 8
    matrix = heads * tokens**2
    fused, plain = (shapes(CAUSAL, "gpt2", tokens, gpu=gpu, **SMALL).blocks[0].saved_cut for gpu in (True, False))
    assert plain - fused > 8 * matrix


def test_weights_in_bf16_are_kept_for_backward_and_not_in_fp32():
    half, single = (shapes(CAUSAL, "gpt2", 512, precision=kind, **SMALL).blocks[0] for kind in ("bf16", "fp32"))
    assert half.copies_cut == 2 * 12 * 256**2 and half.copies == 0
    assert single.copies + single.copies_cut == 0


def test_what_the_tensor_axis_cuts_is_what_the_model_is_cut_into():
    from hpcllm.parallel import tensor

    model = CAUSAL.from_config(AutoConfig.for_model("gpt2", **SMALL))
    parameters = dict(model.named_parameters())
    cut = {
        name for name in parameters for pattern in tensor.PLANS["gpt2"] if tensor.fnmatch.fnmatch(name, f"{pattern}.*")
    }
    cut = {name for name in cut if not name.endswith("c_proj.bias")}
    counted = shapes(CAUSAL, "gpt2", 512, **SMALL)
    assert sum(block.cut for block in counted.blocks) == sum(parameters[name].numel() for name in cut)
    # Two sums a layer in forward, in bf16, and two in backward, in the fp32 of what is between layers.
    assert counted.blocks[0].sums == 2 * 2 * 512 * 256 and counted.blocks[0].sums_back == 2 * 4 * 512 * 256


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharding", "each"),
    [("none", 16), ("optimizer", 8 + 12 / 4), ("gradients", 4 + 16 / 4), ("full", 16 / 4)],
)
def test_bytes_a_parameter_are_those_of_the_documentation(sharding, each):
    counted = shapes(CAUSAL, "gpt2", 512, precision="fp32", **SMALL)
    # "none" with one micro-batch: more of them add up beside DDP's buckets.
    many = 1 if sharding == "none" else 2
    memory = cost.memory(counted, work(4, 1 if sharding == "none" else 4, sharding=sharding, micro_batches=many))
    held = memory.weights + memory.gradients + memory.optimizer
    block = 4 * counted.blocks[0].parameters
    outside = 4 * counted.parameters - 4 * block
    # Beside what is divided: what is gathered while it computes, its gradients, and a copy of them on its way.
    more = {"none": 0, "optimizer": block, "gradients": 2 * block + outside, "full": 4 * block + 2 * outside}[sharding]
    assert each * counted.parameters <= held <= each * counted.parameters + more


def test_gradients_of_several_micro_batches_lie_beside_the_buckets():
    counted = shapes(CAUSAL, "gpt2", 512, precision="fp32", **SMALL)
    one, two = (cost.memory(counted, work(4, micro_batches=many)) for many in (1, 2))
    assert two.gradients == 2 * one.gradients == 8 * counted.parameters


def test_the_tensor_axis_divides_what_it_cuts_alone():
    counted = shapes(CAUSAL, "gpt2", 512, precision="fp32", **SMALL)
    alone, cut = (cost.memory(counted, work(tensor=size)) for size in (1, 4))
    whole = 512 * 256 + 4 * (2 + 2 + 2) * 256 + 2 * 256  # positions; norms and biases of sums; the last norm
    assert cut.weights == 4 * (whole + (counted.parameters - whole) / 4)
    divided = sum(block.saved_cut for block in counted.blocks)
    assert alone.activations - cut.activations == pytest.approx(0.75 * divided)
    assert alone.logits / 4 == cut.logits == cost.LOGITS_BYTES * 512 * 1024 / 4


def test_the_first_stage_holds_as_many_micro_batches_as_there_are_stages():
    first, last = (cost.under_way(work(pipeline=4, micro_batches=8), rank) for rank in (0, 3))
    assert (first, last) == (4, 1)
    assert cost.under_way(work(pipeline=4, micro_batches=2), 0) == 2
    interleaved = work(pipeline=4, micro_batches=64, schedule="interleaved", stages_per_rank=2)
    assert cost.under_way(interleaved, 0) == 4 * (1 + 3 / (4 * 2))  # arXiv 2205.05198, 4.2.3


def test_tied_embeddings_are_held_by_first_and_last_stage():
    counted = shapes(CAUSAL, "gpt2", 512, **SMALL)
    held = [stage.blocks.parameters + stage.outside.parameters for stage in cost.stages(counted, 4)]
    assert sum(held) == counted.parameters + 1024 * 256
    assert min(held[0], held[3]) > max(held[1], held[2])


def test_checkpointing_keeps_what_enters_each_block_and_one_block():
    counted = shapes(CAUSAL, "gpt2", 512, precision="fp32", **SMALL)
    kept = cost.memory(counted, work(checkpointing=True)).activations
    outside = counted.first.saved + counted.last.saved + counted.first.saved_cut + counted.last.saved_cut
    block = counted.blocks[0]
    assert kept == 4 * 4 * 512 * 256 + outside + block.saved + block.saved_cut


@pytest.mark.parametrize(
    ("costs", "stages", "counts"),
    [([1] * 8, 4, [2, 2, 2, 2]), ([1, 1, 1, 1, 3], 2, [4, 1]), ([5, 1, 1, 1], 3, [1, 2, 1]), ([1, 1], 2, [1, 1])],
)
def test_stages_get_like_work(costs, stages, counts):
    found = [stop - start for start, stop in balance([(cost,) for cost in costs], stages)]
    assert sum(found) == len(costs) and min(found) > 0

    def largest(counts):
        return max(sum(costs[sum(counts[:n]) : sum(counts[: n + 1])]) for n in range(stages))

    assert largest(found) == largest(counts)


# --- time ----------------------------------------------------------------------------------------------------------


def test_published_runs_are_predicted():
    fitted = [abs(published.error(make(published.PASSES))) for make in published.TABLE_1]
    others = [abs(published.error(row)) for row in published.others()]
    assert sum(fitted) / len(fitted) < 0.05 and max(fitted) < 0.15
    assert sum(others) / len(others) < 0.15 and max(others) < 0.25


@pytest.mark.parametrize(("schedule", "stages"), [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)])
def test_the_bubble_is_that_of_the_schedule_played_through(schedule, stages):
    counted = shapes(CAUSAL, "gpt2", 512, **SMALL)
    made = work(pipeline=2, micro_batches=8, schedule=schedule, stages_per_rank=stages)
    spent, _ = cost.time(counted, machines.find("a100"), made)
    busy = spent.products + spent.traffic + spent.calls + spent.tensor + spent.pipeline
    played = schedules.bubble(schedule, 2, stages, 8)
    assert spent.bubble / (busy + spent.bubble) == pytest.approx(played)


def test_bytes_on_the_axes_are_those_of_the_documentation():
    one = Part(parameters=1000, cut=800, flops=1e9, entering=64, meetings=4)
    one = dataclasses.replace(one, sums=100, sums_back=200, gathered=90, keys=80)
    counted = Shapes(Part(parameters=10), (one,) * 4, Part(parameters=10), 0, 0, 64, 32)
    a100, whole = machines.find("a100"), 4 * 4020

    def sent(**given):
        return cost.time(counted, a100, work(micro_batches=3, **given))[1]

    assert sent(data=4).data == pytest.approx(2 * 3 / 4 * whole)
    assert sent(data=4, shard=4, sharding="optimizer").data == pytest.approx(2 * 3 / 4 * whole)
    assert sent(data=4, shard=4, sharding="gradients").data == pytest.approx(3 * 2 * 3 / 4 * whole)
    assert sent(data=4, shard=4, sharding="full").data == pytest.approx(3 * 3 * 3 / 4 * whole)
    assert sent(tensor=4).tensor == pytest.approx(3 * 4 * 2 * 3 / 4 * (100 + 200))
    assert sent(tensor=4, checkpointing=True).tensor == pytest.approx(3 * 4 * 2 * 3 / 4 * (2 * 100 + 200))
    assert sent(pipeline=2).pipeline == 3 * 2 * 64
    # Gathered, scattered and gathered again; both ends of the blocks, and of each stage's messages, which are slices.
    gathered = 3 * 4 * 3 / 4 * (2 * 100 + 3 * 90)
    assert sent(tensor=4, sequence=True).tensor == pytest.approx(gathered + 3 * 3 / 4 * 2 * 64)
    gathered = 3 * 4 * 3 / 4 * (3 * 100 + 3 * 90)
    assert sent(tensor=4, sequence=True, checkpointing=True).tensor == pytest.approx(gathered + 3 * 3 / 4 * 2 * 64)
    both = sent(tensor=4, sequence=True, pipeline=2)
    assert both.tensor == pytest.approx(3 * 2 * 3 / 4 * (2 * 100 + 3 * 90) + 3 * 3 / 4 * 4 * 64)
    assert both.pipeline == 3 * 2 * 64 / 4
    # A part is a fourth, which goes to three others: keys and values in forward, their gradients in backward.
    assert sent(context=4).context == 3 * 4 * 2 * 3 * 80 / 4
    assert sent(context=4, checkpointing=True).context == 3 * 4 * 3 * 3 * 80 / 4
    assert sent(context=4, tensor=2).context == 3 * 4 * 2 * 3 * 80 / 4 / 2
    assert sent(context=4, tensor=2).tensor == sent(tensor=2).tensor / 4
    assert sent(context=4, pipeline=2).pipeline == 3 * 2 * 64 / 4
    # Of a part there are slices.
    both, slices = (sent(**size, tensor=4, pipeline=2, sequence=True) for size in ({"context": 2}, {}))
    assert both.tensor == slices.tensor / 2 and both.pipeline == slices.pipeline / 2
    assert both.context == sent(context=2, tensor=4, pipeline=2).context == 3 * 2 * 2 * 80 / 2 / 4
    assert sent(context=4).data == sent(data=4).data  # of the same weights
    assert sent(context=2, data=4, shard=2, sharding="full").data == pytest.approx(3 * (3 / 2 + 2 * 3 / 4 / 2) * whole)


def test_a_part_of_a_sequence_takes_as_much_less_but_keys_and_masks():
    one = Part(saved=1000, saved_cut=4000, entering=64, attended=400, masks=96)
    assert one.kept(2, 1) == 1000 + 2000
    assert one.kept(2, 4) == (1000 + 2000) / 4 + 400 * 3 / 4 / 2 + 96 / 4
    one = dataclasses.replace(one, entered=200, gathered=100)
    assert one.kept(2, 4, True) == one.kept(2, 1, True) / 4 + 400 * 3 / 4 / 2 + 96 / 4
    assert one.kept(2, 4, True, again=True) == one.kept(2, 4, True) + 100 / 2 / 4
    counted = shapes(CAUSAL, "llama", 4096, num_hidden_layers=2)
    whole, parts = (cost.memory(counted, work(context=context)) for context in (1, 4))
    assert (parts.weights, parts.gradients, parts.optimizer) == (whole.weights, whole.gradients, whole.optimizer)
    assert parts.logits == whole.logits / 4
    whole, parts = (cost.time(counted, machines.find("a100"), work(context=context))[0] for context in (1, 4))
    assert parts.products == whole.products / 4 and parts.context > 0 == whole.context


def test_keys_that_queries_share_travel_once():
    # Llama 3 8B: 8 heads of 128 numbers, keys and values; rotated keys are fp32, and both travel so; 32 heads attend in
    # bf16. GPT-2 shares none and rotates none.
    block = shapes(CAUSAL, "llama", 2048, **LLAMA_3_8B).blocks[1]
    assert (block.keys, block.attended, block.attentions) == (2048 * 2 * 8 * 128 * 4, 2048 * 2 * 32 * 128 * 2, 1)
    assert block.masks == 2048**2 * 2
    block = shapes(CAUSAL, "gpt2", 512, **SMALL).blocks[1]
    assert block.keys == block.attended == 512 * 2 * 256 * 2


def test_a_ring_over_nodes_is_as_fast_as_its_share_of_the_network():
    a100 = machines.find("a100")

    def share(size, stride):
        return cost.bandwidth(a100, work(), (size, stride)) / cost.LINK

    assert cost.bandwidth(a100, work(), (4, 4), (2, 2)) == share(8, 2) * cost.LINK  # of a node 2 x 2 ranks
    assert share(8, 1) == a100.link
    assert share(16, 1) == 8 * a100.network  # all adapters of a node carry one ring
    assert share(16, 8) == a100.network


# --- machines ------------------------------------------------------------------------------------------------------


def test_an_unknown_gpu_lists_those_that_are_known():
    with pytest.raises(UsageError, match=r'"a1000" is not known \(did you mean "a100"\?\); known: a100, .*mi250x.*cpu'):
        machines.find("a1000")


def doctor(gpu, between, bandwidth):
    rank = {"flops": {"fp32": 50e12, "bf16": 600e12}, "gpu": gpu}
    links = [{"a": 0, "b": 1, "bandwidth_bytes_per_s": bandwidth}]
    return {"facts": {"ranks": [rank], "links": links, "between": between}}


def test_what_was_measured_counts_instead_of_data_sheets():
    found = machines.measured(machines.find("h100"), doctor({"index": 0}, "host", 20e9))
    assert found.bf16 * found.products == pytest.approx(600e12)
    assert found.network == 20e9 and found.link == machines.find("h100").link
    mi250x = machines.measured(machines.find("mi250x"), doctor({"index": 0}, "rank", 1e9))
    assert (mi250x.link, mi250x.network) == (50e9, 12.5e9)  # measured in host memory, not between GPUs
    with pytest.raises(DataError, match="not what `hpcllm doctor --json` prints"):
        machines.measured(machines.find("h100"), {"findings": []})


# --- layouts -------------------------------------------------------------------------------------------------------


def searched(settings, gpu, nodes, each):
    made = plan.model.configuration(settings.model)
    return search.search(settings, made, plan.shapes_of(settings, made), machines.find(gpu), nodes, each)


def test_every_layout_that_is_offered_would_run():
    settings = load("train.global_batch_size=24")
    found = searched(settings, "a100", 3, 4)
    made = plan.model.configuration(settings.model)
    assert len(found.options) > 50
    assert {option.work.layout.tensor for option in found.options} == {1, 2, 4}  # 8 heads: neither 3, 6 nor 12
    for option in found.options:
        parallel = option.config.parallel
        layout = mesh.layout(parallel, [f"n{host}" for host in range(3) for _ in range(4)])
        apply.check(made, layout, parallel.stages_per_rank)
        assert layout == option.work.layout and layout.size == 12
        assert option.config.train.accumulation(layout.data) == option.work.micro_batches >= layout.pipeline
        assert option.memory.total <= search.USABLE * machines.find("a100").memory
        assert option.volume.data >= 0 and option.time.step > 0


def test_sequences_are_shared_out_where_they_are_long_and_the_model_allows():
    def shared(tokens, made=None):
        return search._parts(made or AutoConfig.for_model("llama"), tokens)

    assert shared(1024) == shared(2047) == [1] and shared(4096) == [1, 2, 4] and shared(3 * 4096) == [1, 2, 4, 8]
    assert shared(2050) == [1]  # four chunks do not divide it
    assert shared(4096, AutoConfig.for_model("t5")) == [1]


def test_a_sequence_that_is_too_long_for_a_gpu_is_shared_out():
    model = "model.config={model_type='llama', max_position_embeddings=131072, num_hidden_layers=8, "
    model += "num_attention_heads=2, num_key_value_heads=2, hidden_size=2048, intermediate_size=8192}"
    long = [model, "train.sequence_length=65536", "train.global_batch_size=1"]
    found = searched(load(*long), "a100", 1, 8)
    best = found.options[0].work.layout
    assert best.context > 1 and best.data * best.pipeline == 1
    assert {True, False} == {option.work.sequence for option in found.options if option.work.layout.context == 4}
    assert all(option.work.layout.size == 8 for option in found.options)
    for option in found.options:
        assert option.config.parallel.context == option.work.layout.context


def test_a_model_that_fits_is_left_whole():
    best = searched(load(), "h100", 1, 8).options[0]
    assert best.work.layout.describe() == "data 8" and best.work.sharding == "none" and not best.work.checkpointing


def test_a_model_that_is_too_large_for_one_gpu_is_divided():
    found = searched(load(*LLAMA_7B), "a100", 1, 8)
    for option in found.options:
        made = option.work.layout
        assert made.shard * made.tensor * made.pipeline > 1  # 16 bytes x 6.7 G are 108 GB
    assert found.refused["memory"] > 0


def test_slices_are_offered_where_a_tensor_axis_divides_the_tokens():
    found = searched(load("train.sequence_length=500"), "a100", 1, 8)
    sliced = {option.work.layout.tensor for option in found.options if option.work.sequence}
    assert sliced == {2, 4}
    assert any("slices a sequence" in example and "(500)" in example for example in found.examples.values())
    assert {option.config.parallel.sequence for option in found.options if option.work.sequence} == {True}
    # With them fits what does not without.
    llama = searched(load(*LLAMA_7B, "train.global_batch_size=1"), "a100-40", 1, 8)
    least = {sequence: min(option.memory.activations for option in llama.options if option.work.sequence == sequence
                           and option.work.layout.tensor == 8) for sequence in (False, True)}  # fmt: skip
    assert least[True] < least[False]


def test_times_that_are_alike_are_led_by_the_simplest():
    def option(seconds, axes):
        return SimpleNamespace(time=SimpleNamespace(step=seconds), simplicity=(axes,))

    fast, simple, slow = option(1.0, 2), option(1.04, 1), option(1.06, 0)
    assert search.ordered([slow, fast, simple]) == [simple, fast, slow]


def test_what_fits_nowhere_is_refused_with_the_numbers():
    with pytest.raises(
        UsageError, match=r"no layout of 2 x a100-40 .*6.74 G parameters need at least 5\d.\d GiB a rank"
    ):
        plan.plan(load(*LLAMA_7B), 1, 2, "a100-40")


def test_a_batch_that_no_layout_divides_is_refused_as_such():
    with pytest.raises(UsageError, match=r"no layout of 7 x a100 .* refused like: .*\d"):
        plan.plan(load("train.global_batch_size=1"), 1, 7, "a100")


def test_a_sequence_longer_than_the_model_is_refused():
    with pytest.raises(UsageError, match=r"sequence_length \(1024\) is more than the model's max_position_embeddings"):
        plan.plan(load("train.sequence_length=1024"), 1, 8, "a100")


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(load().toml())
    return path


def test_the_table_explains_itself_and_the_file_that_is_written_is_a_run_file(run_file, tmp_path, capsys):
    written = tmp_path / "planned.toml"
    asked = ["plan", str(run_file), "--nodes", "2", "--gpus-per-node", "4", "--gpu", "h100", *LLAMA_7B]
    __main__.main([*asked, "--output", str(written)])
    told = capsys.readouterr().out
    assert told.startswith("8 x h100 (2 nodes of 4), 6,738.4 M parameters, bf16, 64 sequences of 4096 tokens a step")
    for start in ("Why: ", "What limits it: ", "Runner-up: "):
        assert sum(line.startswith(start) for line in told.splitlines()) == 1
    settings = config.load(written)
    lines = told[told.index("[parallel]") :]
    for section, values in tomllib.loads(lines).items():
        for key, value in values.items():
            assert getattr(getattr(settings, section), key) == value
    assert settings.model == load(*LLAMA_7B).model
    with pytest.raises(SystemExit) as refused:
        __main__.main([*asked, "--output", str(written)])
    assert refused.value.code == 73 and "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (["--gpu", "a100"], 2, "--gpu needs --nodes and --gpus-per-node"),
        (["--gpu", "a100", "--nodes", "1", "--gpus-per-node", "0"], 2, "count from 1"),
        (["--gpu", "abacus", "--nodes", "1", "--gpus-per-node", "1"], 2, "known: a100"),
        (
            ["--gpu", "a100", "--nodes", "1", "--gpus-per-node", "1", "--measured", "nowhere"],
            66,
            "nowhere does not exist",
        ),
    ],
)
def test_bad_arguments_are_a_sentence(run_file, capsys, given, code, words):
    with pytest.raises(SystemExit) as refused:
        __main__.main(["plan", str(run_file), *given])
    assert refused.value.code == code and words in capsys.readouterr().err


def test_a_measured_machine_is_planned_for(run_file, tmp_path, capsys):
    slow = doctor({"index": 0}, "host", 1e9)
    slow["facts"]["ranks"][0]["flops"]["bf16"] = 1e12
    (tmp_path / "doctor.json").write_text(json.dumps(slow))
    sheet, _ = plan.plan(load(), 2, 2, "h100")
    measured, _ = plan.plan(load(), 2, 2, "h100", tmp_path / "doctor.json")
    assert "% of the peak" in measured and sheet != measured
    (tmp_path / "doctor.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        plan.plan(load(), 2, 2, "h100", tmp_path / "doctor.json")
    with pytest.raises(MissingInput):
        plan.plan(load(), 2, 2, "h100", tmp_path / "nowhere")


def test_the_plan_knows_how_many_logits_exist_at_once():
    assert cost.LOGITS_AT_ONCE == 16 * vocabulary.LOGITS_AT_ONCE  # of a GPU, where the loss takes 16 times as many
