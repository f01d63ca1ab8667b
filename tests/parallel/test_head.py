"""The loss of targets: that of all logits, though these never exist."""

import contextlib

import models
import pytest
import torch
from test_layouts import SIZE, check_weights, largest_difference, place
from torch.nn import functional
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hpcllm.parallel import head, vocabulary
from hpcllm.parallel.runner import Work

ROWS, FEATURES, WORDS = 37, 16, 103


def layer(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, FEATURES, dtype=dtype, requires_grad=True)
    made = torch.nn.Linear(FEATURES, WORDS, bias=bias, dtype=dtype)
    return hidden, made, torch.randint(0, WORDS, (ROWS,))


def taken(hidden, made):
    """Gradients, and none left behind."""
    tensors = [hidden, *made.parameters()]
    found = [tensor.grad.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return found


@pytest.fixture(params=[1, 5 * WORDS, 1 << 24], ids=["row by row", "five at a time", "at once"])
def at_once(request, monkeypatch):
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", request.param)
    monkeypatch.setattr(vocabulary, "ROUNDED_AT_ONCE", 3 * WORDS)


@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_exact_however_few_rows_are_computed_at_a_time(at_once, bias):
    hidden, made, targets = layer(bias, torch.float64)
    expected = functional.cross_entropy(made(hidden), targets, reduction="sum")
    (expected / 7).backward()
    gradients = taken(hidden, made)
    loss, right = vocabulary.linear_cross_entropy(hidden, made.weight, made.bias, targets, score=True)
    (loss / 7).backward()
    assert int(right) == int((made(hidden).argmax(-1) == targets).sum())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # rounded to fp32, as it is in every precision
    for ours, theirs in zip(taken(hidden, made), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_in_bf16_it_is_as_good_as_all_logits_at_once(at_once):
    hidden, made, targets = layer()
    functional.cross_entropy(made(hidden), targets, reduction="sum").backward()
    exact, errors = taken(hidden, made), []
    for fused in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if fused:
                loss, _ = vocabulary.linear_cross_entropy(hidden, made.weight, made.bias, targets)
            else:
                loss = functional.cross_entropy(made(hidden).float(), targets, reduction="sum")
        loss.backward()
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(taken(hidden, made), exact, strict=True)])
    plain, ours = errors
    assert all(a < 1.1 * b + 1e-4 for a, b in zip(ours, plain, strict=True))


def test_nothing_is_differentiated_that_nobody_asks_for():
    hidden, made, targets = layer()
    made.weight.requires_grad_(False)
    vocabulary.linear_cross_entropy(hidden, made.weight, made.bias, targets)[0].backward()
    assert hidden.grad is not None and made.weight.grad is None and made.bias.grad is not None
    with torch.no_grad():
        loss, _ = vocabulary.linear_cross_entropy(hidden, made.weight, made.bias, targets)
    assert not loss.requires_grad


def test_no_targets_are_no_loss():
    model = models.build("bert")
    tokens = torch.ones(1, 8, dtype=torch.int64)
    loss, right = head.loss_sum(model, {"input_ids": tokens}, torch.full_like(tokens, -100), score=True)
    loss.backward()
    assert loss.item() == 0 and int(right) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 50, "vocab_size": 90}
DISTILBERT = DistilBertConfig(dim=24, n_layers=2, n_heads=2, hidden_dim=50, vocab_size=90)
GEMMA = {"head_dim": 12, "num_key_value_heads": 2, "final_logit_softcapping": 2.0}
CLASSES = [
    (AlbertForMaskedLM(AlbertConfig(**SMALL)), True),
    (DistilBertForMaskedLM(DISTILBERT), True),
    (ElectraForMaskedLM(ElectraConfig(**SMALL)), True),
    (RobertaForMaskedLM(RobertaConfig(**SMALL)), True),
    (models.build("bert"), True),
    (models.build("gpt2"), True),
    (models.build("llama"), True),
    (Gemma2ForCausalLM(Gemma2Config(**SMALL, **GEMMA)), False),  # bends its logits
    (GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)), False),  # scales them
    (MobileBertForMaskedLM(MobileBertConfig(num_hidden_layers=1, vocab_size=90)), False),  # has its own product
]


@pytest.mark.parametrize(("model", "entered"), CLASSES, ids=lambda value: type(value).__name__)
def test_targets_alone_pass_the_head_where_that_is_the_same(model, entered):
    model.eval()
    tokens = torch.arange(2, 34).view(2, 16)
    labels = torch.full_like(tokens, -100)
    labels[0, 3], labels[1, 2:5] = 7, 8
    calls = []
    output = model.get_output_embeddings()
    hook = output.register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[:-1].numel()))
    loss, right = head.loss_sum(model, {"input_ids": tokens}, labels, score=True)
    hook.remove()
    assert output.ends_model is entered
    assert not entered or calls == [4]
    loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=tokens).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert int(right) == int((logits.argmax(-1) == labels).sum())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


# --- layouts -----------------------------------------------------------------------------------------------------

LAYOUTS = [
    how
    for how in (
        {},
        {"tensor": 2},
        {"pipeline": 2},
        {"pipeline": 2, "pipeline_schedule": "zero_bubble"},
        {"pipeline": 2, "tensor": 2},
        {"context": 2},
        {"sharding": "optimizer"},
        {"sharding": "full"},
        {"sharding": "full", "tensor": 2},
    )
    if SIZE % (how.get("tensor", 1) * how.get("pipeline", 1) * how.get("context", 1)) == 0
]


def asked(kind, number):
    labels = models.batch(number)[1]
    return labels if kind == "gpt2" else labels.masked_fill(torch.arange(models.LENGTH) % 3 > 0, -100)


@pytest.mark.mpi
@pytest.mark.parametrize("how", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_in_every_layout(world, monkeypatch, kind, how):
    from hpcllm.parallel import context

    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 3 * models.WORDS)
    alone = models.build(kind)
    expected = 0.0
    for number in range(models.BATCHES):
        logits = alone(**models.inputs(kind, number)).logits.flatten(0, 1)
        loss = functional.cross_entropy(logits, asked(kind, number).flatten(), reduction="sum")
        (loss / 100).backward()
        expected += loss.item()
    norm = float(torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e9))
    torch.optim.SGD(alone.parameters(), lr=0.1).step()

    placed = place(world, models.build(kind), **how)
    mesh = placed.mesh

    def inputs(number):
        return context.inputs(models.inputs(kind, number), mesh)

    def loss_of(net, number):
        return head.loss_sum(net, inputs(number), context.part(asked(kind, number), mesh))[0]

    work = Work(inputs, loss_of, lambda number: number, contextlib.nullcontext)
    losses = placed.step(range(mesh.data.rank, models.BATCHES, mesh.data.size), work, 100)
    total = torch.tensor([float(sum(losses))])
    torch.distributed.all_reduce(total, group=mesh.losses)
    assert largest_difference([total.item(), placed.clip_gradients(0)], [expected, norm]) < 1e-5
    torch.optim.SGD(placed.parameters(), lr=0.1).step()
    check_weights(placed, dict(alone.named_parameters()))
