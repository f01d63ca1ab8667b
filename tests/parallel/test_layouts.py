"""One loss curve, whatever the layout: against one process, for four families of models."""

import dataclasses

import models
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM, XLNetConfig

from hpcllm.config import Parallel
from hpcllm.errors import UsageError
from hpcllm.mpi import launcher
from hpcllm.parallel import mesh as meshes
from hpcllm.parallel import pipeline as stages
from hpcllm.parallel import tensor as tensor_axis
from hpcllm.parallel.apply import apply, check
from hpcllm.parallel.apply import whole as apply_whole
from hpcllm.parallel.balance import balance
from hpcllm.parallel.regions import OwnRandomness
from hpcllm.tasks import causal_lm

pytestmark = pytest.mark.mpi
SIZE = launcher.find()[1]
SHARDINGS = ("none", "optimizer", "gradients", "full", "hybrid")
TENSOR = [size for size in (1, 2, 3, 4) if SIZE % size == 0]
# Two pretended hosts where the ranks can be dealt out to them, so that hybrid sharding has replicas.
HOSTS = [f"host{rank // (SIZE // 2)}" for rank in range(SIZE)] if SIZE % 2 == 0 else ["host"] * SIZE


def parallel(**changes):
    given = {"tensor": 1, "sequence": False, "pipeline": 1, "context": 1, "sharding": "none", "backend": "mpi"}
    given |= {"reduce_dtype": "fp32", "pipeline_schedule": "1f1b", "stages_per_rank": 1} | changes
    return Parallel.model_construct(**given)


_built = {}


def built(layout, world):
    """A Mesh, made once: its groups cost more than the tiny models."""
    if layout not in _built:
        _built[layout] = meshes.build(layout, world)
    return _built[layout]


def place(world, model, activation_checkpointing=False, source=None, low_precision=False, **changes):
    section = parallel(**changes)
    mesh = built(meshes.layout(section, HOSTS), world)
    check(model.config, mesh.layout, section.stages_per_rank, section.sequence)
    return apply(model, mesh, section, activation_checkpointing, source=source, low_precision=low_precision)


def whole(placed, name, tensor):
    """The tensor of the whole model of which this rank holds a part, or None. Collective."""
    parts = [None] * dist.get_world_size(placed.mesh.replica)
    mine = [] if tensor is None else placed.boxes(placed.pieces[name], tensor)
    dist.all_gather_object(parts, mine, group=placed.mesh.replica)
    full = torch.full(placed.pieces[name].shape, torch.nan)
    for part in parts:
        for box, values in part:
            full[box] = values
    return full


def train(placed, steps=models.STEPS, bound=1.0, lr=0.1):
    """As models.train_alone, on all ranks."""
    adjust, told = torch.optim.SGD(placed.parameters(), lr=lr), []
    data, work = placed.mesh.data, models.work(placed.config.model_type, placed.mesh)
    for step in range(steps):
        adjust.zero_grad()
        mine = range(step * models.BATCHES + data.rank, (step + 1) * models.BATCHES, data.size)
        count = models.BATCHES * models.ROWS * models.LENGTH
        total = torch.tensor([float(sum(placed.step(mine, work, count))) / count])
        dist.all_reduce(total, group=placed.mesh.losses)
        told += [total.item(), placed.clip_gradients(bound)]
        adjust.step()
    return told


def check_weights(placed, weights):
    """All of `weights`, of one process, are what ranks have of them between them."""
    held = dict(placed.named_parameters())
    for name, expected in weights.items():
        mine = held[name].detach() if name in held else None
        assert torch.allclose(whole(placed, name, mine), expected, rtol=1e-4, atol=1e-6), name


def largest_difference(told, expected):
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(told, expected, strict=True))


