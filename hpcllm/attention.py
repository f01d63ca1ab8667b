"""Attention that stays within documents: a row of tokens holds pieces of several, and each token sees its own alone.

For transformers' models, unmodified: where their attention would look at whole rows, `keep_apart` has it look at one
document after the other, so that what lies between two of them is not even computed. `quicken` leaves rows as they are,
and has them computed as documents are on a CPU.

B: rows, S: tokens of one, T = B S, h: heads, d: size of one.
"""

import functools
import inspect
import sys

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .dropout import drop
from .errors import UsageError
from .parallel import small

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before 2.10
    varlen_attn = None
# Since 2.11: how far each token sees back.
_VARLEN = varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters

_NAME, _ROWS = "hpcllm_documents", "hpcllm_rows"
# Shorter documents share one product: up to here its masked half costs less than another call (measured on a CPU).
_TOGETHER = 64
# Up to here a CPU is quicker with all products of queries and keys in bf16 than with SDPA's blocks of them, by 2 to 4.
_DENSE = 1024
_PRODUCTS = 1 << 24  # of a layer, which backward needs again: 32 MiB
_DENSE_TYPES = (torch.bfloat16, torch.float16)


class Documents:
    """Where documents begin in the T tokens of a micro-batch, for the attention of all its layers."""

    def __init__(self, positions, device):
        """positions: int64 [B, S] on the CPU, place of each token in its document, 0 where one begins, as rows do."""
        self.positions, self.device = positions.to(device), device
        begins = (positions.flatten() == 0).nonzero().squeeze(1)
        self.borders = torch.cat([begins, begins.new_tensor([positions.numel()])])
        self.lengths = self.borders.diff().tolist()
        self.longest = max(self.lengths)
        self._spans, self._made = None, {}

    @property
    def spans(self):
        """Lengths of documents that lie side by side and are computed in one: a list of lists."""
        if self._spans is None:
            self._spans, filled = [], _TOGETHER
            for length in self.lengths:
                if filled + length > _TOGETHER:
                    self._spans.append([])
                    filled = 0
                self._spans[-1].append(length)
                filled += length
        return self._spans

    def bias(self, span, causal, window, dtype):
        """What to add to the scores of span number `span`, [tokens, tokens]: -inf where nobody looks; None for nothing.

        window: how many tokens before it one sees, itself included; None: all.
        """
        lengths = self.spans[span]
        key = tuple(lengths), causal, window, dtype
        if key not in self._made:
            number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(self.device)
            self._made[key] = _bias(number, causal, window).to(dtype) if len(lengths) > 1 or causal else None
        return self._made[key]

    def mask(self, causal, window):
        """As SDPA's, for whole rows: bool [B, 1, S, S]."""
        key = causal, window
        if key not in self._made:
            self._made[key] = (_bias((self.positions == 0).cumsum(-1), causal, window) == 0).unsqueeze(1)
        return self._made[key]

    def cumulative(self):
        """int32 [documents + 1] on the device."""
        if "borders" not in self._made:
            self._made["borders"] = self.borders.to(self.device, torch.int32)
        return self._made["borders"]


def _bias(number, causal, window):
    """0 where tokens see each other, else -inf: [..., n, n] for the documents, by number, of n tokens that lie side by
    side."""
    seen = number.unsqueeze(-1) == number.unsqueeze(-2)
    if causal:
        place = torch.arange(number.shape[-1], device=number.device)
        before = place.unsqueeze(-1) - place
        seen = seen & (before >= 0)
        if window is not None:
            seen = seen & (before < window)
    return torch.zeros(seen.shape, device=number.device).masked_fill_(~seen, -torch.inf)


def inputs(given, positions, device):
    """The model's keyword arguments for rows of several documents, from those for rows of one.

    positions: as `Documents` takes them; None: rows are of one.
    """
    if positions is None:
        return given
    documents = Documents(positions, device)
    return {**given, "position_ids": documents.positions, "documents": documents}


def keep_apart(model):
    """Make `model` take rows of several documents, as `inputs` gives them, and no others.

    Raises UsageError, the same on every rank, for a model whose attention cannot be replaced, or that does more between
    tokens than attend.
    """
    kind, kinds = model.config.model_type, set(getattr(model.config, "layer_types", None) or [])
    # Those that flash kernels may serve, which take no mask: causal or not, and a window, are all that they know.
    known = getattr(model, "_supports_flash_attn", False) and kinds <= {"full_attention", "sliding_attention"}
    if model.config.is_encoder_decoder or not known:
        raise UsageError(
            f"data: attention: that of {kind} is not one that transformers lets others replace by document; set "
            'attention to "row"'
        ).known_to_all()
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _no_mask)
    _try_in_small(model)
    model.set_attn_implementation(_NAME)


def _try_in_small(model):
    """Some families count positions in a way of their own, or mix tokens elsewhere too."""
    tokens, lengths = torch.arange(24).remainder(15).view(2, 12) + 1, [5, 1, 6, 12]
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 12)

    def one_by_one(tiny):
        documents = tokens.flatten().split(lengths)
        return torch.cat([tiny(input_ids=document.unsqueeze(0)).logits[0] for document in documents])

    def in_rows(tiny):
        tiny.set_attn_implementation(_NAME)
        return tiny(**inputs({"input_ids": tokens}, positions, tokens.device)).logits.flatten(0, 1)

    what, run_file = "between its tokens than attend by position", {"section": "data", "plain": '"row"'}
    small.refuse_unless_same(model, "attention", one_by_one, in_rows, what, **run_file)


