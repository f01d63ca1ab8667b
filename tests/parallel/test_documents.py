"""Documents that share rows: each as if it were alone, in every layout."""

import contextlib
import dataclasses
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from test_layouts import SIZE, check_weights, largest_difference, place
from transformers import MobileBertConfig, MobileBertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from hpcllm import attention
from hpcllm.data import batches
from hpcllm.errors import UsageError
from hpcllm.parallel import vocabulary
from hpcllm.parallel.runner import Work

FAMILIES = {
    "bert": {},
    "gpt2": {},
    "llama": {},
    "mistral": {"sliding_window": 3},
    "qwen2": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1},
}
# Single tokens, several that are computed in one, and longer ones than that.
LENGTHS = [[70, 1, 2, 97], [170], [1, 1, 80, 88]]
ROOM = {"bert": "max_position_embeddings", "gpt2": "n_positions"}


def family(kind, **more):
    """A model, with documents kept apart, and the same without."""
    given = {**FAMILIES[kind], **({ROOM[kind]: 256} if kind in ROOM else {}), **more}
    kept = models.build(kind, **given)
    attention.keep_apart(kept)
    return kept, models.build(kind, **given)


def rows_of(lengths):
    draw = torch.Generator().manual_seed(1)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return torch.randint(0, models.WORDS, positions.shape, generator=draw), positions


def packed(model, tokens, positions):
    return model(**attention.inputs({"input_ids": tokens}, positions, tokens.device)).logits


def alone(model, tokens, lengths):
    documents = tokens.flatten().split([length for row in lengths for length in row])
    return torch.cat([model(input_ids=document.unsqueeze(0)).logits[0] for document in documents])


