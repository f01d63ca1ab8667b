"""One copy of the weights a host: the same training as everywhere, and really one copy."""

import contextlib
from types import SimpleNamespace

import models
import pytest
import torch
import torch.distributed as dist
from test_layouts import SIZE, built, check_weights, largest_difference, parallel, place, train
from torch import nn

from hpcllm.errors import UsageError
from hpcllm.mpi import numa, reduce, shared
from hpcllm.parallel import host
from hpcllm.parallel import mesh as meshes
from hpcllm.parallel.apply import apply
from hpcllm.parallel.runner import Work

pytestmark = pytest.mark.mpi
# All ranks on one host; pairs of them on NUMA nodes of their own, which are to each other as hosts are; one a host.
DOMAINS = {"one host": 1, "two domains": 2, "a rank each": SIZE}
POSSIBLE = ["one host"] + ["two domains"] * (SIZE % 2 == 0 and SIZE > 2) + ["a rank each"] * (SIZE > 1)


@pytest.fixture(params=POSSIBLE)
def domains(request, world, monkeypatch):
    monkeypatch.setattr(numa, "own_node", lambda: world.rank * 2 // SIZE if request.param == "two domains" else None)
    if request.param == "a rank each":
        monkeypatch.setattr(shared, "near", shared.Single)
        monkeypatch.setattr(reduce, "CHUNK_BYTES", 1 << 10)  # as if there were more weights than MPI can count
    return DOMAINS[request.param]


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_norms_and_weights_are_those_of_one_process(world, domains, family, checkpointing):
    expected, weights = models.train_alone(family)
    placed = place(world, models.build(family), checkpointing, sharding="host")
    assert len(placed.one_copy._near.table) == domains
    assert largest_difference(train(placed), expected) < 1e-5
    check_weights(placed, weights)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_are_divided_as_other_weights_are(world, domains, family, checkpointing):
    """Their stacks of matrices by rows of stacks: by experts."""
    expected, weights = models.train_alone(family)
    placed = place(world, models.build(family), checkpointing, sharding="host")
    assert largest_difference(train(placed), expected) < 1e-5
    check_weights(placed, weights)
    stacks = [len(part) for name, part in placed.named_parameters() if name.endswith("experts.down_proj")]
    held = torch.tensor(sum(stacks))
    dist.all_reduce(held)
    assert len(stacks) == 2 and held == 2 * 4


def test_there_is_one_copy_and_every_row_is_updated_by_one_rank(world, domains):
    placed = place(world, models.build("bert"), sharding="host")
    near = placed.one_copy._near
    weight = placed.model.get_input_embeddings().weight
    with torch.no_grad():
        world.comm.Barrier()
        if near.me == 0:
            weight[1] = 40.0 + near.table.index(near.here)
        world.comm.Barrier()
    assert weight[1].unique().tolist() == [40.0 + near.table.index(near.here)]
    held = torch.tensor([sum(part.numel() for part in placed.parameters())])
    dist.all_reduce(held)
    whole = sum(parameter.numel() for parameter in models.build("bert").parameters())
    assert held == whole
    largest = max(parameter.shape[1:].numel() for parameter in models.build("bert").parameters())
    assert abs(sum(part.numel() for part in placed.parameters()) - whole / SIZE) <= largest


class Odd(nn.Module):
    """What models of transformers do with parameters, all at once."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.words, self.padded = nn.Embedding(7, 6), nn.Embedding(5, 6, padding_idx=2)
        self.norm, self.dense, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.words.weight
        self.scale = nn.Parameter(torch.randn(6))  # of no leaf
        self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(6, 6).requires_grad_(False)
        self.sometimes, self.turn = nn.Linear(6, 6), 0
        self.config = SimpleNamespace(model_type="odd")

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        hidden = self.norm(self.words(ids) + self.padded(ids % 5)) * self.scale
        hidden = hidden + self.dense(hidden) + self.dense(hidden.tanh())  # one that is used twice
        hidden = hidden + self.frozen(hidden) + hidden @ self.dense.weight  # from outside of its module
        return self.head(hidden if self.turn % 2 else hidden + self.sometimes(hidden))


ROWS, LENGTH, EACH = 2, 9, 2  # of a micro-batch; micro-batches of a rank and step


def arithmetic(precision):
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def loss(net, number):
    ids = torch.randint(0, 7, (ROWS, LENGTH), generator=torch.Generator().manual_seed(number))
    return nn.functional.cross_entropy(net(ids).float().flatten(0, 1), ids.flatten(), reduction="sum")


def alone(precision, steps):
    """(losses and norms, gradients of each step by name) of one process."""
    model, told, gradients = Odd(), [], []
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adjust = torch.optim.SGD(wanted, lr=0.05, momentum=0.9)
    for step in range(steps):
        adjust.zero_grad(set_to_none=False)  # what is not used in a step has a gradient of zero
        total, model.turn = 0.0, step
        for number in range(step * EACH * SIZE, (step + 1) * EACH * SIZE):
            with arithmetic(precision):
                part = loss(model, number)
            (part / (ROWS * LENGTH * EACH * SIZE)).backward()
            total += part.item()
        found = {name: p.grad for name, p in model.named_parameters()}
        gradients.append({name: None if gradient is None else gradient.clone() for name, gradient in found.items()})
        told += [total, float(nn.utils.clip_grad_norm_(wanted, 0.5))]
        adjust.step()
    return told, gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_all_uses_of_a_parameter_arrive(world, domains, precision):
    steps = 3
    expected, whole = alone(precision, steps)
    section = parallel(sharding="host")
    mesh = built(meshes.layout(section, ["host"] * SIZE), world)
    placed = apply(Odd(), mesh, section, low_precision=precision == "bf16")
    adjust = torch.optim.SGD([p for p in placed.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    work = Work(
        lambda number: {"ids": number},
        lambda net, number: loss(net, number),
        lambda _: None,
        lambda: arithmetic(precision),
    )
    # bfloat16 rounds here and there as weights differ in their last bits.
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    for step in range(steps):
        adjust.zero_grad()
        placed.model.turn = step
        mine = range(step * EACH * SIZE + mesh.data.rank, (step + 1) * EACH * SIZE, mesh.data.size)
        total = torch.stack(placed.step(mine, work, float(ROWS * LENGTH * EACH * SIZE))).sum()
        dist.all_reduce(total)
        for name, part in placed.named_parameters():
            ((first, last),) = placed.pieces[name].ranges
            if name.startswith("frozen"):
                assert part.grad is None
                continue
            gradient = whole[step][name]
            gradient = torch.zeros(part.shape) if gradient is None else gradient[first:last]
            assert torch.allclose(part.grad, gradient, rtol=tolerance, atol=tolerance), (step, name)
        norm = placed.clip_gradients(0.5)
        assert largest_difference([total.item(), norm], expected[2 * step : 2 * step + 2]) < tolerance
        adjust.step()


def test_weights_in_bfloat16_are_written_once_and_those_of_the_step(world, domains):
    placed = place(world, models.build("bert"), sharding="host", low_precision=True)
    train(placed)
    placed.ready()
    one = placed.one_copy
    assert len(one._low) > 0.9 * len(one._weights)
    assert torch.equal(one._low, one._weights[: len(one._low)].bfloat16())
    if one._near.me:
        assert one._low.untyped_storage().data_ptr() != one._weights.untyped_storage().data_ptr()


def test_nothing_is_collected_for_what_is_frozen_and_it_stays(world, domains):
    model = models.build("bert")
    frozen = {
        name: p.detach().clone() for name, p in model.named_parameters() if "attention" in name or "embed" in name
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    placed = place(world, model, sharding="host", low_precision=True)
    one = placed.one_copy
    wanted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert {len(gradients) for gradients in one._gradients} == {wanted}
    before = one._weights.clone()
    train(placed)
    placed.ready()
    assert torch.equal(one._low, one._weights[: len(one._low)].bfloat16())
    for name, value in frozen.items():
        assert torch.equal(one._view(one._weights, name, value.shape), value), name
    assert (one._weights != before).any()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"tensor": 2}, "the data axis alone"), ({"backend": "gloo"}, 'needs backend = "mpi"')],
)
def test_where_it_cannot_be_it_is_refused_and_auto_is_none(world, changes, sentence):
    with pytest.raises(UsageError, match=f'sharding = "host" .*{sentence}') as refusal:
        host.resolve(parallel(**{"sharding": "host"} | changes), world)
    assert refusal.value.agreed
    assert host.resolve(parallel(sharding="auto", **changes), world).sharding == "none"
    assert host.resolve(parallel(sharding="auto"), world).sharding == "host"
    assert host.resolve(parallel(sharding="full"), world).sharding == "full"


def test_blocks_that_are_compiled_have_weights_of_their_own(world):
    with pytest.raises(UsageError, match=r'sharding = "host" goes with train\.compile = false') as refusal:
        host.resolve(parallel(sharding="host"), world, compile_blocks=True)
    assert refusal.value.agreed
    assert host.resolve(parallel(sharding="auto"), world, compile_blocks=True).sharding == "none"


def test_a_parameter_that_is_one_number_is_refused(world):
    model = models.build("bert")
    model.temperature = nn.Parameter(torch.zeros(()))
    with pytest.raises(UsageError, match="cannot divide temperature, which is one number"):
        place(world, model, sharding="host")
