"""One loss curve, whatever the layout: against one process, for four families of models."""

from types import SimpleNamespace

import models
import pytest
import torch
import torch.distributed as dist
from transformers import MixtralConfig, XLNetConfig

from hpcllm.errors import UsageError
from hpcllm.mpi import launcher
from hpcllm.parallel import mesh as meshes
from hpcllm.parallel import tensor as tensor_axis
from hpcllm.parallel.apply import apply, check
from hpcllm.parallel.regions import OwnRandomness

pytestmark = pytest.mark.mpi
SIZE = launcher.find()[1]
SHARDINGS = ("none", "optimizer", "gradients", "full", "hybrid")
TENSOR = [size for size in (1, 2, 3, 4) if SIZE % size == 0]
# Two pretended hosts where the ranks can be dealt out to them, so that hybrid sharding has replicas.
HOSTS = [f"host{rank // (SIZE // 2)}" for rank in range(SIZE)] if SIZE % 2 == 0 else ["host"] * SIZE


def parallel(**changes):
    given = {"tensor": 1, "pipeline": 1, "context": 1, "sharding": "none", "reduce_dtype": "fp32"} | changes
    return SimpleNamespace(**given)


_built = {}


def built(layout, world):
    """A Mesh, made once: its groups cost more than the tiny models."""
    if layout not in _built:
        _built[layout] = meshes.build(layout, world)
    return _built[layout]


def place(world, model, activation_checkpointing=False, **changes):
    section = parallel(**changes)
    mesh = built(meshes.layout(section, HOSTS), world)
    check(model.config, mesh.layout)
    return apply(model, mesh, section, activation_checkpointing)


def whole(placed, name, tensor):
    """The tensor of the whole model of which this rank holds a part. Collective."""
    parts = [None] * dist.get_world_size(placed.mesh.replica)
    dist.all_gather_object(parts, placed.boxes(placed.pieces[name], tensor), group=placed.mesh.replica)
    full = torch.full(placed.pieces[name].shape, torch.nan)
    for part in parts:
        for box, values in part:
            full[box] = values
    return full


def train(placed, steps=models.STEPS, bound=1.0, lr=0.1):
    """As models.train_alone, on all ranks."""
    adjust, told = torch.optim.SGD(placed.model.parameters(), lr=lr), []
    data = placed.mesh.data
    for step in range(steps):
        adjust.zero_grad()
        total = torch.zeros(1, dtype=torch.float64)
        mine = range(step * models.BATCHES + data.rank, (step + 1) * models.BATCHES, data.size)
        for number in mine:
            torch.manual_seed(number)
            with placed.micro_batch(number == mine[-1]):
                part = models.loss(placed.replica, placed.model, number)
                part = part / (models.BATCHES * models.ROWS * models.LENGTH)
                part.backward()
            total += part.item()
        dist.all_reduce(total, group=data.group)
        told += [total.item(), placed.clip_gradients(bound)]
        adjust.step()
    return told


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
    names = [name for name, _ in placed.model.named_parameters()]
    assert names == list(weights)  # tied weights are one parameter still
    for name, parameter in placed.model.named_parameters():
        assert torch.allclose(whole(placed, name, parameter.detach()), weights[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("tensor", TENSOR[-1:])
@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_recomputed_activations_change_nothing(world, family, sharding, tensor):
    expected, _ = models.train_alone(family)
    placed = place(world, models.build(family), True, tensor=tensor, sharding=sharding)
    assert largest_difference(train(placed), expected) < 1e-5


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
        held = sum(values.numel() for name, p in placed.model.named_parameters()
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
    first = world.comm.bcast({n: p.detach() for n, p in placed.model.named_parameters()
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
    with pytest.raises(UsageError, match="the plan of mixtral needs moe_tp_experts, packed_colwise"):
        check(MixtralConfig(), meshes.Layout(1, 1, 1, 1, 2))