def skip_what_hosts_cannot_hold(tensor, sharding):
    if sharding == "hybrid" and (SIZE // len(set(HOSTS))) % tensor:
        pytest.skip("a tensor axis that crosses hosts leaves no ranks to shard over within one")


@pytest.mark.parametrize(
    ("family", "sharding"),
    [(family, sharding) for family in ("bert", "gpt2") for sharding in SHARDINGS]
    + [(family, sharding) for family in ("llama", "t5") for sharding in ("none", "full")]
    + [("mistral", "none"), ("qwen2", "none")],
)
@pytest.mark.parametrize("tensor", TENSOR)
def test_losses_norms_and_weights_do_not_depend_on_the_layout(world, family, tensor, sharding):
    skip_what_hosts_cannot_hold(tensor, sharding)
    expected, weights = models.train_alone(family)
    placed = place(world, models.build(family), tensor=tensor, sharding=sharding)
    assert largest_difference(train(placed), expected) < 1e-5
    assert list(placed.pieces) == list(weights)  # tied weights are one parameter still
    check_weights(placed, weights)


PIPELINES = [
    (pipeline, tensor, how)
    for pipeline in (2, 3, 4)
    for tensor in (1, 2)
    for how in (
        {"pipeline_schedule": "1f1b"},
        {"pipeline_schedule": "interleaved", "stages_per_rank": 2},
        {"pipeline_schedule": "zero_bubble"},
        {"sharding": "optimizer"},
        {"sharding": "full"},
        {"sharding": "full", "pipeline_schedule": "interleaved", "stages_per_rank": 2},
    )
    if SIZE % (pipeline * tensor) == 0 and ("sharding" not in how or pipeline * tensor < SIZE)
]


@pytest.mark.parametrize(("pipeline", "tensor", "how"), PIPELINES)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_layers_that_ranks_share_out_give_the_same(world, family, pipeline, tensor, how):
    stages = pipeline * how.get("stages_per_rank", 1)
    layers = -(-stages // 2) if family == "t5" else stages  # T5 has so many twice
    if family == "t5" and "sharding" in how and "stages_per_rank" in how:
        with pytest.raises(UsageError, match="share the positions' bias of t5"):
            place(world, models.build(family, layers=layers), pipeline=pipeline, tensor=tensor, **how)
        return
    expected, weights = models.train_alone(family, layers=layers)
    placed = place(world, models.build(family, layers=layers), pipeline=pipeline, tensor=tensor, **how)
    assert largest_difference(train(placed), expected) < 1e-5
    check_weights(placed, weights)


@pytest.mark.skipif(SIZE % 2 > 0, reason="needs ranks in pairs")
@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_stages_compute_in_bf16_what_one_process_does(world, family, schedule):
    def arithmetic():
        return torch.autocast("cpu", torch.bfloat16)

    work = dataclasses.replace(models.work(family), arithmetic=arithmetic)
    alone = apply_whole(models.build(family))
    placed = place(world, models.build(family), pipeline=2, pipeline_schedule=schedule)
    expected = torch.stack(alone.step(range(SIZE // 2 * 3), work, 1)).sum()
    mine = range(placed.mesh.place["data"], SIZE // 2 * 3, placed.mesh.layout.data)
    total = sum(placed.step(mine, work, 1), torch.zeros(()))
    dist.all_reduce(total, group=placed.mesh.losses)
    assert torch.allclose(total, expected, rtol=1e-6)
    # Where a gradient is rounded to bf16 depends on what is put off, its size does not.
    assert placed.clip_gradients(0) == pytest.approx(alone.clip_gradients(0), rel=1e-2)


@pytest.mark.skipif(SIZE % 2 > 0, reason="needs ranks in pairs")
@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_dropout_and_recomputation_go_with_stages(world, family, schedule):
    """Stages draw other numbers, and the same when activations are computed again."""
    told = []
    for again in (False, True):
        model = models.build(family, dropout=0.2)
        told.append(train(place(world, model, again, pipeline=2, pipeline_schedule=schedule)))
    assert largest_difference(told[1], told[0]) < 1e-5
    without, _ = models.train_alone(family)
    assert 1e-3 < largest_difference(told[0], without) < 0.5


def test_the_norm_of_a_large_gradient_is_exact():
    model = torch.nn.Linear(1024, 4096, bias=False)
    model.config = None
    model.weight.grad = torch.randn(4096, 1024) * torch.logspace(0, -6, 4096).unsqueeze(1)
    expected = float(model.weight.grad.double().norm())
    assert apply_whole(model).clip_gradients(0) == pytest.approx(expected, rel=1e-6)


@pytest.mark.skipif(SIZE < 2, reason="needs stages")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_micro_batches_will_do(world, count):
    layers, schedule = 2 * SIZE, {"pipeline_schedule": "interleaved", "stages_per_rank": 2}
    alone = apply_whole(models.build("gpt2", layers=layers))
    placed = place(world, models.build("gpt2", layers=layers), pipeline=SIZE, **schedule)
    for one in (alone, placed):
        one.step(range(count), models.work("gpt2"), 10)
    assert placed.clip_gradients(0) == pytest.approx(alone.clip_gradients(0), rel=1e-5)


def test_layers_that_are_fewer_than_stages_are_refused_with_the_numbers():
    with pytest.raises(UsageError, match="6 stages, but the model has 2 layers"):
        check(models.build("bert").config, meshes.Layout(1, 1, 3, 1, 1), 2)
    with pytest.raises(UsageError, match="plan for xlnet"):
        check(XLNetConfig(), meshes.Layout(1, 1, 2, 1, 1))


def test_a_model_that_does_more_between_its_layers_is_refused():
    class Scaled(LlamaForCausalLM):
        def forward(self, input_ids=None, inputs_embeds=None, **named):
            inputs_embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return super().forward(inputs_embeds=2 * inputs_embeds, **named)

    model = Scaled(models.config("llama"))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with pytest.raises(UsageError, match="llama does more between its layers than its plan says"):
        stages.split(model, 2, shapes)


@pytest.mark.parametrize(
    ("costs", "count", "bounds"),
    [
        ([1, 1, 1, 1], 2, [(0, 2), (2, 4)]),
        ([1, 1, 1, 4], 2, [(0, 3), (3, 4)]),  # a large head
        ([4, 1, 1, 1, 1, 4], 3, [(0, 1), (1, 5), (5, 6)]),
        ([1, 1, 1], 3, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_stages_have_about_the_same_work(costs, count, bounds):
    assert balance([(float(cost), 0.0) for cost in costs], count) == bounds


@pytest.mark.parametrize("tensor", TENSOR[-1:])
@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_recomputed_activations_change_nothing(world, family, sharding, tensor):
    expected, _ = models.train_alone(family)
    placed = place(world, models.build(family), True, tensor=tensor, sharding=sharding)
    assert largest_difference(train(placed), expected) < 1e-5


@pytest.mark.parametrize("section", [{}, {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "sequence": True}])
@pytest.mark.parametrize("sharding", ["optimizer", "gradients", "full"])
def test_shards_that_stay_in_host_memory_change_nothing(world, sharding, section):
    ranks = section.get("tensor", 1) * section.get("pipeline", 1)
    if SIZE % ranks or ranks == SIZE:
        pytest.skip("no data axis")
    placed = place(world, models.build("gpt2"), sharding=sharding, offload=True, **section)
    groups = [part.model._get_fsdp_state()._fsdp_param_group for part in placed.parts]
    assert all(parameter.offload_to_cpu for group in groups for parameter in group.fsdp_params)
    expected, weights = models.train_alone("gpt2")
    assert largest_difference(train(placed), expected) < 1e-5
    check_weights(placed, weights)


@pytest.mark.parametrize("sharding", ["none", "optimizer", "full"])
def test_gradients_that_travel_as_bf16_are_rounded_and_no_more(world, sharding):
    expected, _ = models.train_alone("bert")
    placed = place(world, models.build("bert"), sharding=sharding, reduce_dtype="bf16")
    assert 0 <= largest_difference(train(placed), expected) < 1e-2


@pytest.mark.parametrize("family", models.FAMILIES)
def test_ranks_hold_their_part_and_no_more(world, family):
    total = sum(parameter.numel() for parameter in models.build(family).parameters())
    for section in ({"sharding": "full"}, {"tensor": SIZE}):
        if models.build(family).config.num_attention_heads % SIZE:
            continue
        placed = place(world, models.build(family), **section)
        held = sum(values.numel() for name, p in placed.named_parameters()
                   for _, values in placed.boxes(placed.pieces[name], p.detach()))  # fmt: skip
        # Norms and the biases of sums stay whole; shards are rounded up to rows.
        assert held <= total / SIZE + 0.15 * total


def test_inside_a_region_ranks_draw_their_own_numbers_and_outside_the_same(world):
    torch.manual_seed(1)
    random, draws = OwnRandomness(world.rank), []
    for _ in range(2):
        random.enter()
        draws.append(float(torch.rand(())))
        random.leave()
        draws.append(float(torch.rand(())))
    first_in, first_out, second_in, second_out = zip(*world.comm.allgather(draws), strict=True)
    assert len(set(first_in)) == len(set(second_in)) == world.size
    assert len(set(first_out)) == len(set(second_out)) == 1
    assert first_in != second_in and first_out != second_out


@pytest.mark.skipif(len(TENSOR) < 2, reason="needs ranks that share layers")
@pytest.mark.parametrize("family", models.FAMILIES)
def test_dropout_is_common_outside_of_regions_and_everybodys_own_inside(world, family):
    """The model trains with dropout; all that is not cut stays the same on all ranks of the tensor axis."""
    placed = place(world, models.build(family, dropout=0.2), tensor=TENSOR[-1])
    without, _ = models.train_alone(family)
    assert 1e-3 < largest_difference(train(placed), without) < 0.5
    first = world.comm.bcast({n: p.detach() for n, p in placed.named_parameters()
                              if placed.pieces[n].dim is None}, root=0)  # fmt: skip
    for name, values in first.items():
        assert torch.equal(placed.model.get_parameter(name).detach(), values), name
    # Whether ranks of a tensor axis drew the same in the end.
    assert len(set(world.comm.allgather(int(torch.randint(1 << 40, ()))))) == placed.mesh.layout.data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor": 5}, r"tensor \(5\) x pipeline \(1\) x context \(1\) = 5 does not divide the \d ranks"),
        ({"pipeline": 7}, r"= 7 does not divide the \d ranks of this job"),
    ],
)
def test_axes_that_do_not_divide_the_ranks_are_refused_with_the_numbers(changes, words):
    with pytest.raises(UsageError, match=words):
        meshes.layout(parallel(**changes), HOSTS)


def test_heads_that_do_not_divide_are_refused_with_the_numbers():
    made = meshes.Layout(1, 1, 1, 1, 5)
    with pytest.raises(UsageError, match=r"tensor \(5\) does not divide the model's num_attention_heads \(12\)"):
        check(models.build("bert").config, made)
    made = meshes.Layout(1, 1, 1, 1, 8)
    with pytest.raises(UsageError, match=r"tensor \(8\) does not divide the model's num_key_value_heads \(12\)"):
        check(models.build("llama").config, made)


def test_a_family_without_a_plan_is_refused_by_name():
    with pytest.raises(UsageError, match="plan for xlnet"):
        check(XLNetConfig(), meshes.Layout(1, 1, 1, 1, 2))


def test_a_model_that_does_more_than_its_plan_says_is_refused(world):
    model = models.build("llama")
    model.model.layers[0].self_attn.q_norm = torch.nn.LayerNorm(2)
    with pytest.raises(UsageError, match=r"llama has model\.layers\.0\.self_attn\.q_norm, which its plan leaves out"):
        tensor_axis.split(model, world.group)

    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    model = models.build("llama")
    model.set_input_embeddings(Scaled(models.WORDS, 48))
    if 12 % world.size == 0:
        with pytest.raises(UsageError, match=r"the embedding of llama \(Scaled\) does more than look words up"):
            tensor_axis.split(model, world.group)


def test_a_plan_with_ways_to_cut_that_are_not_ours_is_refused():
    with pytest.raises(UsageError, match="the plan of qwen3_moe needs replicated_with_grad_allreduce"):
        check(models.config("qwen3_moe"), meshes.Layout(1, 1, 1, 1, 2))


EXPERTS = [
    how
    for how in (
        {},
        {"sharding": "full"},
        {"tensor": 2},
        {"tensor": 4},
        {"tensor": 2, "sharding": "optimizer"},
        {"tensor": 2, "sharding": "full"},
        {"pipeline": 2},
        {"pipeline": 2, "pipeline_schedule": "zero_bubble"},
        {"pipeline": 2, "tensor": 2},
        {"context": 2},
        {"context": 2, "tensor": 2},
    )
    if SIZE % (how.get("tensor", 1) * how.get("pipeline", 1) * how.get("context", 1)) == 0
]


@pytest.mark.parametrize("how", EXPERTS, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_that_ranks_share_out_give_the_same(world, family, how):
    expected, weights = models.train_alone(family)
    placed = place(world, models.build(family), **how)
    assert largest_difference(train(placed), expected) < 1e-5
    check_weights(placed, weights)
    stacks = [p for name, p in placed.named_parameters() if name.endswith("experts.down_proj")]
    assert {len(stack) for stack in stacks} == {4 // how.get("tensor", 1)}


@pytest.mark.skipif(2 not in TENSOR, reason="needs pairs of ranks")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["grouped_mm", "batched_mm"])
def test_experts_whom_no_token_has_chosen_hold_nobody_up(world, kind, again):
    def build():
        model = models.build("mixtral", num_experts_per_tok=1, experts_implementation=kind)
        for layer in model.model.layers:
            with torch.no_grad():  # the first or the second is always the best
                layer.mlp.gate.weight[1], layer.mlp.gate.weight[2:] = -layer.mlp.gate.weight[0], 0.0
            layer.mlp.gate.weight.requires_grad_(False)
        return model

    alone, placed = apply_whole(build()), place(world, build(), again, tensor=2)
    for one in (alone, placed):  # the same samples on all ranks, so the sum of their gradients is divided
        one.step(range(3), models.work("mixtral"), 10 * one.mesh.layout.data)
    assert placed.clip_gradients(0) == pytest.approx(alone.clip_gradients(0), rel=1e-5)


@pytest.mark.skipif(2 not in TENSOR, reason="needs pairs of ranks")
def test_experts_that_are_computed_one_by_one_are_refused(world):
    with pytest.raises(UsageError, match="mixtral computes its experts one by one here"):
        place(world, models.build("mixtral", experts_implementation="eager"), tensor=2)


@pytest.mark.parametrize("tensor", [size for size in TENSOR if size != 3])
def test_how_unevenly_experts_are_used_is_part_of_the_loss(world, tensor):
    """As transformers counts it for each micro-batch."""
    how = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    model, given = models.build("mixtral", **how), models.inputs("mixtral", 1)
    labels = given["input_ids"].roll(-1, 1)
    plain = torch.nn.functional.cross_entropy(model(**given).logits.flatten(0, 1), labels.flatten())
    expected = plain + 0.3 * model(**given).aux_loss
    expected.backward()
    work = dataclasses.replace(
        models.work("mixtral"), loss=lambda net, number: causal_lm.loss_sum(net, given, labels)[0]
    )
    for again in (False, True):
        placed = place(world, models.build("mixtral", **how), again, tensor=tensor)
        # The same samples on all ranks, so their sum is divided.
        (loss,) = placed.step([1], work, labels.numel() * placed.mesh.layout.data)
        assert loss / labels.numel() == pytest.approx(float(expected), rel=1e-6)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        assert placed.clip_gradients(0) == pytest.approx(norm, rel=1e-5)
    scored, _ = causal_lm.loss_sum(models.build("mixtral", **how), given, labels, score=True)
    assert float(scored) / labels.numel() == pytest.approx(float(plain), rel=1e-6)


def test_what_is_counted_over_all_layers_and_tokens_is_refused_in_parts():
    config = models.config("mixtral", output_router_logits=True)
    check(config, meshes.Layout(2, 1, 1, 1, 2))
    for layout, axis in ((meshes.Layout(1, 1, 2, 1, 1), "pipeline"), (meshes.Layout(1, 1, 1, 2, 1), "context")):
        with pytest.raises(UsageError, match=f"parallel: {axis} and model.config.output_router_logits: how evenly"):
            check(config, layout)
    with pytest.raises(UsageError, match=r"tensor \(8\) does not divide the model's num_key_value_heads \(4\)"):
        check(config, meshes.Layout(1, 1, 1, 1, 8))
    config.num_key_value_heads = 8
    with pytest.raises(UsageError, match=r"tensor \(8\) does not divide the model's num_local_experts \(4\)"):
        check(config, meshes.Layout(1, 1, 1, 1, 8))
