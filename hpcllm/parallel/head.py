"""From a model's last hidden states to the loss: only targets pass the prediction head, and few of them at a time reach
the vocabulary, so that logits of all tokens never exist."""

import torch
from torch import nn

from . import small, vocabulary


def loss_sum(model, given, labels, score=False):
    """(sum of the cross entropy over all targets in nats, targets predicted right), scalar tensors.

    model: of transformers, or a wrapper that calls it as `module` (DDP); given: its keyword arguments; labels: int64
    [B, S], -100 where there is no target; score: False spares the second, which is then None.

    Without `score`, what the model says of how unevenly its experts are used is added for each target, if its
    configuration has it say so (router_aux_loss_coef).

    What the model does behind its base, it does to the rows of targets alone: with 15 % of the tokens masked that saves
    85 % of the head. Models whose head cannot be entered like that give all their logits.
    """
    inner, targets = getattr(model, "module", model), labels.flatten()
    rows = (targets != -100).nonzero().squeeze(1)
    everything = len(rows) == len(targets)
    targets = targets if everything else targets.index_select(0, rows)
    head, right = inner.get_output_embeddings(), None
    words = vocabulary.words_of(head)
    if not _ends_with(inner, head):
        output = model(**given)
        logits = output.logits.flatten(0, -2).index_select(0, rows).float()
        right = (vocabulary.best(logits, words) == targets).sum() if score else None
        loss = vocabulary.cross_entropy_sum(logits, targets, words)
        return (loss if score else _with_balance(loss, inner, output, len(targets))), right

    by_base = inner.base_model is not inner  # else, as in T5, what is behind the blocks is little and sees all rows

    def of_targets(hidden):
        nonlocal right
        hidden = hidden.flatten(0, -2)
        if not (by_base or everything):
            hidden = hidden.index_select(0, rows)
        loss, right = vocabulary.linear_cross_entropy(hidden, head.weight, head.bias, targets, words, score)
        return loss

    # The loss is computed within forward, where weights are whole that FSDP2 takes apart behind it.
    with _Rows(inner, rows if by_base and not everything else None), _Instead(head, of_targets):
        output = model(**given)
    return (output.logits if score else _with_balance(output.logits, inner, output, len(targets))), right


def _with_balance(loss, model, output, targets):
    uneven = getattr(output, "aux_loss", None)
    return loss if uneven is None else loss + model.config.router_aux_loss_coef * uneven * targets


class _Rows:
    """In this context the base of a model gives the hidden states of some tokens, [1, n, hidden], instead of all."""

    def __init__(self, model, rows):
        """rows: int64 [n], among the B x S tokens; None: all of them, as they are."""
        self._base, self._rows = model.base_model, rows

    def __enter__(self):
        self._hook = None if self._rows is None else self._base.register_forward_hook(self._select)

    def __exit__(self, *error):
        if self._hook is not None:
            self._hook.remove()

    def _select(self, _, __, output):
        output.last_hidden_state = output.last_hidden_state.flatten(0, -2).index_select(0, self._rows).unsqueeze(0)
        return output


class _Instead:
    """In this context the forward of a module is `forward`; its hooks stay."""

    def __init__(self, module, forward):
        self._module, self._forward = module, forward

    def __enter__(self):
        self._module.forward = self._forward

    def __exit__(self, *error):
        del self._module.forward


def _ends_with(model, head):
    """True where the base gives hidden states, what follows treats each alone, and logits are what `head` gives; of
    models without a base the last of these.

    Tried out once, on a small model of the same class.
    """
    if not hasattr(head, "ends_model"):
        head.ends_model = _plain(model, head) and _tried(model)
    return head.ends_model


def _plain(model, head):
    return type(head) is nn.Linear and "forward" not in vars(head)


@torch.no_grad()
def _tried(model):
    tokens = torch.arange(1, 13).view(2, 6)
    rows = torch.tensor([1, 4, 5, 8])
    given, told = {"input_ids": tokens, "use_cache": False}, []
    try:
        with torch.autocast("cpu", enabled=False):
            tiny = small.of_class(model)
            given = given if hasattr(tiny.config, "use_cache") else {"input_ids": tokens}
            if tiny.config.is_encoder_decoder:
                given["decoder_input_ids"] = tokens
            expected = tiny(**given).logits.flatten(0, -2).index_select(0, rows)
            head = tiny.get_output_embeddings()

            def noted(hidden):
                told.append(nn.functional.linear(hidden, head.weight, head.bias))
                return told[-1]

            if not _plain(tiny, head):
                return False
            by_base = tiny.base_model is not tiny
            with _Rows(tiny, rows if by_base else None), _Instead(head, noted):
                logits = tiny(**given).logits
    except Exception:
        return False
    # The very tensor and unchanged: at its start a small model's logits hardly tell what bends or scales them.
    as_it_was = len(told) == 1 and logits is told[0] and logits._version == 0
    found = logits.flatten(0, -2) if by_base else logits.flatten(0, -2).index_select(0, rows)
    return as_it_was and torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
