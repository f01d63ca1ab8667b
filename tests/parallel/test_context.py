"""Parts of sequences on other ranks: the same model in the end, against one process."""

import models
import pytest
import torch
from test_layouts import SIZE, check_weights, largest_difference, place, train
from transformers import MambaConfig, MambaForCausalLM, RobertaConfig, RobertaForMaskedLM, XLNetConfig
from transformers.masking_utils import create_causal_mask

from hpcllm.errors import UsageError
from hpcllm.parallel import context
from hpcllm.parallel import mesh as meshes
from hpcllm.parallel.apply import check
from hpcllm.plan import count

pytestmark = pytest.mark.mpi
in_pairs = pytest.mark.skipif(SIZE % 2 > 0, reason="needs ranks in pairs")
LAYOUTS = [
    how
    for how in (
        {"context": 2},
        {"context": 4},
        {"context": 2, "tensor": 2},
        {"context": 2, "pipeline": 2},
        {"context": 2, "pipeline": 2, "pipeline_schedule": "zero_bubble"},
        {"context": 2, "sharding": "optimizer"},
        {"context": 2, "sharding": "gradients"},
        {"context": 2, "sharding": "full"},
    )
    if SIZE % (how["context"] * how.get("tensor", 1) * how.get("pipeline", 1)) == 0
]
# Windows of other lengths than parts and chunks have; in Qwen 2 its second layer alone.
WINDOWS = {"mistral": {"sliding_window": 3}, "qwen2": {"sliding_window": 3, "use_sliding_window": True}}
WINDOWS["qwen2"]["max_window_layers"] = 1


@pytest.mark.parametrize("how", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_sequences_that_ranks_share_out_give_the_same(world, family, how):
    expected, weights = models.train_alone(family)
    placed = place(world, models.build(family), **how)
    assert largest_difference(train(placed), expected) < 1e-5
    check_weights(placed, weights)


@in_pairs
@pytest.mark.parametrize("how", [{}, {"pipeline": 2}], ids=str)
@pytest.mark.parametrize("family", WINDOWS)
def test_queries_look_no_further_than_their_window(world, family, how):
    if SIZE % (2 * how.get("pipeline", 1)):
        pytest.skip("ranks do not divide")
    expected, weights = models.train_alone(family, **WINDOWS[family])
    assert largest_difference(models.train_alone(family)[0], expected) > 1e-5
    placed = place(world, models.build(family, **WINDOWS[family]), context=2, **how)
    assert largest_difference(train(placed), expected) < 1e-5
    check_weights(placed, weights)


@in_pairs
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_tokens_that_a_mask_hides_are_seen_by_nobody(world, family):
    model = models.build(family).eval()
    given = {**models.inputs(family, 1), "attention_mask": torch.ones(models.ROWS, models.LENGTH, dtype=torch.int64)}
    given["attention_mask"][1, :2] = given["attention_mask"][0, 5] = 0  # some of them on either rank
    with torch.no_grad():
        expected, unmasked = (model(**{**given, **none}).logits for none in ({}, {"attention_mask": None}))
        placed = place(world, model, context=2)
        ours = placed.model(**context.inputs(given, placed.mesh)).logits
    seen = context.part(given["attention_mask"], placed.mesh) == 1
    assert not torch.allclose(expected, unmasked, atol=1e-4)
    assert torch.allclose(ours[seen], context.part(expected, placed.mesh)[seen], atol=1e-6)


@in_pairs
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_parts_of_a_sequence_drop_other_activations_and_the_same_when_computed_again(world, family, tensor):
    if SIZE % (2 * tensor):
        pytest.skip("ranks do not divide")
    told, drawn = [], []
    for again in (False, True):
        placed = place(world, models.build(family, dropout=0.2), again, context=2, tensor=tensor)
        told.append(train(placed))
        drawn.append(world.comm.allgather(int(torch.randint(1 << 40, ()))))
    assert largest_difference(told[1], told[0]) < 1e-5
    without, _ = models.train_alone(family)
    assert 1e-3 < largest_difference(told[0], without) < 0.5
    assert len(set(drawn[0])) == SIZE // tensor


@in_pairs
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_ranks_keep_what_the_planner_counts(world, family):
    length, size, kept = 64, SIZE, {}
    longer = {"n_positions": length} if family == "gpt2" else {"max_position_embeddings": length}
    placed = place(world, models.build(family, **longer), context=size)
    weights = {parameter.untyped_storage().data_ptr() for parameter in placed.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    given = {**models.inputs(family, 1), "input_ids": torch.ones(models.ROWS, length, dtype=torch.int64)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        placed.model(**context.inputs(given, placed.mesh))
    bytes_kept = sum(storage.nbytes() for at, storage in kept.items() if at not in weights) / models.ROWS
    counted = count.count(lambda: models.outline(family, **longer).train(), length, gpu=False)
    predicted = sum(part.kept(1, size) for part in (counted.first, *counted.blocks, counted.last))
    assert predicted == pytest.approx(bytes_kept, rel=0.1)


@in_pairs
def test_all_ranks_have_as_much_to_attend_to(world):
    placed, length = place(world, models.build("llama"), context=SIZE), 4 * SIZE
    embeddings, everything = torch.zeros(2, length // SIZE, 1), torch.ones(2, length)
    mask = create_causal_mask(placed.config, embeddings, everything, None)
    assert mask.shape[-2:] == (length // SIZE, length)
    pairs, keys = zip(*world.comm.allgather((int(mask[0].sum()), sum(mask.reach))), strict=True)
    assert pairs == (length * (length + 1) // 2 // SIZE,) * SIZE
    assert keys == (length + 2,) * SIZE  # half of what whole rows would be, and a chunk


@pytest.mark.parametrize(("size", "length"), [(1, 8), (2, 8), (4, 8), (3, 12)])
def test_every_token_is_on_one_rank(size, length):
    held = [context.positions(length, size, index) for index in range(size)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    assert {len(part) for part in held} == {length // size}


@pytest.mark.parametrize(("config", "kind"), [(models.config("t5"), "t5"), (XLNetConfig(), "xlnet")])
def test_families_whose_attention_cannot_be_replaced_are_refused_by_name(config, kind):
    with pytest.raises(UsageError, match=f"parallel: context: the attention of {kind} is not one that transformers"):
        check(config, meshes.Layout(1, 1, 1, 2, 1))


@in_pairs
def test_models_that_do_more_between_tokens_are_refused(world):
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 50}
    # It counts positions from its padding's number.
    with pytest.raises(UsageError, match="roberta does more between its tokens than attend by position"):
        place(world, RobertaForMaskedLM(RobertaConfig(vocab_size=models.WORDS, **small)), context=2)
    with pytest.raises(UsageError, match="the attention of mamba is not"):
        place(world, MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1)), context=2)


@in_pairs
def test_a_mask_of_a_part_is_refused_with_the_numbers(world):
    placed = place(world, models.build("llama"), context=2)
    with pytest.raises(UsageError, match="4 tokens of 2 parts need a mask of all, not of 4"):
        placed.model(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
