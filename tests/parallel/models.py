"""Tiny models of four families, batches for them, and training in one process to compare with."""

import contextlib
import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from hpcllm.parallel import context, vocabulary
from hpcllm.parallel import mesh as meshes
from hpcllm.parallel.runner import Work

# Odd numbers where ranks may have unequal parts.
WORDS, LENGTH, ROWS, BATCHES, STEPS = 101, 8, 2, 12, 2
ALONE = meshes.replicas()
FAMILIES = ("bert", "gpt2", "llama", "t5")


def config(family, dropout=0.0, layers=2, **changes):
    """transformers' configuration of a tiny model."""
    if family == "bert":
        given = {"hidden_size": 24, "num_hidden_layers": layers, "num_attention_heads": 12, "intermediate_size": 50}
        given |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        given |= {"max_position_embeddings": 32}
    elif family == "gpt2":
        given = {"n_embd": 24, "n_layer": layers, "n_head": 12, "n_positions": 32, "n_inner": 50}
        given |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    elif family == "t5":
        given = {"d_model": 24, "d_kv": 2, "d_ff": 50, "num_layers": layers, "num_heads": 12, "dropout_rate": dropout}
        given |= {"decoder_start_token_id": 0, "pad_token_id": 0}
    elif family in ("mixtral", "qwen2_moe", "qwen3_moe"):
        given = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4}
        given |= {"intermediate_size": 24, "max_position_embeddings": 32, "attention_dropout": dropout}
        # Large weights, or what experts give would be lost in the tolerance.
        given |= {"num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
        given |= {} if family == "mixtral" else {"moe_intermediate_size": 24}
        given |= {"shared_expert_intermediate_size": 24} if family == "qwen2_moe" else {}
    else:
        given = {"hidden_size": 48, "num_hidden_layers": layers, "num_attention_heads": 24, "num_key_value_heads": 12}
        given |= {"intermediate_size": 50, "max_position_embeddings": 32, "attention_dropout": dropout}
    return AutoConfig.for_model(family, **{"vocab_size": WORDS, **given, **changes})


def outline(family, **how):
    """The model as transformers makes it, from the numbers that are next."""
    kind = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}.get(family, AutoModelForCausalLM)
    return kind.from_config(config(family, **how), dtype=torch.float32)


def build(family, **how):
    """A model, the same on every rank and in every call."""
    torch.manual_seed(3)
    made = outline(family, **how)
    # Biases that start at zero would hide one that is added twice.
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.1)
    return made.train()


def batch(number):
    """(input_ids, labels), int64 [ROWS, LENGTH]."""
    draw = torch.Generator().manual_seed(number)
    return [torch.randint(0, WORDS, (ROWS, LENGTH), generator=draw) for _ in range(2)]


def inputs(family, number):
    """The keyword arguments of a model of `family` for batch `number`."""
    input_ids, labels = batch(number)
    more = {"decoder_input_ids": labels.roll(1, -1)} if family == "t5" else {}
    more |= {} if family == "bert" else {"use_cache": False}
    return {"input_ids": input_ids, **more}


def loss(net, number, mesh=ALONE):
    """Cross entropy of batch `number`, summed over this rank's tokens. net: a model, or what calls its `module`."""
    model = getattr(net, "module", net)
    logits = net(**context.inputs(inputs(model.config.model_type, number), mesh)).logits.flatten(0, -2)
    words = vocabulary.words_of(model.get_output_embeddings())
    return vocabulary.cross_entropy_sum(logits, context.part(batch(number)[1], mesh).flatten(), words)


def work(family, mesh=ALONE):
    """What `Placed.step` does with the number of a batch. mesh: mesh.Mesh of ranks that may share sequences."""
    return Work(
        lambda number: context.inputs(inputs(family, number), mesh),
        lambda net, number: loss(net, number, mesh),
        lambda number: number,
        contextlib.nullcontext,
    )


@functools.cache
def train_alone(family, steps=STEPS, bound=1.0, **how):
    """(loss and gradient norm of each step, weights by name): SGD in one process, no hpcllm in it."""
    model, told = build(family, **how), []
    adjust = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        adjust.zero_grad()
        total = 0.0
        for number in range(step * BATCHES, (step + 1) * BATCHES):
            torch.manual_seed(number)
            part = loss(model, number) / (BATCHES * ROWS * LENGTH)
            part.backward()
            total += part.item()
        told += [total, float(torch.nn.utils.clip_grad_norm_(model.parameters(), bound))]
        adjust.step()
    return told, dict(model.named_parameters())
