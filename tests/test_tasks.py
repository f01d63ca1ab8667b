"""Tasks: what is shown, what is asked, and that the loss is transformers' own."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hpcllm import model, weights
from hpcllm.config import Model
from hpcllm.data import order
from hpcllm.errors import UsageError
from hpcllm.parallel.apply import whole
from hpcllm.tasks import TASKS, causal_lm, masked_lm, seq2seq_lm

WORDS = model.Vocabulary(
    size=100,
    cls=2,
    sep=3,
    mask=4,
    pad=0,
    bos=None,
    eos=None,
    special=np.arange(5),
    ordinary=np.arange(5, 100),
)


def built(section, length, seed):
    net, source = model.build(section, WORDS, length, seed)
    if source is not None:
        weights.fill(whole(net), source, "cpu")
    return net


def tokens(count, length, seed=0):
    drawn = np.random.default_rng(seed).integers(5, 100, (count, length))
    drawn[:, ::10] = 3  # separators between documents
    return drawn


def test_masked_lm_masks_as_bert_did():
    shown = tokens(400, 126)
    input_ids, labels = masked_lm.rows(shown, order.key(1, 0, np.arange(400)), WORDS, 0.15)
    assert input_ids.shape == labels.shape == (400, 128)
    assert (input_ids[:, 0] == 2).all() and (input_ids[:, -1] == 3).all()
    asked = labels != -100
    assert (labels[:, 1:-1][asked[:, 1:-1]] == shown[asked[:, 1:-1]]).all()
    assert not np.isin(labels[asked], WORDS.special).any()
    assert (input_ids[:, 1:-1][~asked[:, 1:-1]] == shown[~asked[:, 1:-1]]).all()
    ordinary = (~np.isin(shown, WORDS.special)).sum()
    assert asked.sum() / ordinary == pytest.approx(0.15, abs=0.005)
    masked, kept = (input_ids == 4)[asked].mean(), (input_ids == labels)[asked].mean()
    assert masked == pytest.approx(0.8, abs=0.015)
    assert kept == pytest.approx(0.1 + 0.1 / 95, abs=0.015)
    replaced = input_ids[asked & (input_ids != 4) & (input_ids != labels)]
    assert set(replaced) == set(range(5, 100))


def test_masking_belongs_to_the_sample_and_the_epoch():
    shown = tokens(6, 62)
    whole = masked_lm.rows(shown, order.key(1, 0, np.arange(6)), WORDS, 0.15)
    part = masked_lm.rows(shown[2:4], order.key(1, 0, np.arange(2, 4)), WORDS, 0.15)
    np.testing.assert_array_equal(whole[0][2:4], part[0])
    np.testing.assert_array_equal(whole[1][2:4], part[1])
    other = masked_lm.rows(shown, order.key(1, 1, np.arange(6)), WORDS, 0.15)
    assert (whole[1] != other[1]).any()


def test_masked_lm_needs_a_tokenizer_that_can_mask():
    without = model.Vocabulary(**{**WORDS.__dict__, "mask": None, "cls": None})
    with pytest.raises(UsageError, match="this one has no cls, mask"):
        masked_lm.check(without)
    masked_lm.check(WORDS)


def test_causal_lm_asks_for_every_token_but_the_first_once():
    stream = np.arange(1, 1 + 3 * 16 + 1)
    taken, stride = causal_lm.span(16, 0.15)
    cut = np.stack([stream[start : start + taken] for start in range(0, len(stream) - taken + 1, stride)])
    input_ids, labels = causal_lm.rows(cut, None, WORDS, 0.15)
    np.testing.assert_array_equal(labels.ravel(), stream[1:])
    np.testing.assert_array_equal(input_ids.ravel(), stream[:-1])


def hidden_spans(input_ids, labels, sentinels, eos):
    """The text that a row of inputs and targets was made of, and how many tokens each hidden span has."""
    assert input_ids[-1] == eos and labels[-1] == eos
    spans, of = {}, None
    for token in labels[:-1].tolist():
        if token in sentinels:
            of = spans[token] = []
        else:
            of.append(token)
    text = [one for token in input_ids[:-1].tolist() for one in spans.get(token, [token])]
    assert list(spans) == list(sentinels[: len(spans)])
    assert [token for token in input_ids.tolist() if token in spans] == list(spans)  # each once, in the same order
    return text, [len(span) for span in spans.values()]


SENTINELS = tuple(range(1000, 1100))
T5_WORDS = dataclasses.replace(WORDS, eos=1, sentinels=SENTINELS)
FEW_WORDS = dataclasses.replace(WORDS, eos=1, sentinels=tuple(range(80, 100)))


@pytest.mark.parametrize(
    ("length", "fraction"), [(512, 0.15), (128, 0.15), (64, 0.5), (9, 0.15), (3, 0.15), (512, 0.3)]
)
def test_seq2seq_lm_hides_spans_that_put_back_make_the_text(length, fraction):
    taken, stride = seq2seq_lm.span(length, fraction)
    assert taken == stride
    shown = tokens(40, taken)
    input_ids, labels = seq2seq_lm.rows(shown, order.key(1, 0, np.arange(40)), T5_WORDS, fraction)
    assert input_ids.shape[1] <= length and input_ids.shape[1] + labels.shape[1] > taken
    everything = []
    for row in range(40):
        text, spans = hidden_spans(input_ids[row], labels[row], SENTINELS, 1)
        assert text == shown[row].tolist() and min(spans) > 0
        everything += spans
        again = seq2seq_lm.rows(shown[row : row + 1], order.key(1, 0, np.arange(row, row + 1)), T5_WORDS, fraction)
        np.testing.assert_array_equal(again[0][0], input_ids[row])
    nothing = seq2seq_lm.rows(shown[:0], order.key(1, 0, np.arange(0)), T5_WORDS, fraction)
    assert [rows.shape for rows in nothing] == [(0, input_ids.shape[1]), (0, labels.shape[1])]
    hidden = sum(everything) / 40
    assert hidden == round(taken * fraction) or taken < 5
    if length == 512:
        # T5's own numbers for 512 tokens at 15 %: 568 of text, 85 of them hidden, 114 to write with sentinels and end.
        assert fraction != 0.15 or (taken, hidden, input_ids.shape[1], labels.shape[1]) == (568, 85, 512, 114)
        assert np.mean(everything) == pytest.approx(3, rel=0.05) and max(everything) > 6


def test_where_spans_are_cut_is_drawn_evenly():
    shown = tokens(4000, 30)
    input_ids, labels = seq2seq_lm.rows(shown, order.key(1, 0, np.arange(4000)), T5_WORDS, 0.3)
    first = np.array([hidden_spans(a, b, SENTINELS, 1)[1] for a, b in zip(input_ids, labels, strict=True)])
    assert first.shape == (4000, 3) and first.sum(1).tolist() == [9] * 4000
    # Each way to cut 9 into 3 is as likely, so each part is 3 on average.
    np.testing.assert_allclose(first.mean(0), 3, atol=0.15)


def test_seq2seq_lm_needs_as_many_sentinels_as_it_hides_spans():
    few = dataclasses.replace(T5_WORDS, sentinels=SENTINELS[:5])
    with pytest.raises(UsageError, match="hides 28 spans of 568 tokens, and the tokenizer has 5 sentinels"):
        seq2seq_lm.rows(tokens(1, 568), order.key(1, 0, np.arange(1)), few, 0.15)
    with pytest.raises(UsageError, match="eos token"):
        seq2seq_lm.check(dataclasses.replace(WORDS, eos=None))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_loss_of_text_to_text_is_that_of_transformers_summed(family, padded):
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16}
    if family == "bart":
        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    section = Model(task="seq2seq_lm", config={"model_type": family, **sizes})
    net = built(section, 32, 0).eval()
    taken, _ = seq2seq_lm.span(32, 0.15)
    input_ids, labels = map(
        torch.from_numpy, seq2seq_lm.rows(tokens(4, taken), order.key(5, 0, np.arange(4)), FEW_WORDS, 0.15)
    )
    given = {"input_ids": input_ids}
    if padded:
        given["attention_mask"] = torch.ones_like(input_ids)
        given["attention_mask"][1, 20:], labels[1, 4:] = 0, -100
    loss, right = seq2seq_lm.loss_sum(net, seq2seq_lm.inputs(given, labels, net.config), labels, score=True)
    loss.backward()
    gradient = net.get_input_embeddings().weight.grad.clone()
    net.zero_grad()
    output = net(**given, labels=labels)
    asked = labels != -100
    assert int(right) == int((output.logits.argmax(-1) == labels)[asked].sum())
    reference = output.loss * asked.sum()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(gradient, net.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-5)


CONFIGS = {
    "bert": ("masked_lm", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}),
    "roberta": ("masked_lm", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}),
    "distilbert": ("masked_lm", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}),
    "gpt2": ("causal_lm", {"n_embd": 32, "n_layer": 1, "n_head": 2}),
    "llama": ("causal_lm", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_is_that_of_transformers_summed(kind):
    task, arguments = CONFIGS[kind]
    section = Model(task=task, config={"model_type": kind, **arguments})
    net = built(section, 32, 0).eval()
    taken, _ = TASKS[task].span(32, 0.15)
    rows = TASKS[task].rows(tokens(4, taken), order.key(5, 0, np.arange(4)), WORDS, 0.15)
    input_ids, labels = (torch.from_numpy(row) for row in rows)
    loss, right = TASKS[task].loss_sum(
        net, TASKS[task].inputs({"input_ids": input_ids}, labels, net.config), labels, score=True
    )
    loss.backward()
    gradient = net.get_input_embeddings().weight.grad.clone()

    logits = net(input_ids=input_ids).logits
    asked = labels != -100
    assert int(right) == int((logits.argmax(-1) == labels)[asked].sum())
    net.zero_grad()
    if task == "masked_lm":
        reference = net(input_ids=input_ids, labels=labels).loss * asked.sum()
    else:  # transformers shifts the labels itself: hand it the whole slice
        both = torch.cat([input_ids, labels[:, -1:]], 1)
        reference = net(input_ids=both, labels=both).loss * asked.sum()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(gradient, net.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-5)


def test_a_model_is_the_same_whenever_it_is_built():
    section = Model(task="causal_lm", config={"model_type": "gpt2", "n_layer": 1})
    torch.manual_seed(5)
    first = built(section, 16, 3).state_dict()
    torch.manual_seed(6)
    second = built(section, 16, 3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_head_that_a_folder_lacks_is_the_same_whenever_it_is_made(tmp_path):
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=100, **small)).save_pretrained(tmp_path)
    section = Model(task="masked_lm", init_from=str(tmp_path))
    heads = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        heads.append(built(section, 32, 3).cls.predictions.transform.dense.weight)
    assert torch.equal(*heads)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": "big"}, "cannot build this model"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "cannot build this model"),
        ({"vocab_size": 50}, "50 embeddings"),
    ],
)
def test_a_configuration_that_makes_no_model_is_a_usage_error(config, words):
    section = Model(task="masked_lm", config={"model_type": "bert", **config})
    with pytest.raises(UsageError, match=words):
        model.build(section, WORDS, 16, seed=1)


def test_ids_with_gaps_have_embeddings_and_are_never_made_up():
    class Tokenizer:
        all_special_ids = (0, 7)
        cls_token_id = sep_token_id = mask_token_id = 7
        pad_token_id, bos_token_id, eos_token_id = 0, None, None
        model_input_names = ("input_ids", "token_type_ids")

        def get_vocab(self):
            return {"[PAD]": 0, "[X]": 7, "a": 1000, "b": 1002}

    words = model.vocabulary(Tokenizer())
    assert words.size == 1003
    assert words.ordinary.tolist() == [1000, 1002]


def test_a_head_that_a_folder_does_not_tie_stays_untied(tmp_path):
    """A checkpoint of it must say so, or the head would be lost when the run goes on."""
    from transformers import GPT2Config, GPT2LMHeadModel

    made = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False))
    made.config.tie_word_embeddings = True
    weights_of = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.config.save_pretrained(tmp_path)
    save_file(weights_of, tmp_path / "model.safetensors", {"format": "pt"})
    net = model.load(tmp_path, "causal_lm", strict=False)
    untied = net.lm_head.weight is not net.transformer.wte.weight
    assert net.config.tie_word_embeddings is not untied
    source = weights.Saved(tmp_path / "model.safetensors")
    source.check(model.outline(net.config, "causal_lm"))


def test_state_that_checkpoints_lack_is_refused():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

    section = Model(task="causal_lm", config={"model_type": "gpt2"})
    net, _ = model.build(section, WORDS, 16, seed=0)
    net.transformer.extra = Counting()
    with pytest.raises(UsageError, match=r"gpt2 keeps transformer\.extra\.seen, which is no weight"):
        model.check_fits(net, WORDS, 16)
