"""Micro-batches of examples: of like length, of equal size, each example once, the same at any number of ranks."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_labelled import KINDS, prepare, write, write_tokenizer

import hpcllm.mpi
from hpcllm import model
from hpcllm.data import examples, order, shards, tokenizer
from hpcllm.tasks import TASKS


def size(lengths, group):
    return len(group) * int(lengths[group].max())


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=9).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(1, len(n)))
    )
)
def test_the_largest_group_is_as_small_as_can_be(given_):
    lengths, count = np.array(given_[0]), given_[1]
    groups = examples.grouped(lengths, count)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths))) and len(groups) == count
    assert all(len(group) for group in groups)
    ordered = np.sort(lengths)
    cuts = itertools.combinations(range(1, len(lengths)), count - 1)
    best = min(max(len(part) * part.max() for part in np.split(ordered, cut)) for cut in cuts)
    assert max(size(lengths, group) for group in groups) == best


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(60, 300))
def test_groups_of_an_evaluation_are_bounded(lengths, bound):
    longest_first = np.array(sorted(lengths, reverse=True), np.int64)
    groups = examples.filled(longest_first, bound)
    assert np.concatenate([*groups, np.arange(0)]).tolist() == list(range(len(lengths)))
    assert all(size(longest_first, group) <= bound for group in groups)


def source(folder, kind, **how):
    """Examples of 57 sentences in several shards."""
    write_tokenizer(folder / "tokenizer")
    write(folder / "train.jsonl", kind, 57, 5)
    prepare(hpcllm.mpi.join(), folder, "out", kind, max_tokens=12, shard_tokens=200)
    stream = shards.open_folder(str(folder / "out" / "train"))
    task = TASKS["token_classification" if kind == "tags" else "sequence_classification"]
    words = model.vocabulary(tokenizer.load(str(folder / "tokenizer")))
    return examples.Examples(stream, task, words, 16, 7, **how)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_documents_of_the_shards(world, tmp_path, kind):
    made = source(tmp_path, kind)
    numbers = np.array([50, 0, 3, len(made) - 1, 3])
    tokens = made.stream.gather(np.array([0]), made.stream.token_count)[0]
    begins = np.cumsum([0, *made.lengths(np.arange(len(made)))])
    batch = made.micro_batch(numbers, np.zeros(5, np.int64))
    for row, number in enumerate(numbers):
        mask = batch.inputs["attention_mask"][row].bool()
        assert batch.inputs["input_ids"][row][mask].tolist() == tokens[begins[number] : begins[number + 1]].tolist()
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    lengths = made.lengths(numbers)
    assert batch.inputs["input_ids"].shape == (5, lengths.max())
    assert (batch.tokens, batch.pairs) == (lengths.sum(), (lengths**2).sum())
    assert batch.inputs["input_ids"][~batch.inputs["attention_mask"].bool()].unique().tolist() in ([], [0])
    # What stands beside the tokens is of the same example.
    labels = np.concatenate([one["labels"] for *_, one in made._shards])
    if kind == "tags":
        for row, number in enumerate(numbers):
            wanted = labels[begins[number] : begins[number + 1], 0].tolist()
            assert batch.labels[row].tolist() == wanted + [-100] * (batch.labels.shape[1] - len(wanted))
    else:
        assert batch.labels.float().reshape(5, -1).tolist() == labels[numbers].astype(float).tolist()


@pytest.mark.parametrize("kind", ["single", "tags"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_micro_batches_of_a_global_batch(world, tmp_path, kind, ranks):
    made, train = source(tmp_path, kind), SimpleNamespace(global_batch_size=24, micro_batch_size=3)
    whole = made.training_step(48, 0, 1, train)
    parts = [made.training_step(48, rank, ranks, train) for rank in range(ranks)]
    dealt = [parts[number % ranks][number // ranks] for number in range(len(whole))]
    assert [b.numbers.tolist() for b in dealt] == [b.numbers.tolist() for b in whole] and len(whole) == 8
    assert [b.seed for b in dealt] == [b.seed for b in whole] and len({b.seed for b in whole}) == 8
    wanted, _ = order.samples(48, 24, len(made), 7)
    assert sorted(np.concatenate([b.numbers for b in whole]).tolist()) == sorted(wanted.tolist())
    padded = [b.inputs["input_ids"].numel() for b in whole]
    assert max(padded) <= 3 * 16 and sum(padded) < 1.25 * sum(b.tokens for b in whole)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_evaluation_has_each_example_once_in_equal_numbers_of_calls(world, tmp_path, ranks):
    made = source(tmp_path, "single")
    parts = [list(made.validation(rank, ranks, 4)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    numbers = [number for part in parts for batch in part for number in batch.numbers.tolist()]
    assert sorted(numbers) == list(range(57)) and sum(batch.samples for part in parts for batch in part) == 57


def test_lengths_are_multiples_where_kernels_or_slices_want_that(world, tmp_path):
    made = source(tmp_path, "single", multiple=8)
    widths = {batch.inputs["input_ids"].shape[1] for batch in made.validation(0, 1, 1)}
    assert widths <= {8, 16}


def test_class_weights():
    meaning = {"label_counts": {"a": 6, "b": 2, "c": 0}}
    # scikit-learn's compute_class_weight("balanced"), which knows no class without examples.
    assert examples.class_weights(meaning, "balanced").tolist() == pytest.approx([8 / 18, 8 / 6, 1])
    assert examples.class_weights(meaning, None) is None
    assert examples.class_weights(meaning, [1, 2, 3]).dtype == torch.float32
    with pytest.raises(hpcllm.errors.UsageError, match="class_weights has 2 numbers, the data have 3 names"):
        examples.class_weights(meaning, [1, 2])
