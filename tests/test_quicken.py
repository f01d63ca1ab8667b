"""What is put in for parts of transformers' models computes what they do."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, activations

from hpcllm import attention
from hpcllm.quicken import quicken

CPU = torch.device("cpu")
CONFIGS = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
}


def built(kind, dropout):
    sizes = dict(CONFIGS[kind])
    if kind == "bert":
        sizes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    elif kind == "gpt2":
        sizes |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    else:
        sizes |= {"attention_dropout": dropout}
    made = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    return made.from_config(AutoConfig.for_model(kind, vocab_size=99, **sizes)).train()


def run(model, **more):
    ids = torch.randint(0, 99, (3, 16), generator=torch.Generator().manual_seed(1))
    loss = functional.cross_entropy(model(input_ids=ids, **more).logits.flatten(0, 1), ids.flatten())
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


@pytest.fixture
def products(monkeypatch):
    """Calls of the attention that is put in."""
    calls, real = [], attention._all_products
    monkeypatch.setattr(attention, "_all_products", lambda *given: calls.append(len(given)) or real(*given))
    return calls


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_and_gradients_are_those_of_the_model_as_it_was(monkeypatch, products, kind, padded):
    monkeypatch.setattr(attention, "_DENSE_TYPES", (torch.float32,))
    mask = torch.ones(3, 16, dtype=torch.int64)
    mask[1, 10:] = 0
    more = {"attention_mask": mask} if padded else {}
    plain, quick = built(kind, 0.0), built(kind, 0.0)
    quicken(quick, CPU)
    expected, gradients = run(plain, **more)
    loss, found = run(quick, **more)
    assert len(products) == (0 if padded else 2)  # masks are left to SDPA
    assert loss == pytest.approx(expected, rel=1e-6)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_dropout_follows_the_seed_and_ends_with_training(products, kind):
    model = built(kind, 0.2)
    quicken(model, CPU)
    told = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        told.append(run(model)[0])
    assert told[0] == told[1] != told[2] and len(products) == 6
    model.eval()
    assert run(model)[0] == run(model)[0] == pytest.approx(run(built(kind, 0.0))[0], rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_values_may_be_of_another_width_than_queries(products, dropout):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 32, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_routed_experts": 4}
    sizes |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 8}
    config = AutoConfig.for_model("deepseek_v3", vocab_size=99, n_group=1, topk_group=1, num_experts_per_tok=2, **sizes)
    config.attention_dropout = dropout
    model = AutoModelForCausalLM.from_config(config).train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model)[0]
        quicken(model, CPU)
        assert run(model)[0] == pytest.approx(expected, rel=0.05 if dropout else 5e-3)
    assert len(products) == 1


def test_bf16_rounds_but_no_more(products):
    plain, quick = built("gpt2", 0.0), built("gpt2", 0.0)
    for model in (plain, quick):
        for block in model.transformer.h:
            block.attn.c_attn.weight.data *= 20  # large scores
    quicken(quick, CPU)
    exact = run(plain)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = run(built_like(plain)), run(quick)
    assert len(products) == 2
    away, allowed = abs(ours[0] - exact[0]), abs(theirs[0] - exact[0])
    assert away < 4 * allowed + 1e-2 * exact[0]


def built_like(model):
    other = built(model.config.model_type, 0.0)
    other.load_state_dict(model.state_dict())
    return other


def test_what_looks_at_the_name_of_its_attention_keeps_it():
    model = built("gpt2", 0.0)
    assert not attention._looks_at_the_name(model)
    sparse = type("Sparse", (), {"__module__": "transformers.models.deepseek_v32.modeling_deepseek_v32"})
    import transformers.models.deepseek_v32.modeling_deepseek_v32  # noqa: F401

    assert attention._looks_at_the_name(sparse())


def test_many_products_are_left_to_sdpa_which_does_not_keep_them(monkeypatch, products):
    monkeypatch.setattr(attention, "_DENSE_TYPES", (torch.float32,))
    monkeypatch.setattr(attention, "_PRODUCTS", 3 * 4 * 16 * 16 - 1)
    model = built("gpt2", 0.0)
    quicken(model, CPU)
    run(model)
    assert not products


def test_a_gpu_keeps_its_own_attention_and_dropout(products):
    model = built("gpt2", 0.1)
    quicken(model, torch.device("cuda"))
    assert model.config._attn_implementation == "sdpa" and run(model) and not products
    assert model.transformer.h[0].mlp.act.forward.func is functional.gelu


@pytest.mark.parametrize("kind", [activations.NewGELUActivation, activations.FastGELUActivation])
def test_one_gelu_is_the_other(kind):
    values = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    module = kind()
    expected = module(values)
    quicken(module_of(module), CPU)
    torch.testing.assert_close(module(values), expected, rtol=1e-6, atol=1e-9)


def module_of(activation):
    model = built("bert", 0.0)
    model.one_more = activation
    return model
