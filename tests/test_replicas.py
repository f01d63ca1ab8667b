"""Ranks that hold the same: one flipped bit is found, its rank and its parameter named, and never saved."""

import json
import random

import pytest
import torch
from test_train import settings, shared

from hpcllm import checkpoint, replicas, train
from hpcllm.errors import Corrupted
from hpcllm.mpi import launcher
from hpcllm.mpi import shared as memory
from hpcllm.parallel.sharding import local

SIZE = launcher.find()[1]
CUT, UNCUT = "bert.encoder.layer.1.attention.self.query.weight", "bert.encoder.layer.1.output.LayerNorm.weight"
MOMENT = f"{CUT}.exp_avg_sq"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize("length", [1, 3, 8, 1001, (1 << 16) + 5])
def test_every_flipped_bit_gives_another_digest(dtype, length):
    draw = random.Random(length)
    tensor = torch.randint(0, 255, (length,)).to(dtype)
    known = replicas.digest(tensor)
    assert replicas.digest(tensor.clone()) == known and 0 <= known < 1 << 64
    raw = tensor.view(torch.uint8)
    for _ in range(50):
        at, bit = draw.randrange(len(raw)), 1 << draw.randrange(8)
        raw[at] ^= bit
        assert replicas.digest(tensor) != known
        raw[at] ^= bit
    assert replicas.digest(tensor) == known


def test_what_changes_places_gives_another_digest_wherever_it_lies():
    rows = torch.randn(4, 1 << 17)  # a row of words each
    known = replicas.digest(rows)
    assert replicas.digest(rows[[1, 0, 2, 3]]) != known
    swapped = rows.clone()
    swapped[0, [2, 3, 8, 9]] = rows[0, [8, 9, 2, 3]]  # words
    assert replicas.digest(swapped) != known
    assert replicas.digest(torch.tensor([0.0])) != replicas.digest(torch.tensor([-0.0]))
    # Nor does it matter how a tensor lies in memory: replicas need not have it alike.
    apart = torch.empty(rows.numel() + 1)[1:].view(rows.shape).copy_(rows)
    assert apart.storage_offset() % 2 and replicas.digest(apart) == known
    assert replicas.digest(rows.t().contiguous().t()) == known


@pytest.mark.parametrize("rows", [0.1, 1, 3.5, 700.25])
def test_gpus_have_the_digests_of_cpus(rows, monkeypatch):
    monkeypatch.setattr(replicas, "_WORDS", 64)
    words = torch.randint(-(1 << 62), 1 << 62, (int(64 * rows),))
    factors = 2 * torch.randint(-(1 << 62), 1 << 62, (64,)) + 1
    assert list(replicas._one_by_one(words, factors)) == list(replicas._many_at_once(words, factors))


def test_the_few_are_named_and_where_there_are_no_few_all():
    def everybody(**of_ranks):
        return [{("alike", name): numbers[rank] for name, numbers in of_ranks.items()} for rank in range(4)]

    assert replicas.suspects(everybody(a=[1, 1, 1, 1], b=[5, 5, 6, 5])) == ({2: "b"}, True)
    assert replicas.suspects(everybody(a=[1, 2, 1, 1], b=[5, 5, 6, 5])) == ({1: "a", 2: "b"}, True)
    assert replicas.suspects(everybody(a=[1, 1, 2, 2])) == (dict.fromkeys(range(4), "a"), False)
    # What has come of it elsewhere tells nobody apart, and does not hide what does.
    assert replicas.suspects(everybody(a=[1, 2, 1, 2], b=[5, 6, 5, 7])) == ({1: "b", 3: "b"}, True)
    assert replicas.differing([{"a": 1}, {"b": 2}, {"a": 1}]) == {}
    text = replicas.describe({1: "a"}, True, 40, ["n0", "n1"])
    assert "step 40" in text and "rank 1 (n1) first in a" in text
    many = replicas.describe(dict.fromkeys(range(20), "a"), False, 40, ["n"] * 20)
    assert "nothing tells" in many and "rank 7 (n)" in many and "and 12 more" in many


def flipping(world, monkeypatch, rank, after, name):
    """From step `after` on `rank` has another bit in parameter `name`, or in a moment of it."""
    one_step, steps = train.one_step, []

    def flipped(placed, adjust, *rest):
        found = one_step(placed, adjust, *rest)
        steps.append(None)
        if len(steps) == after and world.rank == rank:
            placed.reshard()
            held = dict(placed.named_parameters())
            tensor = (
                held[name] if name in held else adjust.state[held[name.rpartition(".")[0]]][name.rpartition(".")[2]]
            )
            local(tensor.detach()).view(-1).view(torch.int32)[-2:].bitwise_xor_(1)
        return found

    monkeypatch.setattr(train, "one_step", flipped)


