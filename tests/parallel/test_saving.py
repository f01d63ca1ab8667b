"""Checkpoints know no layout: saved under one, continued under another, the same files from all."""

import itertools
import json
import math
from types import SimpleNamespace

import models
import pytest
import torch
from mpi4py import MPI
from test_layouts import SHARDINGS, SIZE, TENSOR, place, skip_what_hosts_cannot_hold
from test_layouts import whole as gathered

from hpcllm import checkpoint, config, model, optimizer, saving
from hpcllm.parallel.apply import whole

pytestmark = pytest.mark.mpi
PLAN = config.Train(max_steps=9, global_batch_size=1, micro_batch_size=1, sequence_length=8, learning_rate=1e-3)
# AdamW would make large numbers of gradients that are zero but for rounding, as that of a key's bias.
SGD = PLAN.model_copy(update={"optimizer": "sgd", "sgd_momentum": 0.9})


def step(placed, adjust, number):
    adjust.zero_grad()
    # The same samples on all ranks, so the sum of their gradients is divided.
    placed.step([number], models.work(placed.config.model_type, placed.mesh), placed.mesh.layout.data)
    adjust.step()


def trained(placed, plan=PLAN):
    adjust = optimizer.build(placed, plan)
    step(placed, adjust, 1)
    return adjust


@pytest.fixture
def folder(world, tmp_path):
    found = world.comm.bcast(tmp_path)
    if world.is_root:
        (found / "tokenizer").mkdir()
        (found / "tokenizer" / "tokenizer.json").write_text("{}")
    world.comm.Barrier()
    return found


def save(world, folder, name, placed, adjust):
    output = folder / name
    if world.is_root:
        output.mkdir()
    return saving.save(world.comm, output, 1, placed, adjust, folder / "tokenizer", {"samples": 1}, 2)


LAYOUTS = [(1, 1, tensor, sharding) for tensor in TENSOR for sharding in SHARDINGS]
LAYOUTS += [(*axes, tensor, sharding) for axes in ((2, 1), (1, 2), (2, 2)) for tensor in (1, 2)
            for sharding in ("none", "optimizer", "full") if SIZE % (math.prod(axes) * tensor) == 0
            and (sharding == "none" or math.prod(axes) * tensor < SIZE)]  # fmt: skip


def check_that_one_rank_writes(world, placed, adjust):
    """Each byte of weights and of the optimizer's state, once."""
    held = checkpoint.contents(placed, adjust)
    for file, entries in held.items():
        outline = checkpoint.outline(placed, entries)
        stretches = checkpoint.stretches(placed, entries, outline)
        mine = [(offset, offset + len(part)) for offset, part in stretches]
        at = len(outline.header)
        for begin, end in sorted(itertools.chain(*world.comm.allgather(mine))):
            assert begin == at, file
            at = end
        assert at == outline.size_bytes, file


@pytest.mark.parametrize(
    ("family", "pipeline", "context", "tensor", "sharding"),
    [(family, *layout) for family in ("gpt2", "t5") for layout in LAYOUTS
     if family != "t5" or layout[1] == 1],  # the context axis refuses T5
)  # fmt: skip
def test_all_layouts_write_the_same_files(world, folder, family, pipeline, context, tensor, sharding):
    skip_what_hosts_cannot_hold(tensor, sharding)
    how = {"pipeline": pipeline, "context": context, "tensor": tensor, "sharding": sharding}
    placed = place(world, models.build(family), **how)
    adjust = optimizer.build(placed, PLAN)
    # The optimizer's state as that of one process that has trained; every rank takes its pieces of it.
    alone = models.build(family)
    reference = trained(whole(alone))
    by_name = {name: reference.state[parameter] for name, parameter in alone.named_parameters()}
    for name, parameter in placed.named_parameters():
        state = adjust.state[parameter]
        for key, value in by_name[name].items():
            state[key] = value if key == "step" else torch.empty_like(parameter, requires_grad=False)
            if key != "step":
                local = state[key].to_local() if hasattr(state[key], "to_local") else state[key]
                for outer, inner in placed.places(placed.pieces[name], state[key]):
                    local[inner] = value[outer]
    check_that_one_rank_writes(world, placed, adjust)
    many = save(world, folder, "many", placed, adjust)
    if world.is_root:
        (folder / "one").mkdir()
        state = {"samples": 1}
        untrained = whole(models.build(family))
        renamed = SimpleNamespace(
            state={p: by_name[name] for name, p in untrained.model.named_parameters()}
        )  # its moments belong to the untrained weights
        one = saving.save(MPI.COMM_SELF, folder / "one", 1, untrained, renamed, folder / "tokenizer", state, 2)
        for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
            assert (many / name).read_bytes() == (one / name).read_bytes(), name
        checkpoint.verify(many)
        again = type(alone).from_pretrained(many, local_files_only=True)
        weights = dict(models.build(family).named_parameters())
        assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
        assert json.loads((many / "config.json").read_text())["architectures"] == [type(alone).__name__]


@pytest.mark.parametrize(("pipeline", "context", "tensor", "sharding"), LAYOUTS)
def test_what_one_layout_has_saved_another_continues(world, folder, pipeline, context, tensor, sharding):
    skip_what_hosts_cannot_hold(tensor, sharding)
    first = place(world, models.build("bert"), sharding="full")
    adjust = trained(first, SGD)
    path = save(world, folder, "run", first, adjust)
    step(first, adjust, 2)
    net = model.load(path, "masked_lm")
    second = place(world, net, pipeline=pipeline, context=context, tensor=tensor, sharding=sharding)
    again = optimizer.build(second, SGD)
    checkpoint.load_optimizer(path, second, again)
    step(second, again, 2)
    ours, theirs = (dict(placed.named_parameters()) for placed in (second, first))
    for name in second.pieces:
        here = gathered(second, name, ours[name].detach() if name in ours else None)
        there = gathered(first, name, theirs[name].detach())
        assert torch.allclose(here, there, atol=1e-6), name


@pytest.mark.skipif(SIZE < 2, reason="needs a rank that fails alone")
def test_a_rank_that_cannot_write_fails_all_and_leaves_nothing(world, folder, monkeypatch):
    from hpcllm.errors import IOFailure

    placed = place(world, models.build("bert"), sharding="full")
    adjust = trained(placed)
    if world.rank == world.size - 1:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint.os, "open", full)
    with pytest.raises(IOFailure, match="No space left on device"):
        save(world, folder, "run", placed, adjust)
    monkeypatch.undo()
    world.comm.Barrier()
    assert list((folder / "run").iterdir()) == []