def gradients(model, logits):
    """Of a loss that is not the same for all tokens."""
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits * weights).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", FAMILIES)
def test_documents_of_a_row_are_as_if_each_were_alone(kind):
    kept, plain = family(kind)
    tokens, positions = rows_of(LENGTHS)
    ours, expected = packed(kept, tokens, positions).flatten(0, 1), alone(plain, tokens, LENGTHS)
    assert not torch.allclose(plain(input_ids=tokens).logits.flatten(0, 1), expected, atol=1e-4)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    of_ours, of_theirs = gradients(kept, ours), gradients(plain, expected)
    assert of_ours.keys() == of_theirs.keys()
    for name, gradient in of_theirs.items():
        torch.testing.assert_close(of_ours[name], gradient, rtol=1e-4, atol=1e-7 + 1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_row_of_one_document_is_a_row(kind):
    kept, plain = family(kind)
    tokens, positions = rows_of([[96], [96]])
    torch.testing.assert_close(packed(kept, tokens, positions), plain(input_ids=tokens).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_products_in_bf16_are_as_good_as_those_of_sdpa(kind):
    kept, plain = family(kind)
    tokens, positions = rows_of(LENGTHS)
    with torch.no_grad():
        exact = alone(plain, tokens, LENGTHS)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = packed(kept, tokens, positions).flatten(0, 1), alone(plain, tokens, LENGTHS)
    assert (ours - exact).square().mean() < 1.2 * (theirs - exact).square().mean()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_drops_as_many_products_as_it_is_told_to(causal):
    torch.manual_seed(0)
    documents = attention.Documents(rows_of([[300, 212]])[1], torch.device("cpu"))
    query, key = torch.randn(2, 1, 4, 512, 8)
    value = torch.ones(1, 4, 512, 8)
    module = SimpleNamespace(is_causal=causal)
    found, _ = attention._attention(module, query, key, value, None, documents=documents, dropout=0.25)
    assert found.mean() == pytest.approx(1.0, abs=0.02)  # what is left is scaled up
    first = found[0, 0] if causal else found[0, :, 0, 0]
    if causal:  # it sees itself alone: all or nothing
        assert set(np.round(first.flatten().tolist(), 5)) <= {0.0, np.round(4 / 3, 5)}
    else:
        assert 0.01 < first.std() < 0.2
    undropped, _ = attention._attention(module, query, key, value, None, documents=documents)
    torch.testing.assert_close(undropped, torch.ones_like(undropped))


def test_positions_count_from_each_separator():
    rows = np.array([[2, 7, 3, 8, 9, 9, 3, 3, 5], [2, 7, 7, 7, 7, 7, 7, 7, 3]])
    expected = [[0, 1, 2, 0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
    assert batches.positions(rows, 3).tolist() == expected


def test_models_whose_attention_is_not_by_position_alone_are_refused_by_name():
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 50}
    with pytest.raises(UsageError, match=r'data: attention: roberta does more .* set attention to "row"'):
        attention.keep_apart(RobertaForMaskedLM(RobertaConfig(vocab_size=models.WORDS, **small)))
    with pytest.raises(
        UsageError, match="data: attention: that of t5 is not one that transformers lets others replace"
    ):
        attention.keep_apart(models.build("t5"))
    with pytest.raises(UsageError, match=r"data: attention: .*mobilebert"):
        attention.keep_apart(MobileBertForMaskedLM(MobileBertConfig(num_hidden_layers=1)))


def test_padding_is_refused():
    kept, _ = family("bert")
    tokens, positions = rows_of([[96], [96]])
    given = attention.inputs({"input_ids": tokens}, positions, tokens.device)
    with pytest.raises(UsageError, match="have no padding"):
        kept(**given, attention_mask=torch.ones_like(tokens))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FAMILIES)
def test_documents_on_a_gpu_are_as_if_each_were_alone(kind, dtype):
    kept, plain = (model.to("cuda") for model in family(kind))
    tokens, positions = rows_of(LENGTHS)
    tokens = tokens.to("cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
        ours, expected = packed(kept, tokens, positions).flatten(0, 1), alone(plain, tokens, LENGTHS)
    close = 2e-2 if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(ours.float(), expected.float(), rtol=close, atol=close)
    of_ours, of_theirs = gradients(kept, ours.float()), gradients(plain, expected.float())
    for name, gradient in of_theirs.items():
        assert (of_ours[name] - gradient).norm() < 3 * close * (gradient.norm() + 1e-6), name


# --- layouts -----------------------------------------------------------------------------------------------------

PIECES = [[3, 1, 4], [8], [2, 6], [1, 1, 5, 1]]  # of rows of models.LENGTH, in turn
LAYOUTS = [
    how
    for how in (
        {},
        {"tensor": 2},
        {"pipeline": 2},
        {"pipeline": 2, "tensor": 2},
        {"pipeline": 2, "pipeline_schedule": "zero_bubble"},
        {"pipeline": 2, "pipeline_schedule": "interleaved", "stages_per_rank": 2},
        {"sharding": "optimizer"},
        {"sharding": "gradients"},
        {"sharding": "full"},
    )
    if SIZE % (how.get("tensor", 1) * how.get("pipeline", 1)) == 0
]


def pieces(number):
    return [PIECES[(number + row) % len(PIECES)] for row in range(models.ROWS)]


def positions(number):
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in pieces(number)])


def loss(logits, number):
    return vocabulary.cross_entropy_sum(logits.flatten(0, -2), models.batch(number)[1].flatten())


def work(kind):
    def given(number):
        return attention.inputs(models.inputs(kind, number), positions(number), torch.device("cpu"))

    def loss_of(net, number):
        words = vocabulary.words_of(getattr(net, "module", net).get_output_embeddings())
        logits = net(**given(number)).logits.flatten(0, -2)
        return vocabulary.cross_entropy_sum(logits, models.batch(number)[1].flatten(), words)

    return Work(given, loss_of, lambda number: number, contextlib.nullcontext)


def trained(step, parameters, clip):
    adjust, told = torch.optim.SGD(parameters, lr=0.1, momentum=0.9), []
    for number in range(models.STEPS):
        adjust.zero_grad()
        told += [step(number), clip()]
        adjust.step()
    return told


def train_alone(kind, layers):
    """Every document by itself, in one process, no hpcllm in it."""
    model = models.build(kind, layers=layers)

    def step(number):
        total = 0.0
        for batch in range(number * models.BATCHES, (number + 1) * models.BATCHES):
            part = loss(alone(model, models.batch(batch)[0], pieces(batch)), batch)
            (part / (models.BATCHES * models.ROWS * models.LENGTH)).backward()
            total += part.item()
        return total

    told = trained(step, model.parameters(), lambda: float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
    return told, dict(model.named_parameters())


@pytest.mark.mpi
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("how", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_documents_are_kept_apart_in_every_layout(world, kind, how, again):
    layers = how.get("pipeline", 1) * how.get("stages_per_rank", 2 if "pipeline" not in how else 1)
    expected, weights = train_alone(kind, layers)
    model = models.build(kind, layers=layers)
    attention.keep_apart(model)
    placed = place(world, model, again, **how)
    data = placed.mesh.data

    def step(number):
        mine = range(number * models.BATCHES + data.rank, (number + 1) * models.BATCHES, data.size)
        losses = placed.step(mine, work(kind), models.BATCHES * models.ROWS * models.LENGTH)
        total = torch.tensor([float(sum(losses))])
        torch.distributed.all_reduce(total, group=placed.mesh.losses)
        return total.item()

    told = trained(step, placed.parameters(), lambda: placed.clip_gradients(1.0))
    assert largest_difference(told, expected) < 1e-5
    check_weights(placed, weights)


@pytest.mark.mpi
@pytest.mark.skipif(SIZE < 2, reason="needs stages")
def test_stages_tell_each_other_shapes_once_whatever_the_documents(world):
    model = models.build("gpt2", layers=SIZE)
    attention.keep_apart(model)
    placed = place(world, model, pipeline=SIZE)
    placed.step(range(6), work("gpt2"), 1)
    assert len(placed.runner.outlines) <= 2


def test_dropout_is_drawn_again_when_activations_are_computed_again():
    from hpcllm.parallel.apply import whole

    norms = []
    for again in (False, True):
        model = models.build("bert", dropout=0.3)
        attention.keep_apart(model)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        placed = whole(model)
        placed.step(range(3), dataclasses.replace(work("bert")), 1)
        norms.append(placed.clip_gradients(0))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
