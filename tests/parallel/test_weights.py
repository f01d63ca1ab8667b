"""Weights that no rank has as a whole: drawn as transformers draws them, the same under every layout."""

import models
import pytest
import torch
from safetensors.torch import save_file
from test_layouts import SIZE, place, whole

from hpcllm import weights
from hpcllm.errors import DataError
from hpcllm.parallel import apply

pytestmark = pytest.mark.mpi
FAMILIES = (*models.FAMILIES, "qwen2")
LAYOUTS = [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "tensor": 2}, {"sharding": "full"}]
LAYOUTS += [{"pipeline": 2, "sharding": "full"}, {"tensor": 2, "sharding": "optimizer"}]


def fitting(how):
    return SIZE % (how.get("tensor", 1) * how.get("pipeline", 1)) == 0


def absent(family, **how):
    with weights.absent():
        return models.outline(family, **how).train()


def drawn(family, seed=1, **how):
    """A whole model with fresh weights, in this process."""
    net = absent(family, **how)
    weights.fill(apply.whole(net), weights.Fresh(net, seed), "cpu")
    return net


@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_no_weights_and_their_buffers(family):
    net, reference = absent(family), models.outline(family)
    assert all(parameter.is_meta for parameter in net.parameters())
    buffers = dict(reference.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in reference.named_parameters()]
    # Outside of the context modules have weights again.
    assert not torch.nn.Linear(1, 1).weight.is_meta


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_are_distributed_as_transformers_does_it(family):
    sizes = {"d_model": 120, "d_kv": 10} if family == "t5" else {"hidden_size": 144}
    torch.manual_seed(0)
    reference = dict(models.outline(family, **sizes).named_parameters())
    made = dict(drawn(family, **sizes).named_parameters())
    assert made.keys() == reference.keys()
    for name, ours in made.items():
        theirs = reference[name].detach()
        if theirs.std() == 0 or theirs.numel() == 1:  # ones and zeros
            assert torch.equal(ours, theirs), name
        else:
            # Of n draws the standard deviation is known to 1 / sqrt(2 n) of itself.
            bound = 5 / (2 * theirs.numel()) ** 0.5
            assert float(ours.detach().std() / theirs.std()) == pytest.approx(1, rel=2 * bound), name
            assert abs(float(ours.detach().mean())) < 2 * float(theirs.std()) * bound * 2**0.5, name
            assert not torch.equal(ours, theirs), name


def test_units_and_seeds_draw_other_numbers():
    first = drawn("gpt2")
    blocks = [block.mlp.c_fc.weight for block in first.transformer.h]
    assert not torch.equal(*blocks)
    assert not torch.equal(drawn("gpt2", seed=2).transformer.wte.weight, first.transformer.wte.weight)
    torch.manual_seed(99)  # whatever was drawn before
    assert torch.equal(drawn("gpt2").transformer.wte.weight, first.transformer.wte.weight)


@pytest.mark.parametrize("how", [how for how in LAYOUTS if fitting(how)])
@pytest.mark.parametrize("source", ["fresh", "saved"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_layout_gets_the_same_weights(world, tmp_path, family, source, how):
    expected = dict(drawn(family).named_parameters())
    net = absent(family)
    given = weights.Fresh(net, 1)
    if source == "saved":
        folder = world.comm.bcast(tmp_path)
        if world.is_root:
            save_file({name: p.detach().clone() for name, p in expected.items()}, folder / "model.safetensors")
        world.comm.Barrier()
        given = weights.Saved(folder / "model.safetensors")
    placed = place(world, net, source=given, **how)
    held = dict(placed.named_parameters())
    assert not any(parameter.is_meta for parameter in held.values())
    for name, values in expected.items():
        assert torch.equal(whole(placed, name, held[name].detach() if name in held else None), values), name
    placed.step([1], models.work(family), 1)  # and it runs
    assert placed.clip_gradients(0) > 0


def test_missing_weights_are_named(tmp_path):
    net = absent("gpt2")
    save_file({"transformer.wte.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"missing, of another shape or too many: transformer\.h\.0.*"):
        weights.Saved(tmp_path / "model.safetensors").check(net)
    with pytest.raises(DataError, match=r"nothing\.safetensors cannot be read"):
        weights.Saved(tmp_path / "nothing.safetensors").check(net)
