"""Ask a trained model: fill masks (masked_lm) or continue texts (causal_lm), the texts spread over the ranks."""

from pathlib import Path

import torch

from . import model
from .errors import DataError, UsageError
from .evaluate import arithmetic
from .mpi import together

BLANK = "[MASK]"  # what a user writes, whatever the tokenizer calls its mask token


def predict(config, folder, texts, world, *, top_k=5, max_new_tokens=40):
    """Answers to `texts` (list of str) in their order, on root; None on the other ranks. Collective.

    config: config.Config of the run that trained the checkpoint `folder`. A masked_lm answer is {"text", "masks":
    [[{"token", "probability"}, ...top_k] for each mask]}; a causal_lm answer {"text", "continuation"}, greedy.
    """
    from .data import tokenizer

    task = config.model.task
    with together(world.comm):
        words = tokenizer.load(folder)
        net = model.load(folder, task).to(world.device).eval()
        answer = {"masked_lm": fill_masks, "causal_lm": continue_text}[task]
        places = getattr(net.config, "max_position_embeddings", None) or config.train.sequence_length
        if not 1 <= top_k <= len(words) or max_new_tokens < 1:
            raise UsageError(f"--top-k {top_k} must be 1 to {len(words)}, --max-new-tokens {max_new_tokens} at least 1")
        check(texts, words, task, places - (max_new_tokens if answer is continue_text else 0))
    with torch.no_grad(), arithmetic(config.train.precision, world.device):
        mine = [
            answer(net, words, text, world.device, top_k=top_k, max_new_tokens=max_new_tokens)
            for text in texts[world.rank :: world.size]
        ]
    gathered = world.comm.gather(mine, root=0)
    if gathered is None:
        return None
    return [gathered[i % world.size][i // world.size] for i in range(len(texts))]


def encode(words, text):
    """Token ids, with the tokenizer's special tokens, of a text in which [MASK] stands for its mask token."""
    if words.mask_token is not None:
        text = text.replace(BLANK, words.mask_token)
    return words(text, return_attention_mask=False, verbose=False)["input_ids"]


def check(texts, words, task, places):
    """Raise for texts that the model cannot answer, by number (from 1); the same on every rank."""
    for number, text in enumerate(texts, 1):
        ids = encode(words, text)
        if task == "masked_lm" and words.mask_token_id not in ids:
            raise UsageError(f'text {number} has no {BLANK} to fill: "{text[:60]}"')
        if not ids:
            raise UsageError(f"text {number} is empty")
        if len(ids) > places:
            raise DataError(
                f"text {number} has {len(ids)} tokens, more than the {places} that this model leaves room for"
            )


def fill_masks(net, words, text, device, *, top_k, **_):
    ids = torch.tensor([encode(words, text)], device=device)
    probabilities = net(input_ids=ids).logits[ids == words.mask_token_id].float().softmax(-1)
    values, tokens = probabilities.topk(top_k)
    masks = [
        [
            {"token": words.decode([token]).strip(), "probability": round(value, 4)}
            for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
        ]
        for tokens, values in zip(tokens, values, strict=True)
    ]
    return {"text": text, "masks": masks}


def continue_text(net, words, text, device, *, max_new_tokens, **_):
    ids = torch.tensor([encode(words, text)], device=device)
    pad = words.pad_token_id if words.pad_token_id is not None else words.eos_token_id
    made = net.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad
    )
    return {"text": text, "continuation": words.decode(made[0, ids.shape[1] :], skip_special_tokens=True)}


def read_texts(path):
    """Non-empty lines of a UTF-8 file."""
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from None


def show(answer):
    """An answer as a person reads it."""
    if "continuation" in answer:
        return f"{answer['text']} | {answer['continuation']}"
    filled = "; ".join(
        ", ".join(f"{guess['token']} {guess['probability']:.3f}" for guess in guesses) for guesses in answer["masks"]
    )
    return f"{answer['text']}\n    {filled}"