def _no_mask(*, attention_mask=None, **_):
    """What transformers asks for each forward; documents say it all."""
    if attention_mask is not None:
        raise UsageError('data: attention: rows of documents have no padding, and take no attention_mask; set "row"')


@torch.compiler.disable  # documents are of other lengths each time
def _attention(
    module,
    query,
    key,
    value,
    _,
    *,
    documents,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    **more,
):
    """As transformers' sdpa_attention_forward: query [B, h, S, d], of key and value fewer heads, to [B, S, h, d]."""
    if any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise UsageError("attention does more than add up values by the softmax of products")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if sliding_window is not None and not causal:
        raise UsageError("a window without a causal mask is not known")
    query, key, value = (of.to(_arithmetic(query)) for of in (query, key, value))
    if query.device.type != "cpu" and not _varlen_serves(query, dropout):
        mask = documents.mask(causal, sliding_window)
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal=False)
    key, value = (repeat_kv(of, query.shape[1] // of.shape[1]) for of in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # [T, h, d], of which documents are slices.
    parts = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    if query.device.type == "cpu":
        found = _on_cpu(documents, *parts, causal, sliding_window, dropout, scale)
    else:
        reach = (-1 if sliding_window is None else sliding_window - 1, 0) if causal else (-1, -1)
        borders = documents.cumulative()
        found = varlen_attn(
            *parts, borders, borders, documents.longest, documents.longest, scale=scale, window_size=reach
        )
    return found.view(query.shape[0], query.shape[2], *found.shape[1:]), None


def _arithmetic(query):
    """The dtype that attention is computed in: that of autocast, where it is on."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _varlen_serves(query, dropout):
    """True where flash attention computes documents of any lengths: without dropout, as torch gives it to us."""
    if not _VARLEN or dropout or not query.is_cuda or query.dtype not in _DENSE_TYPES:
        return False
    width = query.shape[-1]
    return width <= 256 and width % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _on_cpu(documents, query, key, value, causal, window, dropout, scale):
    """[T, h, d] of each to [T, h, d], span by span."""
    sizes, found = [sum(span) for span in documents.spans], []
    for number, (q, k, v) in enumerate(zip(*(of.split(sizes) for of in (query, key, value)), strict=True)):
        q, k, v, size = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), sizes[number]
        whole = len(documents.spans[number]) == 1 and (window is None or size <= window)
        # With dropout SDPA has all products at once as well.
        if dropout or (q.dtype in _DENSE_TYPES and size <= _DENSE):
            bias = documents.bias(number, causal, window, q.dtype)
            found.append(_all_products(q, k, v, bias, dropout, scale).transpose(0, 1))
        else:
            mask = None if whole else documents.bias(number, causal, window, q.dtype)
            heads = (tensor.unsqueeze(0) for tensor in (q, k, v))
            one = functional.scaled_dot_product_attention(
                *heads, attn_mask=mask, is_causal=whole and causal, scale=scale
            )
            found.append(one[0].transpose(0, 1))
    return torch.cat(found)


def _all_products(query, key, value, bias, dropout, scale):
    """[h, n, d] of each to [h, n, d]; bias: [n, n], added to the scores, None for none."""
    added = {"input": query.new_zeros(1), "beta": 0.0} if bias is None else {"input": bias}
    scores = torch.baddbmm(batch1=query, batch2=key.mT, alpha=scale, **added)
    return drop(scores.softmax(-1), dropout) @ value


def quicken(model):
    """Have the attention of `model`, on the CPU, compute all products at once where that is quicker than SDPA.

    Under autocast scores are rounded to 16 bits before the softmax, as what linear layers give is: at scores of a few
    units an error of 1 % of what a head gives, beside 0.2 % of SDPA's blocks (benchmarks/loss_curves.py compares what
    is learnt).
    """
    ours = getattr(model.config, "_attn_implementation", None) == "sdpa" and not model.config.is_encoder_decoder
    if ours and not _looks_at_the_name(model):
        AttentionInterface.register(_ROWS, _of_rows)
        AttentionMaskInterface.register(_ROWS, sdpa_mask)
        model.set_attn_implementation(_ROWS)


def _looks_at_the_name(model):
    """True for families that do something else, besides, where their attention is called "sdpa": sparse ones do."""
    lines = inspect.getsource(sys.modules[type(model).__module__]).splitlines()
    return any("_attn_implementation" in line and "sdpa" in line for line in lines)


def _of_rows(module, query, key, value, mask, dropout=0.0, scaling=None, is_causal=None, **more):
    """As transformers' sdpa_attention_forward, which does what this does not."""
    rows, heads, length, _ = query.shape
    few = length <= _DENSE and rows * heads * length**2 <= _PRODUCTS
    dense = dropout or (few and _arithmetic(query) in _DENSE_TYPES)  # with dropout SDPA has them all as well
    other = any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
    if mask is not None or not dense or other or key.shape[2] != length:
        more |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, mask, **more)
    query, key, value = (of.to(_arithmetic(query)) for of in (query, key, value))
    key, value = (repeat_kv(of, query.shape[1] // of.shape[1]) for of in (key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = _causal(length, query.dtype) if causal else None
    found = _all_products(*(of.flatten(0, 1) for of in (query, key, value)), bias, dropout, scale)
    return found.view(rows, heads, length, -1).transpose(1, 2), None


@functools.lru_cache(maxsize=4)
def _causal(length, dtype):
    return _bias(torch.zeros(length), True, None).to(dtype)