# How ranks are laid out, which of them is corrupted where, and which must be named: those that hold the same.
LAYOUTS = [
    ({"parallel.sharding": "none"}, CUT, SIZE - 1, [SIZE - 1] if SIZE > 2 else [0, 1], 2),
    ({"parallel.sharding": "none"}, MOMENT, 0, [0] if SIZE > 2 else [0, 1], 2),
]
if SIZE % 2 == 0:
    LAYOUTS += [({"parallel.sharding": "none", "parallel.tensor": 2}, UNCUT, 1, [1] if SIZE > 2 else [0, 1], 2)]
if SIZE == 4:
    LAYOUTS += [
        ({"parallel.sharding": "none", "parallel.tensor": 2}, CUT, 1, [1, 3], 4),
        ({"parallel.sharding": "full", "parallel.tensor": 2}, UNCUT, 2, [2, 3], 4),
        ({"parallel.sharding": "none", "parallel.pipeline": 2}, CUT, 3, [1, 3], 4),
        ({"parallel.sharding": "full", "parallel.context": 2}, CUT, 1, [0, 1], 4),
        ({"parallel.sharding": "none", "parallel.context": 2}, CUT, 2, [2], 4),
    ]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("layout", "name", "rank", "named", "size"), LAYOUTS)
def test_a_flipped_bit_is_found_its_rank_named_and_nothing_saved_after_it(
    world, prepared, tmp_path, monkeypatch, layout, name, rank, named, size
):
    base = shared(world, tmp_path)
    how = {**layout, "checkpoint.every_steps": 2, "checkpoint.keep": 9, "train.check_replicas_every_steps": 1}
    whole = settings(prepared, base / "whole", **how)
    train.train(whole, world)  # without a false alarm
    run = settings(prepared, base / "run", **how)
    with monkeypatch.context() as patch:
        flipping(world, patch, rank, 4, name)
        with pytest.raises(Corrupted, match=rf"step 4: .*{name}.*newest checkpoint: .*checkpoint-2; ") as found:
            train.train(run, world)
    assert found.value.tensors == dict.fromkeys(named, name) and found.value.code == 75 and found.value.agreed
    assert ("nothing tells" in str(found.value)) == (len(named) > 1)
    world.comm.Barrier()
    assert [path.name for path in checkpoint.find(base / "run")] == ["checkpoint-2"]
    events = [json.loads(line) for line in (base / "run" / "events.jsonl").read_text().splitlines()]
    [event] = [event for event in events if event["event"] == "corrupted"]
    assert event["step"] == 4 and event["ranks"] == [[rank, world.host, name] for rank in named]
    # What was right goes on as if nothing had been.
    train.train(run, world, resume=True)
    world.comm.Barrier()
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, expected = ((base / which / "checkpoint-6" / file).read_bytes() for which in ("run", "whole"))
        assert ours == expected


@pytest.mark.mpi(min_size=2)
def test_a_checkpoint_is_compared_first_even_between_two_checks(world, prepared, tmp_path, monkeypatch):
    base = shared(world, tmp_path)
    how = {"parallel.sharding": "none", "checkpoint.every_steps": 3, "train.check_replicas_every_steps": 100}
    flipping(world, monkeypatch, 0, 2, CUT)
    with pytest.raises(Corrupted, match=r"step 3: .*newest checkpoint: none"):
        train.train(settings(prepared, base / "run", **how), world)
    world.comm.Barrier()
    assert checkpoint.find(base / "run") == []


@pytest.mark.mpi(min_size=2)
def test_weights_that_no_step_changes_are_compared_between_the_copies_of_hosts(world, prepared, tmp_path, monkeypatch):
    base = shared(world, tmp_path)
    monkeypatch.setattr(memory, "near", memory.Single)  # each rank is as a host by itself
    frozen = "bert.encoder.layer.1.attention.self.query.weight"
    how = {"model.freeze": f'["{frozen}"]', "parallel.sharding": "host", "train.check_replicas_every_steps": 2}
    train.train(settings(prepared, base / "whole", **how), world)
    one_step, steps = train.one_step, []

    def flipped(placed, *rest):
        steps.append(None)
        if len(steps) == 2 and world.rank == world.size - 1:
            placed.one_copy._whole[frozen].detach().view(-1).view(torch.int32)[7] ^= 1 << 20
        return one_step(placed, *rest)

    monkeypatch.setattr(train, "one_step", flipped)
    with pytest.raises(Corrupted, match=rf"step 2: .*rank {world.size - 1} .* first in {frozen}"):
        train.train(settings(prepared, base / "run", **how), world)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("sharding", ["host", "full", "optimizer"])
def test_what_each_rank_has_alone_is_no_alarm(world, prepared, tmp_path, sharding):
    base = shared(world, tmp_path)
    how = {"parallel.sharding": sharding, "train.check_replicas_every_steps": 1, "train.eval_every_steps": 2}
    assert train.train(settings(prepared, base / "run", **how), world)["step"] == 6
